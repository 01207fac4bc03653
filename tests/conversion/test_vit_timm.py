"""ViTs of timm in our terms and ours in timm's: the same numbers both ways."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_libraries
from foreign_models import randomise, relative_difference
from tiers import PUBLISHED, few

from big_vision_lite import trees
from big_vision_lite.conversion import export, foreign, formats
from big_vision_lite.conversion.families import vit_timm
from big_vision_lite.conversion.formats import Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models import vit_variants
from big_vision_lite.models.blocks import patches
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions, sincos
from big_vision_lite.models.blocks.pooling import FinalNorm, Pooling
from big_vision_lite.models.vit import ViT
from big_vision_lite.runs import init as adapt

pytestmark = pytest.mark.parity

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


# One of each pooling and of each family.
FEW = (
    *("token, odd", "average, gap with registers", "attention, siglip"),
    *("deit distilled", "deit3", "dinov2", "qk norm", "token, no head"),
)


@pytest.mark.parametrize("case", few(CASES, *FEW))
def test_our_weights_give_our_logits_in_timm_and_come_back_the_same(case):
    _, architecture, variables = imported(case)
    model, size = architecture.model, image_size(case)
    form = vit_timm.FORMATS[0]
    described = json.loads(json.dumps(form.describe(model, size, 3)))
    arrays = formats.write(form, model, size, variables)
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


def sprung(case, *, model=None, **changed):
    """Returns the largest difference after changing the model or some variables."""
    _, architecture, variables = imported(case)
    image = images(image_size(case))
    ours = our_outputs(model or architecture.model, {**variables, **changed}, image)
    return max(differences(ours, their_outputs(their_model(case), image)).values())


@pytest.mark.parametrize("case", ["token, odd", "token, tanh", "attention, siglip"])
def test_the_other_form_of_gelu_misses_the_bound(case):
    model = imported(case)[1].model
    other = {
        Activation.GELU_ERF: Activation.GELU_TANH,
        Activation.GELU_TANH: Activation.GELU_ERF,
    }[model.activation]
    assert sprung(case) <= BOUND
    assert sprung(case, model=model.clone(activation=other)) > 3 * BOUND


@pytest.mark.parametrize("epsilon", [1e-5, 1e-12])
def test_another_epsilon_of_the_layer_norms_misses_the_bound(epsilon):
    theirs = timm.create_model("vit_tiny_patch16_224", **TINY, **ODD)
    theirs = randomise(theirs, seed=1)
    with torch.no_grad():  # small activations, as after a usual initialisation
        for tensor in (*theirs.patch_embed.parameters(), theirs.cls_token):
            tensor.mul_(0.02)
        theirs.pos_embed.mul_(0.02)
    weights = weights_of(theirs, architecture="x", model_args={**TINY, **ODD})
    form = foreign.recognise(weights)
    architecture = form.architecture(weights)
    variables = formats.load(weights, form, architecture, (35, 35))
    image = images((35, 35))
    expected = their_outputs(theirs, image)
    model = architecture.model
    right = differences(our_outputs(model, variables, image), expected)
    assert max(right.values()) <= BOUND
    wrong = our_outputs(model.clone(norm_epsilon=epsilon), variables, image)
    assert max(differences(wrong, expected).values()) > 3 * BOUND


@pytest.mark.parametrize(
    ("case", "theirs", "ours"),
    [
        ("token, odd", "cls_token", "class_token"),
        ("deit distilled", "dist_token", "distillation_token"),
        ("average, positions of registers", "reg_token", "registers"),
    ],
)
def test_a_token_without_its_position_misses_the_bound(case, theirs, ours):
    raw = their_model(case).state_dict()[theirs].numpy()
    assert sprung(case) <= BOUND < sprung(case, **{ours: raw})


def test_another_order_of_query_key_and_value_misses_the_bound():
    variables = imported("token, odd")[2]
    block = "encoder/block_00/attention"
    names = [f"{block}/{part}/kernel" for part in ("query", "key", "value")]
    q, k, v = (variables[name] for name in names)
    for order in ((k, v, q), (v, k, q)):
        assert sprung("token, odd", **dict(zip(names, order, strict=True))) > BOUND


@pytest.mark.parametrize("part", ["query", "key", "value", "out"])
def test_heads_flattened_in_the_other_order_miss_the_bound(part):
    name = f"encoder/block_00/attention/{part}/kernel"
    kernel = imported("token, odd")[2][name]
    heads, width = 4, 32
    if part == "out":  # [H, Dh, D]
        mixed = kernel.reshape(width // heads, heads, width).swapaxes(0, 1)
    else:  # [D, H, Dh]
        mixed = kernel.reshape(width, width // heads, heads).swapaxes(1, 2)
    assert sprung("token, odd", **{name: mixed}) > BOUND


def test_rows_and_columns_of_patches_swapped_miss_the_bound():
    name = "patch_embedding/kernel"
    kernel = imported("token, odd")[2][name]
    assert sprung("token, odd", **{name: kernel.swapaxes(0, 1)}) > BOUND


def test_the_gate_of_swiglu_in_the_second_half_misses_the_bound():
    case, name = "dinov2 giant", "encoder/block_00/mlp/hidden"
    changed = {
        f"{name}/{leaf}": np.concatenate(
            np.split(imported(case)[2][f"{name}/{leaf}"], 2, axis=-1)[::-1], axis=-1
        )
        for leaf in ("kernel", "bias")
    }
    assert sprung(case) <= BOUND < sprung(case, **changed)


def mae_sincos(rows, columns, width):
    """The table of MAE: frequencies that never reach 1 / 10000."""
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    y, x = np.mgrid[:rows, :columns].reshape(2, -1, 1) * frequencies
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)


def test_the_sincos_form_of_mae_is_another_one_and_misses_the_bound():
    # Measured at 14x14, width 384: up to 0.049 (protocols, section 17).
    difference = np.abs(sincos(14, 14, 384) - mae_sincos(14, 14, 384)).max()
    assert 0.04 < difference < 0.06

    model = ViT(
        **dict(width=32, depth=2, mlp_dim=64, num_heads=4, patch_size=8),
        head=Classifier(num_classes=7),
    )
    size = (16, 40)
    variables = random_variables(model, size)
    theirs, arrays = to_timm(model, variables, size)
    image = images(size)
    ours = our_outputs(model, variables, image)
    assert max(differences(ours, their_outputs(theirs, image)).values()) <= BOUND
    with torch.no_grad():
        theirs.pos_embed.copy_(torch.from_numpy(mae_sincos(2, 5, 32))[None])
    assert max(differences(ours, their_outputs(theirs, image)).values()) > 3 * BOUND

    config = vit_timm.FORMATS[0].describe(model, size, 3)
    again = vit_timm.FORMATS[0].architecture(
        Weights(arrays=arrays, path="file", config=config)
    )
    assert again.model.positions == Positions.SINCOS


def random_variables(model, size, channels=3, seed=0):
    """Parameters in general position: no zero head, no unit scale."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(0, 0.2, shape) + name.endswith("scale")).astype(np.float32)
        for name, shape in formats.shapes(model, size, channels).items()
    }


