"""Facebook's own files of DINOv2 and DeiT III give what timm makes of them."""

import numpy as np
import pytest
import torch_libraries
from foreign_models import randomise

from big_vision_lite.conversion import foreign, formats
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.mlp import Activation

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
timm = pytest.importorskip("timm")

TINY = dict(
    **dict(embed_dim=64, depth=2, num_heads=1, mlp_ratio=4),
    **dict(img_size=28, patch_size=7),
)
SIZE = (28, 28)


def arrays_of(model):
    state = model.state_dict()
    return {name: tensor.numpy().copy() for name, tensor in state.items()}


def variables_of(arrays, **config):
    weights = Weights(arrays=arrays, path="facebook.pth", config=config)
    form = foreign.recognise(weights)
    architecture = form.architecture(weights)
    assert architecture.image_size_px == SIZE
    return architecture.model, formats.load(weights, form, architecture, SIZE)


def assert_read_as_timm_reads(theirs, model, **options):
    """Compares our reading of a file with that of the model timm loads it into."""
    tensors = {name: torch.from_numpy(array) for name, array in theirs.items()}
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(
        tensors, model, **options
    )
    model.load_state_dict(filtered, strict=True)
    # A file of Facebook's comes without a configuration.
    found, ours = variables_of(theirs)
    same, expected = variables_of(arrays_of(model), architecture="vit", model_args=TINY)
    assert found == same
    assert ours.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)
    return found


@pytest.mark.parametrize(
    ("name", "registers", "activation"),
    [
        ("vit_small_patch14_dinov2", 0, Activation.GELU_ERF),
        ("vit_small_patch14_reg4_dinov2", 4, Activation.GELU_ERF),
        ("vit_giant_patch14_dinov2", 0, Activation.SWIGLU),
        ("vit_giant_patch14_reg4_dinov2", 4, Activation.SWIGLU),
    ],
)
def test_dinov2_of_facebook_is_read_as_timm_reads_it(name, registers, activation):
    model = randomise(timm.create_model(name, **TINY), seed=1)
    theirs = arrays_of(model)
    rng = np.random.default_rng(2)
    width = TINY["embed_dim"]
    theirs["mask_token"] = rng.normal(size=(1, width)).astype(np.float32)
    # Always of the class token and the patches, 4x4 here.
    theirs["pos_embed"] = rng.normal(size=(1, 17, width)).astype(np.float32)
    if registers:
        theirs["register_tokens"] = theirs.pop("reg_token")
    if activation == Activation.SWIGLU:
        for theirs_name in [n for n in theirs if ".mlp." in n]:
            renamed = theirs_name.replace("fc1", "w12").replace("fc2", "w3")
            theirs[renamed] = theirs.pop(theirs_name)
    found = assert_read_as_timm_reads(theirs, model)
    assert (found.registers, found.activation) == (registers, activation)


def test_deit3_of_facebook_is_read_as_timm_reads_it():
    model = timm.create_model("deit3_small_patch16_224", **TINY, num_classes=3)
    theirs = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): array
        for name, array in arrays_of(randomise(model, seed=3)).items()
    }
    assert "blocks.1.gamma_2" in theirs
    found = assert_read_as_timm_reads(theirs, model, adapt_layer_scale=True)
    assert found.layer_scale is not None
