"""BiT and ResNet v1 with group norm: timm, Hugging Face, npz; the same numbers."""

import functools
import json

import jax
import numpy as np
import pytest
import torch_libraries
from big_vision_bit import random_variables
from foreign_models import randomise, relative_difference

from big_vision_lite import trees
from big_vision_lite.conversion import (
    bit_huggingface,
    bit_npz,
    bit_timm,
    export,
    foreign,
    formats,
    mapping,
)
from big_vision_lite.conversion.formats import Library, Weights
from big_vision_lite.models.bit import BiT, Block
from big_vision_lite.models.bit_v1 import BiTV1, Standardisation, Trunk
from big_vision_lite.models.heads import Classifier

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from timm.layers import GroupNormAct, StdConv2d  # noqa: E402
from timm.layers.std_conv import StdConv2dSame  # noqa: E402
from timm.models.resnetv2 import ResNetV2  # noqa: E402

BOUND = 1e-5  # max |difference| / max |value|, float32 on the CPU
CLASSES = 7
# Even at every stride, odd at every stride, and neither square nor of one kind.
SIZES = {"even": (64, 64), "odd": (65, 65), "not square": (48, 82)}
EVEN = SIZES["even"]
BIT, TIMM_V1 = bit_timm.FORMATS
HF, HF_V1 = bit_huggingface.FORMATS
FIRST, PAPER, NPZ_V1 = bit_npz.FORMATS
TORCH_FORM = dict(standardisation=Standardisation.INSIDE_ROOT, norm_epsilon=1e-5)


def timm_model(
    *, epsilon=1e-8, norm_epsilon=1e-5, v1=False, same=None, seed=1, **arguments
):
    """Builds ResNetV2 with two stages; `same` is TensorFlow's padding."""
    same = v1 if same is None else same
    conv = StdConv2dSame if same else StdConv2d
    plain = dict(
        layers=(1, 2),
        channels=(128, 256),
        stem_chs=32,
        num_classes=CLASSES,
        preact=not v1,
        stem_type="same" if same else "fixed",
    )
    model = ResNetV2(
        **{**plain, **arguments},
        conv_layer=functools.partial(conv, eps=epsilon),
        norm_layer=functools.partial(GroupNormAct, num_groups=32, eps=norm_epsilon),
    )
    return randomise(model, seed)


BASIC = dict(basic=True, bottle_ratio=1.0, channels=(32, 64))
# {what: (arguments of ResNetV2, configuration)}
TIMM_CASES = {
    "zeros": ({}, {"architecture": "resnetv2_50x1_bit"}),
    "zeros assumed": ({}, {}),
    "negative infinity": ({"stem_type": ""}, {"model_args": {"stem_type": ""}}),
    "basic": (BASIC, {"architecture": "resnetv2_50x1_bit"}),
    "no head": ({"num_classes": 0}, {"architecture": "resnetv2_50x1_bit"}),
    "gray": ({"in_chans": 1}, {"architecture": "resnetv2_50x1_bit"}),
    "norms after convolutions": (
        {"v1": True},
        {"model_args": {"stem_type": "same"}},
    ),
}


def huggingface_model(*, layer_type="preactivation", seed=2, **arguments):
    v1 = layer_type == "bottleneck"
    plain = dict(
        embedding_size=32,
        hidden_sizes=(128, 256),
        depths=(1, 2),
        num_labels=CLASSES,
        layer_type=layer_type,
        global_padding="same" if v1 else None,
        embedding_dynamic_padding=v1,
    )
    config = transformers.BitConfig(**{**plain, **arguments})
    return randomise(transformers.BitForImageClassification(config), seed)


HF_CASES = {
    "preactivation": {},
    "bottleneck": {"layer_type": "bottleneck"},
    "groups": {"num_groups": 8},
    "gray": {"num_channels": 1},
}


def pixels(size, channels=3, seed=7):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (2, *size, channels), np.uint8)


def scaled(image):
    return (np.float32(image) - 127.5) / 127.5


def their_outputs(model, image):
    """Returns "pooled" of timm or transformers, and "logits" if there is a head."""
    x = torch.from_numpy(scaled(image).transpose(0, 3, 1, 2))
    with torch.no_grad():
        if isinstance(model, ResNetV2):
            features = model.forward_features(x)
            found = {"pooled": features.mean((2, 3))}
            return found | ({"logits": model(x)} if model.num_classes else {})
        body = getattr(model, "bit", model)
        found = {"pooled": body(x).pooler_output[:, :, 0, 0]}
        return found if body is model else found | {"logits": model(x).logits}


def our_outputs(model, variables, image):
    params = trees.unflatten(variables)
    return jax.jit(lambda p, x: model.apply({"params": p}, x))(params, image)


def worst(ours, theirs):
    return max(relative_difference(ours[name], theirs[name]) for name in theirs)