def to_timm(model, variables, size):
    form = vit_timm.FORMATS[0]
    described = form.describe(model, size, 3)
    arrays = formats.write(form, model, size, variables)
    theirs = timm.create_model(described["architecture"], **described["model_args"])
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    theirs.load_state_dict(state, strict=True)
    return theirs.eval(), arrays


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(pooling=Pooling.CLASS_TOKEN, positions=Positions.NONE),
        dict(pooling=Pooling.ATTENTION, positions=Positions.LEARNED, registers=2),
        dict(mlp_dim=43, activation=Activation.GELU_ERF, qk_norm=True),
        dict(final_norm=FinalNorm.POOLED, layer_scale=0.1, qkv_bias=False),
        dict(mlp_dim=43, activation=Activation.SWIGLU),
        dict(width=512, num_heads=8, depth=1),
        dict(width=48, num_heads=3, mean=(120.0, 110.0, 100.0)),
    ],
)
def test_a_vit_of_ours_leaves_for_timm_with_its_logits(fields):
    sizes = dict(width=32, depth=2, mlp_dim=64, num_heads=4, patch_size=8)
    model = ViT(**{**sizes, "head": Classifier(num_classes=7), **fields})
    size = (24, 24)
    variables = random_variables(model, size)
    theirs, _ = to_timm(model, variables, size)
    image = images(size)
    ours = our_outputs(model.clone(mean=(127.5,)), variables, image)
    assert max(differences(ours, their_outputs(theirs, image)).values()) <= BOUND


