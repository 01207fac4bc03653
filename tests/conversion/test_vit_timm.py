"""ViTs of timm in our terms and ours in timm's: the same numbers both ways."""

import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch_libraries
from big_vision_bit import random_variables
from conversion_cases import THEIRS
from conversion_cases.case import Ours
from conversion_cases.vit_timm import SEVEN as ODD
from conversion_cases.vit_timm import TINY_VIT as TINY
from foreign_models import randomise, relative_difference
from tiers import PUBLISHED, few

from big_vision_lite.conversion import foreign, formats
from big_vision_lite.conversion.families import vit_timm
from big_vision_lite.conversion.formats import Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models import vit_variants
from big_vision_lite.models.blocks import patches
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions, sincos
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT
from big_vision_lite.runs import init

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
timm = pytest.importorskip("timm")
for library in ("torchvision", "transformers"):
    pytest.importorskip(library)
import both_sides  # noqa: E402
from both_sides import BOUND, weights_of, worst  # noqa: E402


@functools.cache
def imported(case):
    return both_sides.imported(f"timm ViT, {case}", None)


def sprung(case, *, model=None, **changed):
    """Returns the largest difference after changing the model or some variables."""
    found = imported(case)
    variables = {**found.variables, **changed}
    size = THEIRS[f"timm ViT, {case}"].sizes[0]
    return worst(model or found.model, variables, found.theirs, size)


@pytest.mark.parametrize("case", ["token, odd", "token, tanh", "attention, siglip"])
def test_the_other_form_of_gelu_misses_the_bound(case):
    model = imported(case).model
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
    told = {"architecture": "x", "model_args": {**TINY, **ODD}}
    found = both_sides.read(weights_of(theirs, told), (35, 35))
    assert worst(found.model, found.variables, theirs, (35, 35)) <= BOUND
    wrong = found.model.clone(norm_epsilon=epsilon)
    assert worst(wrong, found.variables, theirs, (35, 35)) > 3 * BOUND


@pytest.mark.parametrize(
    ("case", "theirs", "ours"),
    [
        ("token, odd", "cls_token", "class_token"),
        ("deit distilled", "dist_token", "distillation_token"),
        ("average, positions of registers", "reg_token", "registers"),
    ],
)
def test_a_token_without_its_position_misses_the_bound(case, theirs, ours):
    raw = imported(case).theirs.state_dict()[theirs].numpy()
    assert sprung(case) <= BOUND < sprung(case, **{ours: raw})


def test_another_order_of_query_key_and_value_misses_the_bound():
    variables = imported("token, odd").variables
    block = "encoder/block_00/attention"
    names = [f"{block}/{part}/kernel" for part in ("query", "key", "value")]
    q, k, v = (variables[name] for name in names)
    for order in ((k, v, q), (v, k, q)):
        assert sprung("token, odd", **dict(zip(names, order, strict=True))) > BOUND


