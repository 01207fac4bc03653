"""Weight files of every format with one array missing, flat, a number or empty."""

import dataclasses
import re

import numpy as np
import pytest
from tiers import crossed

from big_vision_lite.conversion import foreign, formats
from big_vision_lite.conversion.families import FORMATS
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.bit import BiT, PoolPadding
from big_vision_lite.models.bit_v1 import BiTV1, Standardisation, Trunk
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import FinalNorm, Pooling
from big_vision_lite.models.mixer import MlpMixer
from big_vision_lite.models.resnet import ResNet
from big_vision_lite.models.vit import ViT

SIZE = (16, 16)
PATH = "folder/weights.file"
HEAD = Classifier(num_classes=3)
VIT = ViT(
    **dict(width=32, depth=1, mlp_dim=32, num_heads=2, patch_size=8, head=HEAD),
    pooling=Pooling.CLASS_TOKEN,
    positions=Positions.LEARNED,
)
PROBE = VIT.clone(pooling=Pooling.ATTENTION)
AVERAGE = VIT.clone(pooling=Pooling.AVERAGE)
SCALED = VIT.clone(layer_scale=0.5)
# In a second block, a bias that the first has not is left over.
TIMM = VIT.clone(depth=2, activation=Activation.GELU_ERF)
MIXER = MlpMixer(
    **dict(width=16, depth=1, token_mlp_dim=8, channel_mlp_dim=8, patch_size=8),
    head=HEAD,
)
BIT = BiT(stages=(1, 1), width=32, head=HEAD)
TRUNK = Trunk(stages=(1,), width=32)
TORCH_TRUNK = dataclasses.replace(
    TRUNK, standardisation=Standardisation.INSIDE_ROOT, norm_epsilon=1e-5
)
RESNET = ResNet(stages=(1, 1), width=8, head=HEAD)
HYBRID = VIT.clone(patch_size=1)
NUM_HEADS = {"model_args": {"num_heads": 2}}
TOWER = {
    **dict(patch_size=8, image_size=16, hidden_size=32, num_hidden_layers=1),
    **dict(num_attention_heads=2, intermediate_size=32),
}
# {format: (a model of it, what the shapes leave open)}; None: what `describe` returns.
CASES = {
    "BiT (npz)": (BIT, {}),
    "Hugging Face BiT": (BIT, None),
    "Hugging Face BiT, norms after convolutions": (
        BiTV1(trunk=TORCH_TRUNK, head=HEAD),
        None,
    ),
    "Hugging Face DINOv2": (SCALED, None),
    "Hugging Face DINOv2 with registers": (SCALED.clone(registers=2), None),
    "Hugging Face DeiT": (VIT.clone(registers=1), None),
    "Hugging Face ResNet": (RESNET, None),
    "Hugging Face ResNet without a head": (RESNET.clone(head=None), None),
    "Hugging Face SigLIP": (PROBE.clone(head=None), None),
    "Hugging Face SigLIP tower": (PROBE.clone(head=None), TOWER),
    "Hugging Face ViT": (VIT, None),
    "big_vision MLP-Mixer (npz)": (MIXER, {}),
    "big_vision ViT (npz)": (VIT, {}),
    "big_vision ViT (npz, stacked blocks)": (PROBE, {}),
    "big_vision bit (npz)": (BiTV1(trunk=TRUNK, head=HEAD), {}),
    "big_vision bit_paper (npz)": (
        BIT.clone(pool_padding=PoolPadding.NEGATIVE_INFINITY),
        {},
    ),
    "big_vision image-text ViT (npz)": (PROBE, {}),
    "big_vision image-text ViT (npz, stacked blocks)": (PROBE, {}),
    "big_vision_lite": (VIT, None),
    "timm BiT": (BIT, {}),
    "timm MLP-Mixer": (MIXER.clone(activation=Activation.GELU_ERF), {}),
    "timm ResNet": (RESNET, {"architecture": "resnet50"}),
    "timm ResNetV2, norms after convolutions": (
        BiTV1(trunk=TORCH_TRUNK, head=HEAD),
        {},
    ),
    "timm ViT": (TIMM.clone(registers=1, qk_norm=True), NUM_HEADS),
    "timm ViT, class token unread": (
        TIMM.clone(pooling=Pooling.AVERAGE, registers=1, final_norm=FinalNorm.POOLED),
        NUM_HEADS,
    ),
    "timm hybrid ViT": (TIMM.clone(patch_size=1, stem=TORCH_TRUNK), NUM_HEADS),
    "torchvision ResNet": (RESNET, {}),
    "torchvision ViT": (TIMM, {"arguments": {"num_heads": 2}}),
    "vision_transformer ViT (npz)": (VIT, {}),
    "vision_transformer hybrid ViT (npz)": (HYBRID.clone(stem=TRUNK), {}),
}
DAMAGES = {
    "removed": None,
    "flat": lambda array: array.reshape(-1),
    "a number": lambda array: np.ones((), np.float32),
}
# Without one of these, the rest is another model of the same format, which is read.
OPTIONAL = re.compile("(img/)?(cls|pos_embedding)|(cls|reg)_token|pos_embed")