def test_one_channel_comes_and_goes():
    size = (16, 16)
    theirs = timm.create_model(
        "vit_tiny_patch16_224", in_chans=1, img_size=16, patch_size=8, **TINY
    )
    weights = weights_of(randomise(theirs, seed=3), model_args={**TINY})
    form = foreign.recognise(weights)
    architecture = form.architecture(weights)
    assert architecture.channels == 1
    variables = formats.load(weights, form, architecture, size)
    image = images(size, channels=1)
    ours = our_outputs(architecture.model, variables, image)
    assert max(differences(ours, their_outputs(theirs, image)).values()) <= BOUND


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(head=Classifier(num_classes=7, hidden_dim=5)), "head.hidden_dim"),
        (dict(norm_epsilon=1e-5), "norm_epsilon=1e-05"),
        (
            dict(activation=Activation.SWIGLU, pooling=Pooling.ATTENTION),
            "no SwiGLU",
        ),
        (
            dict(distillation_token=True, registers=1, pooling=Pooling.CLASS_TOKEN),
            "does not read registers",
        ),
    ],
)
def test_what_timm_has_no_counterpart_of_is_refused_with_what_to_do(fields, words):
    model = ViT(width=32, depth=1, mlp_dim=64, num_heads=4, patch_size=8, **fields)
    with pytest.raises(ValueError, match=re.escape(words)):
        export.find(model, Library.TIMM, (16, 16))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("blocks.1.mlp.fc1.bias"), "+ blocks.1.mlp.fc1.bias"),
        (lambda a: a.update(extra=np.zeros(3)), "- extra"),
        (
            lambda a: a.update({"norm.bias": np.full(32, np.nan)}),
            "norm.bias  holds NaN",
        ),
        (
            lambda a: a.update({"head.bias": np.zeros(9)}),
            "gives head/bias (9,), the model has (7,)",
        ),
        (lambda a: a.update({"norm_pre.weight": np.zeros(32)}), "(CLIP)"),
        (lambda a: a.update(pos_embed=np.zeros((1, 24, 32))), "make no square"),
        (lambda a: a.update(pos_embed=np.zeros((1, 10, 32))), None),
    ],
)
def test_weights_that_are_not_those_of_the_format_are_refused_by_name(change, words):
    weights = weights_of(their_model("token, odd"), model_args={**TINY})
    change(weights.arrays)

    def load():
        form = foreign.recognise(weights)
        architecture = form.architecture(weights)
        size = architecture.image_size or (35, 35)
        return formats.load(weights, form, architecture, size)

    if words is None:
        assert load()["position_embedding"].shape == (3, 3, 32)
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        load()


def test_what_is_assumed_without_a_configuration_is_said():
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=3)
    architecture = vit_timm.FORMATS[0].architecture(weights_of(theirs))
    assert architecture.model.num_heads == 3
    assert architecture.model.activation == Activation.GELU_ERF
    assert architecture.image_size == (224, 224)
    assert len(architecture.notes) == 2
    assert "num_heads=3 assumed" in architecture.notes[0]
    assert "gelu_erf assumed" in architecture.notes[1]
    narrow = timm.create_model("vit_tiny_patch16_224", **TINY | dict(num_heads=2))
    with pytest.raises(ValueError, match='"num_heads"'):
        vit_timm.FORMATS[0].architecture(weights_of(narrow))


def test_a_vit_that_only_its_name_tells_apart_is_refused():
    theirs = timm.create_model("vit_base_patch16_rpn_224", depth=1, num_classes=3)
    weights = weights_of(theirs, architecture="vit_base_patch16_rpn_224")
    with pytest.raises(ValueError, match="normalises after each branch"):
        foreign.recognise(weights).architecture(weights)


def test_images_that_are_no_multiple_of_patches_become_the_next_smaller_ones():
    theirs = timm.create_model("vit_so400m_patch14_siglip_384", depth=1)
    weights = weights_of(theirs, architecture="vit_so400m_patch14_siglip_384")
    weights.config["pretrained_cfg"] = {"input_size": [3, 384, 384]}
    architecture = vit_timm.FORMATS[0].architecture(weights)
    assert architecture.image_size == (378, 378)
    assert "384x384 px are no multiple" in architecture.notes[-1]


