"""ViTs of timm in our terms and ours in timm's: the same numbers both ways."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_libraries
from foreign_models import randomise, relative_difference

from big_vision_lite import trees
from big_vision_lite.conversion import foreign, formats, mapping, vit_timm
from big_vision_lite.conversion.formats import Weights
from big_vision_lite.models.vit import ViT

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
timm = pytest.importorskip("timm")

BOUND = 1e-5  # max |difference| / max |value|, float32 on the CPU
TINY = dict(embed_dim=32, depth=3, num_heads=4, num_classes=7)
SQUARE = dict(img_size=48, patch_size=8)
ODD = dict(img_size=35, patch_size=7)
WIDE = dict(img_size=(16, 40), patch_size=8)
LARGE = dict(img_size=224, patch_size=16)

# {what: (timm's name, its arguments)}
CASES = {
    "token, 224": ("vit_tiny_patch16_224", LARGE),
    "token, odd": ("vit_tiny_patch16_224", ODD),
    "token, not square": ("vit_tiny_patch16_224", WIDE),
    "token, tanh": ("vit_tiny_patch16_224", SQUARE | dict(act_layer="gelu_tanh")),
    "token, no position": (
        "vit_tiny_patch16_224",
        SQUARE | dict(pos_embed="none", reg_tokens=2),
    ),
    "token, class without position": (
        "vit_tiny_patch16_224",
        ODD | dict(no_embed_class=True),
    ),
    "token, norm after pooling": ("vit_tiny_patch16_224", ODD | dict(fc_norm=True)),
    "token, no head": ("vit_tiny_patch16_224", SQUARE | dict(num_classes=0)),
    "qk norm": ("vit_tiny_patch16_224", SQUARE | dict(qk_norm=True)),
    "average, class token unread": (
        "vit_tiny_patch16_224",
        WIDE | dict(global_pool="avg"),
    ),
    "average, class token and registers unread": (
        "vit_tiny_patch16_224",
        ODD | dict(global_pool="avg", reg_tokens=3, fc_norm=False),
    ),
    "average, norm after pooling": (
        "vit_tiny_patch16_224",
        ODD | dict(global_pool="avg", class_token=False),
    ),
    "average, gap": ("vit_medium_patch16_gap_240", WIDE),
    "average, gap with registers": ("vit_medium_patch16_reg4_gap_256", SQUARE),
    "average, positions of registers": ("vit_so150m2_patch16_reg1_gap_256", WIDE),
    "attention, siglip": ("vit_base_patch16_siglip_224", LARGE),
    "attention, siglip tanh": ("vit_so400m_patch16_siglip_256", WIDE),
    "attention, registers": ("vit_so150m_patch16_reg4_map_256", ODD),
    "deit": ("deit_tiny_patch16_224", ODD),
    "deit distilled": ("deit_tiny_distilled_patch16_224", WIDE),
    "deit distilled, odd": ("deit_tiny_distilled_patch16_224", ODD),
    "deit distilled, no head": (
        "deit_tiny_distilled_patch16_224",
        SQUARE | dict(num_classes=0),
    ),
    "deit3": ("deit3_small_patch16_224", LARGE),
    "dinov2": ("vit_small_patch14_dinov2", ODD),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", WIDE),
    "dinov2 giant": ("vit_giant_patch14_dinov2", ODD),
    "dinov2 giant registers": ("vit_giant_patch14_reg4_dinov2", WIDE),
    "flexivit": ("flexivit_small", ODD),
}


@functools.cache
def their_model(case, channels=3):
    name, arguments = CASES[case]
    arguments = {**TINY, **arguments}
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, in_chans=channels, **arguments)
    return randomise(model, seed=len(case))


def weights_of(model, **config):
    arrays = {n: t.detach().numpy().copy() for n, t in model.state_dict().items()}
    return Weights(arrays=arrays, path="file", config=config)


def config_of(case):
    name, arguments = CASES[case]
    return {"architecture": name, "model_args": {**TINY, **arguments}}


@functools.cache
def imported(case):
    """Returns the format, the architecture and our variables of a case."""
    weights = weights_of(their_model(case), **config_of(case))
    form = foreign.recognise(weights)
    architecture = form.architecture(weights)
    size = image_size(case)
    variables = formats.load(
        weights, form, dataclasses.replace(architecture, image_size=size), size
    )
    return form, architecture, variables


def image_size(case):
    size = CASES[case][1]["img_size"]
    return (size, size) if isinstance(size, int) else size


def images(size, channels=3):
    rng = np.random.default_rng(0)
    return rng.uniform(0, 255, (2, *size, channels)).astype(np.float32)


def our_outputs(model, variables, image):
    params = trees.unflatten({n: jnp.asarray(a) for n, a in variables.items()})
    run = jax.jit(lambda params, image: model.apply({"params": params}, image))
    return {n: np.asarray(a) for n, a in run(params, image).items()}


def their_outputs(model, image):
    x = torch.from_numpy((image - 127.5) / np.float32(127.5)).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = model.forward_head(features, pre_logits=True)
        logits = model.forward_head(features)
    return {"pooled": pooled.numpy(), "logits": logits.numpy()}


def differences(ours, theirs):
    names = [name for name in ("pooled", "logits") if name in ours]
    return {name: relative_difference(ours[name], theirs[name]) for name in names}


@pytest.mark.parametrize("case", CASES)
def test_weights_of_timm_give_their_logits_here(case):
    form, architecture, variables = imported(case)
    image = images(image_size(case))
    ours = our_outputs(architecture.model, variables, image)
    found = differences(ours, their_outputs(their_model(case), image))
    print(f"{case}: {found}")
    assert max(found.values()) <= BOUND
    assert form.model is ViT and not architecture.notes
    assert architecture.image_size in (image_size(case), None)


@pytest.mark.parametrize("case", CASES)
def test_our_weights_give_our_logits_in_timm_and_come_back_the_same(case):
    _, architecture, variables = imported(case)
    model, size = architecture.model, image_size(case)
    form = vit_timm.FORMATS[0]
    described = json.loads(json.dumps(form.describe(model, size)))
    arrays = mapping.write(form.entries(model, size), variables)
    theirs = timm.create_model(described["architecture"], **described["model_args"])
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    theirs.load_state_dict(state, strict=True)
    image = images(size)
    found = differences(
        our_outputs(model, variables, image), their_outputs(theirs.eval(), image)
    )
    print(f"{case}: {found}")
    assert max(found.values()) <= BOUND

    weights = Weights(arrays=arrays, path="file", config=described)
    again_form = foreign.recognise(weights)
    again = again_form.architecture(weights)
    assert again.model == model and again.image_size in (size, None)
    back = formats.load(weights, again_form, again, size)
    assert back.keys() == variables.keys()
    for name, array in variables.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