def written(name):
    """Returns random weights in the format of a name."""
    form = next(f for f in FORMATS if f.name == name)
    model, config = CASES[name]
    rng = np.random.default_rng(0)
    ours = {
        name: rng.uniform(0.5, 1, shape).astype(np.float32)
        for name, shape in formats.shapes(model, SIZE, 3).items()
    }
    arrays = formats.write(form, model, SIZE, ours)
    config = form.describe(model, SIZE, 3) if config is None else config
    return Weights(arrays=arrays, path=PATH, config=config)


def load(weights):
    form = foreign.recognise(weights)
    architecture = form.architecture(weights)
    size = architecture.image_size_px or SIZE
    return formats.load(weights, form, architecture, size)


def same(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in expected
    )


def test_every_format_is_tried():
    assert CASES.keys() == {form.name for form in FORMATS}


@pytest.mark.parametrize(("name", "kind"), crossed(CASES, DAMAGES))
def test_one_damaged_array_is_refused_with_the_name_of_the_file(name, kind):
    whole = written(name)
    assert foreign.recognise(whole).name == name
    expected, damage = load(whole), DAMAGES[kind]
    wrong = {}
    for key, array in whole.arrays.items():
        arrays = dict(whole.arrays)
        if damage is None:
            del arrays[key]
        else:
            arrays[key] = damage(array)
        try:
            found = load(dataclasses.replace(whole, arrays=arrays))
        except ValueError as error:
            if not str(error).startswith(PATH):
                wrong[key] = str(error)
        except Exception as error:
            wrong[key] = repr(error)
        else:
            # Counters that no model reads; norms, which have several shapes.
            another = kind == "removed" and OPTIONAL.fullmatch(key)
            if not another and not same(found, expected):
                wrong[key] = "loads other numbers"
    assert not wrong, "\n".join(f"{k}: {v}" for k, v in wrong.items())


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (None, r"  \+ blocks\.0\.mlp\.fc1\.weight  only in the model\n"),
        (
            DAMAGES["flat"],
            r"  - blocks\.0\.mlp\.fc1\.weight \(1024,\) float32  must have 2 axes\n",
        ),
        (
            lambda array: array[:0],
            r"\(0, 32\) float32  must have 2 axes and cannot be empty",
        ),
    ],
)
def test_the_report_says_what_is_wrong_and_what_to_do(damage, line):
    whole = written("timm ViT")
    name = "blocks.0.mlp.fc1.weight"
    array = whole.arrays.pop(name)
    if damage is not None:
        whole.arrays[name] = damage(array)
    with pytest.raises(ValueError, match=rf"{PATH} and the model differ:\n.*{line}"):
        load(whole)
    with pytest.raises(ValueError, match="Fetch or save the file again"):
        load(whole)