# timm's models with another architecture behind the same class.
OTHER = re.compile(
    "aimv2|beit3|test_vit[34]|"
    ".*(_clip_|_xp_|_rpn_|18x2|vit_d?pwee|vit_dwee|vit_dlittle|radio|intern300m)"
)
COUNTED = (
    *("vit_tiny_patch16_224", "vit_base_patch32_384", "vit_base_patch16_gap_224"),
    *("vit_medium_patch16_reg4_gap_256", "deit_tiny_distilled_patch16_224"),
    *("deit3_medium_patch16_224", "vit_small_patch14_dinov2", "flexivit_small"),
    *("vit_base_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"),
    *("vit_so150m2_patch16_reg1_gap_256", "vit_so400m_patch16_siglip_256"),
)


def every_vit():
    kinds = ("timm.models.vision_transformer", "timm.models.deit")
    names = timm.list_models()
    return [n for n in names if timm.models.model_entrypoint(n).__module__ in kinds]


def check_counts(name):
    """Compares heads, GELU and parameters with the constructor of timm."""
    with torch.device("meta"):
        theirs = timm.create_model(name)
    arrays = {  # zeros that take no memory
        n: np.broadcast_to(np.float32(0), tuple(t.shape))
        for n, t in theirs.state_dict().items()
    }
    images = {"pretrained_cfg": {"input_size": theirs.pretrained_cfg["input_size"]}}
    weights = Weights(arrays=arrays, path=name, config={"architecture": name, **images})
    form = foreign.recognise(weights)
    found = form.architecture(weights)
    model = found.model
    block = theirs.blocks[0]
    assert model.num_heads == block.attn.num_heads
    kind = {
        Activation.GELU_ERF: "GELU",
        Activation.GELU_TANH: "GELUTanh",
        Activation.SWIGLU: "SiLU",
    }
    assert type(block.mlp.act).__name__ == kind[model.activation]
    assert block.norm1.eps == model.norm_epsilon
    pools = {"avg": Pooling.AVERAGE, "token": Pooling.CLASS_TOKEN, "map": "attention"}
    assert model.pooling == pools[theirs.global_pool]

    size = found.image_size or (224, 224)
    shapes = formats.shapes(model, size, found.channels)
    entries = form.entries(model, size, shapes)
    assert {n for entry in entries for n in entry.theirs} == arrays.keys()
    ours = sum(int(np.prod(shape)) for shape in shapes.values())
    patches = (size[0] // model.patch_size) * (size[1] // model.patch_size)
    rows = arrays["pos_embed"].shape[1] - patches  # those of tokens, which are added
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert ours == count - rows * model.width
    return model


@pytest.mark.parametrize("name", few(COUNTED, "vit_tiny_patch16_224", marks=PUBLISHED))
def test_published_sizes_have_heads_gelu_and_parameters_of_timm(name):
    check_counts(name)


TOWERS = {
    "deit_tiny_patch16_224": vit_variants.deit("Ti/16"),
    "deit_tiny_distilled_patch16_224": vit_variants.deit("Ti/16", distilled=True),
    "deit3_medium_patch16_224": vit_variants.deit3("M/16"),
    "vit_small_patch14_dinov2": vit_variants.dinov2("S/14"),
    "vit_base_patch14_reg4_dinov2": vit_variants.dinov2("B/14", registers=4),
    "vit_giant_patch14_dinov2": vit_variants.dinov2("g/14"),
    # One of those that timm calculates with the GELU they were trained with.
    "vit_so400m_patch16_siglip_256": vit_variants.siglip("So400m/16"),
}


@pytest.mark.parametrize(
    "name", few(TOWERS, "vit_small_patch14_dinov2", marks=PUBLISHED)
)
def test_towers_have_the_gelu_and_constants_of_the_weights_they_are_named_after(name):
    tower, found = TOWERS[name], check_counts(name)
    assert adapt.model_differences(tower, found) == []
    assert (tower.layer_scale is None) == (found.layer_scale is None)
    # Its value is where training starts, of which weights say nothing.
    assert tower.clone(head=found.head, layer_scale=found.layer_scale) == found


@pytest.mark.slow
@pytest.mark.published
def test_every_vit_of_timm_has_its_heads_gelu_and_parameters_or_is_refused():
    names = every_vit()
    assert len(names) > 150
    refused = set()
    for name in names:
        try:
            check_counts(name)
        except ValueError:
            refused.add(name)
        except AssertionError as error:
            raise AssertionError(name) from error
    assert refused == {name for name in names if OTHER.match(name)}


@pytest.mark.slow
@pytest.mark.published
@pytest.mark.parametrize(
    "name",
    ["deit_small_patch16_224", "vit_small_patch14_reg4_dinov2"],
)
def test_a_published_size_gives_the_logits_of_timm(name):
    theirs = randomise(timm.create_model(name), seed=0)
    weights = weights_of(theirs, architecture=name)
    form = foreign.recognise(weights)
    architecture = form.architecture(weights)
    size = architecture.image_size
    variables = formats.load(weights, form, architecture, size)
    image = images(size)
    ours = our_outputs(architecture.model, variables, image)
    expected = their_outputs(theirs, image)
    found = relative_difference(ours["pooled"], expected["pooled"])
    print(f"{name}: {found}")
    assert found <= BOUND


def test_patch_kernels_are_resized_as_timm_resizes_those_of_flexivit():
    from timm.layers.patch_embed import resample_patch_embed

    kernel = np.random.default_rng(0).normal(size=(8, 8, 3, 5)).astype(np.float32)
    theirs = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    for patch in (5, 6, 8, 12, 16):
        resized = resample_patch_embed(
            theirs, [patch, patch], interpolation="bilinear", antialias=False
        )
        expected = resized.numpy().transpose(2, 3, 1, 0)
        ours = patches.resize_kernel(kernel, patch)
        assert relative_difference(ours, expected) <= 2e-6  # a pseudo-inverse
        other = resample_patch_embed(theirs, [patch, patch])  # bicubic, antialiased
        if patch != 8:
            other = other.numpy().transpose(2, 3, 1, 0)
            assert relative_difference(ours, other) > 1e-2


def resampled_forms(table, grid):
    """Returns the forms in use of resampling positions [h, w, D], by name."""
    import scipy.ndimage

    x = torch.from_numpy(table).permute(2, 0, 1)[None]
    zoom = (grid[0] / table.shape[0], grid[1] / table.shape[1], 1)

    def torch_form(**options):
        resized = torch.nn.functional.interpolate(x, size=grid, **options)
        return resized[0].permute(1, 2, 0).numpy()

    return {
        "flexivit": torch_form(mode="bilinear", antialias=True),
        "timm npz": torch_form(mode="bilinear"),
        "timm": torch_form(mode="bicubic", antialias=True),
        "mae": torch_form(mode="bicubic"),
        "big_vision": scipy.ndimage.zoom(table, zoom, order=1),
    }


@pytest.mark.parametrize("grid", [(5, 4), (9, 12)])
def test_forms_of_resampling_positions_are_told_apart(grid):
    table = np.random.default_rng(0).normal(size=(7, 7, 16)).astype(np.float32)
    ours = np.asarray(patches.resample_positions(jnp.asarray(table), grid))
    for name, form in resampled_forms(table, grid).items():
        difference = relative_difference(ours, form)
        enlarging = grid[0] > 7  # antialiasing changes nothing there
        if name == "flexivit" or (name == "timm npz" and enlarging):
            assert difference <= 1e-6, name
        else:
            assert difference > 1e-2, name


def test_a_flexivit_leaves_for_timm_at_the_size_it_is_exported_for():
    fields = dict(width=32, depth=2, mlp_dim=64, num_heads=4, patch_size=12)
    model = ViT(
        **fields,
        pooling=Pooling.CLASS_TOKEN,
        positions=Positions.LEARNED,
        head=Classifier(num_classes=7),
        kernel_patch_size=8,
        position_grid=(5, 5),
    )
    size = (36, 48)
    variables = random_variables(model, size)
    theirs, _ = to_timm(model, variables, size)
    image = images(size)
    ours = our_outputs(model, variables, image)
    assert max(differences(ours, their_outputs(theirs, image)).values()) <= BOUND