@pytest.mark.parametrize("part", ["query", "key", "value", "out"])
def test_heads_flattened_in_the_other_order_miss_the_bound(part):
    name = f"encoder/block_00/attention/{part}/kernel"
    kernel = imported("token, odd").variables[name]
    heads, width = 4, 32
    if part == "out":  # [H, Dh, D]
        mixed = kernel.reshape(width // heads, heads, width).swapaxes(0, 1)
    else:  # [D, H, Dh]
        mixed = kernel.reshape(width, width // heads, heads).swapaxes(1, 2)
    assert sprung("token, odd", **{name: mixed}) > BOUND


def test_rows_and_columns_of_patches_swapped_miss_the_bound():
    name = "patch_embedding/kernel"
    kernel = imported("token, odd").variables[name]
    assert sprung("token, odd", **{name: kernel.swapaxes(0, 1)}) > BOUND


def test_the_gate_of_swiglu_in_the_second_half_misses_the_bound():
    case, name = "dinov2 giant", "encoder/block_00/mlp/hidden"
    changed = {
        f"{name}/{leaf}": np.concatenate(
            np.split(imported(case).variables[f"{name}/{leaf}"], 2, axis=-1)[::-1],
            axis=-1,
        )
        for leaf in ("kernel", "bias")
    }
    assert sprung(case) <= BOUND < sprung(case, **changed)


def mae_sincos(rows, columns, width):
    """The table of MAE: frequencies that never reach 1 / 10000."""
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    y, x = np.mgrid[:rows, :columns].reshape(2, -1, 1) * frequencies
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)


def test_the_sincos_form_of_mae_is_another_one_and_misses_the_bound(tmp_path):
    # Measured at 14x14, width 384: up to 0.049 (protocols, section 17).
    difference = np.abs(sincos(14, 14, 384) - mae_sincos(14, 14, 384)).max()
    assert 0.04 < difference < 0.06

    model = ViT(
        **dict(width=32, depth=2, mlp_dim=64, num_heads=4, patch_size=8),
        head=Classifier(num_classes=7),
    )
    size = (16, 40)
    variables = random_variables(model, size)
    exported, theirs = both_sides.put(
        Ours(library=Library.TIMM, model=model, size=size), variables, tmp_path / "out"
    )
    assert worst(model, variables, theirs, size) <= BOUND
    with torch.no_grad():
        theirs.pos_embed.copy_(torch.from_numpy(mae_sincos(2, 5, 32))[None])
    assert worst(model, variables, theirs, size) > 3 * BOUND

    again = vit_timm.FORMATS[0].architecture(
        Weights(arrays=exported.arrays, path="file", config=exported.described)
    )
    assert again.model.positions == Positions.SINCOS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("blocks.1.mlp.fc1.bias"), "+ blocks.1.mlp.fc1.bias"),
        (lambda a: a.update(extra=np.zeros(3, np.float32)), "- extra"),
        (
            lambda a: a.update({"norm.bias": np.full(32, np.nan, np.float32)}),
            "norm.bias  holds NaN",
        ),
        (
            lambda a: a.update({"head.bias": np.zeros(9, np.float32)}),
            "gives head/bias (9,), the model has (7,)",
        ),
        (lambda a: a.update({"norm_pre.weight": np.zeros(32, np.float32)}), "(CLIP)"),
        (
            lambda a: a.update(pos_embed=np.zeros((1, 24, 32), np.float32)),
            "make no square",
        ),
        (lambda a: a.update(pos_embed=np.zeros((1, 10, 32), np.float32)), None),
    ],
)
def test_weights_that_are_not_those_of_the_format_are_refused_by_name(change, words):
    weights = weights_of(imported("token, odd").theirs, {"model_args": TINY})
    change(weights.arrays)

    def load():
        form = foreign.recognise(weights)
        architecture = form.architecture(weights)
        size = architecture.image_size_px or (35, 35)
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
    assert architecture.image_size_px == (224, 224)
    assert len(architecture.assumptions) == 2
    assert "num_heads=3 assumed" in architecture.assumptions[0].words
    assert "gelu_erf assumed" in architecture.assumptions[1].words
    narrow = timm.create_model("vit_tiny_patch16_224", **TINY | dict(num_heads=2))
    with pytest.raises(ValueError, match='"num_heads"'):
        vit_timm.FORMATS[0].architecture(weights_of(narrow))


def test_a_vit_that_only_its_name_tells_apart_is_refused():
    theirs = timm.create_model("vit_base_patch16_rpn_224", depth=1, num_classes=3)
    weights = weights_of(theirs, {"architecture": "vit_base_patch16_rpn_224"})
    with pytest.raises(ValueError, match="normalises after each branch"):
        foreign.recognise(weights).architecture(weights)


def test_images_that_are_no_multiple_of_patches_become_the_next_smaller_ones():
    theirs = timm.create_model("vit_so400m_patch14_siglip_384", depth=1)
    weights = weights_of(theirs, {"architecture": "vit_so400m_patch14_siglip_384"})
    weights.config["pretrained_cfg"] = {"input_size": [3, 384, 384]}
    architecture = vit_timm.FORMATS[0].architecture(weights)
    assert architecture.image_size_px == (378, 378)
    assert "384x384 px are no multiple" in architecture.assumptions[-1].words


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

    size = found.image_size_px or (224, 224)
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
    assert init.model_differences(tower, found) == []
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
    weights = weights_of(theirs, {"architecture": name})
    form = foreign.recognise(weights)
    architecture = form.architecture(weights)
    size = architecture.image_size_px
    variables = formats.load(weights, form, architecture, size)
    found = worst(architecture.model, variables, theirs, size)
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
