"""What is special about the ViTs of torchvision."""

import numpy as np
import pytest
import torch_libraries
from conversion_cases.vit_torchvision import TINY_TORCHVISION as TINY
from conversion_cases.vit_torchvision import TORCHVISION_VITS as CASES
from conversion_cases.vit_torchvision import torchvision_vit
from foreign_models import randomise
from tiers import PUBLISHED, few

from big_vision_lite.conversion import foreign, formats, preprocessing
from big_vision_lite.conversion.families import vit_torchvision
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.mlp import Activation

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
models = pytest.importorskip("torchvision.models")
for library in ("timm", "transformers"):
    pytest.importorskip(library)
import both_sides  # noqa: E402
from both_sides import BOUND, worst  # noqa: E402

SIZES = ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"]


def built(case, **more):
    return randomise(torchvision_vit(**{**CASES[case], **more}), seed=0)


def weights_of(theirs, arguments):
    config = {"builder": "VisionTransformer", "arguments": arguments}
    return both_sides.weights_of(theirs, config if arguments else {})


def difference(model, variables, theirs, side):
    return worst(model, variables, theirs, (side, side))


def read(weights):
    """Returns the format, the architecture and our variables of some weights."""
    form = foreign.recognise(weights)
    assert form.name == "torchvision ViT"
    found = form.architecture(weights)
    return form, found, formats.load(weights, form, found, found.image_size_px)


@pytest.mark.parametrize("case", CASES)
def test_another_gelu_or_norm_constant_is_another_model(case):
    theirs = built(case)
    _, found, variables = read(weights_of(theirs, TINY))
    side = CASES[case]["image_size"]
    assert found.image_size_px == (side, side) and not found.assumptions
    other = found.model.clone(activation=Activation.GELU_TANH)
    assert difference(other, variables, theirs, side) > BOUND
    other = found.model.clone(norm_epsilon=1e-4)
    assert difference(other, variables, theirs, side) > BOUND


def test_the_names_of_the_published_files_are_read():
    """Their MLPs are linear_1 and linear_2, and no configuration comes along."""
    theirs = built("odd")
    weights = weights_of(theirs, TINY)
    _, _, today = read(weights_of(theirs, TINY))
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): x
        for name, x in weights.arrays.items()
    }
    assert old.keys() != weights.arrays.keys()
    _, _, first = read(Weights(arrays=old, path="file", config={"arguments": TINY}))
    for name, array in today.items():
        np.testing.assert_array_equal(first[name], array, err_msg=name)
    road = preprocessing.read(
        weights, vit_torchvision.TorchvisionViT.assumes, (224, 224)
    )
    assert road.mean[0] == pytest.approx(0.485 * 255)
    assert "torchvision's" in road.assumptions[0].words


@pytest.mark.parametrize("size", few(SIZES, "vit_b_16", marks=PUBLISHED))
def test_published_sizes_have_the_shapes_and_the_names_of_theirs(size):
    with torch.device("meta"):
        theirs = getattr(models, size)()
    shapes = {n: tuple(x.shape) for n, x in theirs.state_dict().items()}
    arrays = {n: np.broadcast_to(np.float32(0), s) for n, s in shapes.items()}
    weights = Weights(arrays=arrays, path="file")
    form = foreign.recognise(weights)
    found = form.architecture(weights)
    assert found.model.num_heads == theirs.encoder.layers[0].num_heads
    ours = formats.shapes(found.model, found.image_size_px, 3)
    variables = {n: np.broadcast_to(np.float32(0), s) for n, s in ours.items()}
    written = formats.write(form, found.model, found.image_size_px, variables)
    assert {n: x.shape for n, x in written.items()} == shapes
    # Ours has no position of the class token.
    assert sum(np.prod(s) for s in ours.values()) + found.model.width == sum(
        np.prod(s) for s in shapes.values()
    )


@pytest.mark.slow
@pytest.mark.published
def test_a_published_size_gives_the_logits_of_torchvision():
    theirs = randomise(models.vit_b_16(), seed=0)
    _, found, variables = read(weights_of(theirs, {}))
    assert difference(found.model, variables, theirs, 224) < BOUND


def test_positions_and_projections_in_another_order_are_seen():
    theirs = built("odd")
    weights = weights_of(theirs, TINY)
    for name, change in (
        ("encoder.pos_embedding", lambda x: np.roll(x, 1, axis=1)),
        (
            "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
            lambda x: np.roll(x, 32, axis=0),
        ),
    ):
        arrays = {**weights.arrays, name: change(weights.arrays[name])}
        _, found, variables = read(
            Weights(arrays=arrays, path="", config=weights.config)
        )
        assert difference(found.model, variables, theirs, 35) > BOUND


def test_heads_that_nothing_tells_are_assumed_and_said_or_asked_for():
    hint = r'{"arguments": {"num_heads": 6}}'
    weights = weights_of(built("odd"), {})
    with pytest.raises(ValueError, match=f"32 is no multiple of 64.*{hint}"):
        read(weights)
    wide = built("odd", hidden_dim=128)
    _, found, _ = read(weights_of(wide, {}))
    assert found.model.num_heads == 2
    assert "architecture: num_heads=2 assumed" in str(found.assumptions[0])
    assert hint in found.assumptions[0].words


def test_positions_that_make_no_square_are_refused():
    weights = weights_of(built("odd"), TINY)
    name = "encoder.pos_embedding"
    weights.arrays[name] = weights.arrays[name][:, :-1]
    with pytest.raises(ValueError, match="24 positions of patches, which make no"):
        read(weights)