def weights_of(model, config):
    arrays = {n: t.detach().numpy().copy() for n, t in model.state_dict().items()}
    return Weights(arrays=arrays, path="file", config=config)


def read(found, size=EVEN):
    """Returns (format, architecture, our variables) of weights, known by content."""
    form = foreign.recognise(found)
    architecture = form.architecture(found)
    return form, architecture, formats.load(found, form, architecture, size)


def load_strictly(model, arrays):
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", TIMM_CASES)
def test_timms_weights_give_timms_numbers(case, size):
    arguments, config = TIMM_CASES[case]
    theirs = timm_model(**arguments)
    _, found, variables = read(weights_of(theirs, config), SIZES[size])
    image = pixels(SIZES[size], found.channels)
    assert (
        worst(our_outputs(found.model, variables, image), their_outputs(theirs, image))
        < BOUND
    )


@pytest.mark.parametrize("case", TIMM_CASES)
def test_ours_to_timm_and_back_is_bit_for_bit(case):
    arguments, config = TIMM_CASES[case]
    theirs = timm_model(**arguments)
    form, found, _ = read(weights_of(theirs, config))
    model, channels = found.model, found.channels
    variables = random_variables(model, EVEN, channels, seed=3)
    arrays = mapping.write(form.entries(model, EVEN), variables)
    load_strictly(theirs, arrays)
    image = pixels(EVEN, channels)
    ours = our_outputs(model, variables, image)
    assert worst(ours, their_outputs(theirs, image)) < BOUND
    _, again, back = read(weights_of(theirs, config))
    assert again.model == model
    for name, array in variables.items():
        np.testing.assert_array_equal(back[name], array)


EXPRESSIBLE = {
    "two stages": BiT(stages=(3, 4), width=32, head=Classifier(num_classes=CLASSES)),
    "two stages of 152 layers": BiT(stages=(3, 8), width=32),
    "wide": BiT(stages=(3,), width=96, head=Classifier(num_classes=CLASSES)),
    "basic": BiT(
        stages=(3, 4),
        width=32,
        block=Block.BASIC,
        head=Classifier(num_classes=CLASSES),
    ),
}


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_timm_builds_by_name_what_is_described(case):
    model = EXPRESSIBLE[case]
    form = export.find(model, Library.TIMM)
    described = form.describe(model, EVEN)
    # As config.json holds it.
    described = json.loads(json.dumps(described))
    theirs = timm.create_model(described["architecture"], **described["model_args"])
    variables = random_variables(model, EVEN)
    load_strictly(theirs, mapping.write(form.entries(model, EVEN), variables))
    image = pixels(EVEN)
    ours = our_outputs(model, variables, image)
    assert worst(ours, their_outputs(theirs, image)) < BOUND
    _, found, back = read(weights_of(theirs, described))
    assert found.model == model and not found.notes
    for name, array in variables.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", HF_CASES)
def test_huggingface_weights_give_their_numbers(case, size):
    theirs = huggingface_model(**HF_CASES[case])
    found = weights_of(theirs, theirs.config.to_dict())
    _, architecture, variables = read(found, SIZES[size])
    image = pixels(SIZES[size], architecture.channels)
    ours = our_outputs(architecture.model, variables, image)
    assert worst(ours, their_outputs(theirs, image)) < BOUND


HF_MODELS = {
    "preactivation": BiT(
        stages=(1, 2), width=32, groups=8, head=Classifier(num_classes=CLASSES)
    ),
    "no head": BiT(stages=(2,), width=32),
    "five stages": BiT(stages=(1,) * 5, width=8, groups=4),
    "bottleneck": BiTV1(
        trunk=Trunk(stages=(1, 2), width=32, groups=8, **TORCH_FORM),
        head=Classifier(num_classes=CLASSES),
    ),
    "bottleneck, no head": BiTV1(trunk=Trunk(stages=(1, 1), width=32, **TORCH_FORM)),
}


@pytest.mark.parametrize("case", HF_MODELS)
def test_ours_to_huggingface_and_back_is_bit_for_bit(case, tmp_path):
    model = HF_MODELS[case]
    form = export.find(model, Library.HUGGINGFACE)
    described = form.describe(model, EVEN)
    (tmp_path / "config.json").write_text(json.dumps(described))
    config = transformers.BitConfig.from_pretrained(tmp_path)
    theirs = getattr(transformers, described["architectures"][0])(config)
    variables = random_variables(model, EVEN)
    load_strictly(theirs, mapping.write(form.entries(model, EVEN), variables))
    image = pixels((128, 128) if "five" in case else EVEN)
    ours = our_outputs(model, variables, image)
    assert worst(ours, their_outputs(theirs, image)) < BOUND
    _, found, back = read(weights_of(theirs, config.to_dict()))
    assert found.model == model
    for name, array in variables.items():
        np.testing.assert_array_equal(back[name], array)
