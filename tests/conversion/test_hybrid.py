"""Hybrid vision transformers: timm and vision_transformer's npz, the same numbers."""

import json

import jax
import numpy as np
import pytest
import torch_libraries
from big_vision_bit import grid, random_variables, trunk_arrays
from conversion_cases.bit import TORCH_FORM
from conversion_cases.case import CLASSES, EVEN, NOT_SQUARE, ODD
from conversion_cases.hybrid import hybrid_config, timm_hybrid
from foreign_models import randomise, relative_difference
from tiers import PUBLISHED, SLOW, few

from big_vision_lite import trees
from big_vision_lite.conversion import export, files, formats
from big_vision_lite.conversion.families import hybrid as hybrid_formats
from big_vision_lite.conversion.formats import Library
from big_vision_lite.models import vit_variants
from big_vision_lite.models.bit_v1 import Standardisation, Trunk
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT
from big_vision_lite.models.vit_variants import hybrid

torch = pytest.importorskip("torch")
torch_libraries.import_torchvision()
timm = pytest.importorskip("timm")
pytest.importorskip("transformers")
import both_sides  # noqa: E402
from both_sides import BOUND, our_outputs, pixels, weights_of  # noqa: E402
from timm.layers.std_conv import StdConv2dSame  # noqa: E402

pytestmark = pytest.mark.parity

WIDTH, DEPTH, HEADS = 32, 2, 2
# The grid has ceil(side / 8) cells a side.
SIZES = {"even": EVEN, "odd": ODD, "not square": NOT_SQUARE}
NPZ, TIMM = hybrid_formats.FORMATS


def scaled(image):
    return (np.float32(image) - 127.5) / 127.5


def their_outputs(model, image):
    return both_sides.their_outputs(model, scaled(image))


def worst(ours, theirs):
    return max(relative_difference(ours[name], theirs[name]) for name in theirs)


def cells(size):
    return -(-size[0] // 8), -(-size[1] // 8)


def read(found, size=EVEN):
    found = both_sides.read(found, size)
    return found.form, found.architecture, found.variables


def test_weights_without_a_configuration_are_read_as_square():
    theirs = randomise(timm_hybrid(), seed=1)
    told = {"model_args": {"num_heads": HEADS}}
    _, found, _ = read(weights_of(theirs, told))
    assert found.image_size_px == EVEN
    assert any("gelu_erf" in each.words for each in found.assumptions)


@pytest.mark.parametrize("place", ["even", "odd"])
def test_positions_of_the_class_token_are_folded_into_it(place):
    theirs = randomise(timm_hybrid(SIZES[place]), seed=1)
    _, found, variables = read(
        weights_of(theirs, hybrid_config(SIZES[place])), SIZES[place]
    )
    assert both_sides.worst(found.model, variables, theirs, SIZES[place]) < BOUND


def archive(stages=(1, 2), count=64, seed=4):
    """Returns the arrays of a vision_transformer hybrid, by its own names."""
    rng = np.random.default_rng(seed)
    arrays = trunk_arrays(stages, seed=seed)

    def dense(name, rows, columns):
        kernel = rng.normal(size=(*rows, *columns)) / np.sqrt(np.prod(rows))
        arrays[f"{name}/kernel"] = np.float32(kernel)
        arrays[f"{name}/bias"] = np.float32(rng.normal(scale=0.3, size=columns))

    def norm(name):
        scale = rng.uniform(0.5, 1.5, WIDTH) * rng.choice((-1, 1), WIDTH)
        arrays[f"{name}/scale"] = np.float32(scale)
        arrays[f"{name}/bias"] = np.float32(rng.normal(scale=0.3, size=WIDTH))

    features = 4 * 32 * 2 ** (len(stages) - 1)
    dense("embedding", (1, 1, features), (WIDTH,))
    arrays["cls"] = np.float32(rng.normal(scale=0.5, size=(1, 1, WIDTH)))
    positions = rng.normal(scale=0.5, size=(1, 1 + count, WIDTH))
    arrays["Transformer/posembed_input/pos_embedding"] = np.float32(positions)
    heads = (HEADS, WIDTH // HEADS)
    for index in range(DEPTH):
        block = f"Transformer/encoderblock_{index}"
        norm(f"{block}/LayerNorm_0")
        norm(f"{block}/LayerNorm_2")
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            dense(f"{attention}/{part}", (WIDTH,), heads)
        dense(f"{attention}/out", heads, (WIDTH,))
        dense(f"{block}/MlpBlock_3/Dense_0", (WIDTH,), (4 * WIDTH,))
        dense(f"{block}/MlpBlock_3/Dense_1", (4 * WIDTH,), (WIDTH,))
    norm("Transformer/encoder_norm")
    dense("head", (WIDTH,), (CLASSES,))
    return arrays


class BigVisionConv(StdConv2dSame):
    """timm's, with the constant outside the root."""

    def forward(self, x):
        kernel = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        std = kernel.pow(2).mean((1, 2, 3), keepdim=True).sqrt()
        if self.same_pad:
            x = timm.layers.pad_same(x, self.kernel_size, self.stride, self.dilation)
        return torch.nn.functional.conv2d(
            x, kernel / (std + 1e-5), None, self.stride, self.padding
        )


def as_vision_transformer(model):
    """Gives the trunk of a timm hybrid the constants of vision_transformer."""
    for module in model.patch_embed.backbone.modules():
        if isinstance(module, StdConv2dSame):
            module.__class__ = BigVisionConv
        elif isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-6
    return model


def saved(tmp_path, arrays, size=EVEN):
    np.savez(tmp_path / "model.npz", **arrays)
    config = json.dumps({"image_size": list(size)})
    (tmp_path / "config.json").write_text(config)
    return str(tmp_path / "model.npz")


def timm_from(path, size=EVEN):
    """Returns a timm hybrid filled by timm's own loader of archives."""
    model = timm_hybrid(size)
    model.load_pretrained(path)
    return model.eval()


@pytest.mark.parametrize(
    "size, square",
    [
        ("even", True),
        ("odd", False),
        pytest.param("even", False, marks=SLOW),
        pytest.param("not square", False, marks=SLOW),
    ],
)
def test_archives_give_the_numbers_of_timms_own_loader(tmp_path, size, square):
    size = SIZES[size]
    rows, columns = cells(size)
    arrays = {
        name: array[None, None, None] if square and "/gn" in f"/{name}" else array
        for name, array in archive(count=rows * columns).items()
    }
    path = saved(tmp_path, arrays, size)
    form, found, variables = read(files.read(path), size)
    assert form == NPZ and found.image_size_px == (8 * rows, 8 * columns)
    image = pixels(size)
    # timm's own form: the same weights with its constants.
    theirs = timm_from(path, size)
    timms = found.model.clone(stem=found.model.stem.clone(**TORCH_FORM))
    ours = our_outputs(timms, variables, image)
    assert worst(ours, their_outputs(theirs, image)) < BOUND
    # What vision_transformer computes.
    ours = our_outputs(found.model, variables, image)
    theirs = their_outputs(as_vision_transformer(theirs), image)
    assert worst(ours, theirs) < BOUND


def test_the_trunk_gives_the_numbers_of_its_definition():
    arrays = trunk_arrays((1, 2))
    trunk = Trunk(stages=(1, 2), width=32)
    plain = {
        name.replace("unit", "unit0").replace("/unit", "_unit"): array
        for name, array in arrays.items()
    }
    image = scaled(pixels(SIZES["not square"]))
    ours = jax.jit(trunk.apply)({"params": trees.unflatten(plain)}, image)
    assert relative_difference(ours, grid(arrays, image)) < BOUND


def test_an_archive_of_timms_names_has_other_constants_than_one_of_big_visions(
    tmp_path,
):
    arrays = archive()
    for name in arrays:
        # Where constants show: small kernels before, small outputs after a norm.
        if name.startswith(("conv_root", "block")) and name.endswith("kernel"):
            arrays[name] = arrays[name] * np.float32(0.1)
    path = saved(tmp_path, arrays)
    _, found, variables = read(files.read(path))
    assert found.model.stem.standardisation == Standardisation.OUTSIDE_ROOT
    assert found.model.stem.norm_epsilon == 1e-6
    image = pixels(EVEN)
    ours = our_outputs(found.model, variables, image)
    theirs = timm_from(path)
    assert worst(ours, their_outputs(theirs, image)) > BOUND
    right = as_vision_transformer(theirs)
    assert worst(ours, their_outputs(right, image)) < BOUND


def test_torchs_padding_in_the_trunk_shows_at_even_sizes_only():
    for size in ("odd", "even"):
        theirs = randomise(timm_hybrid(SIZES[size], same=False), seed=1)
        found = weights_of(theirs, hybrid_config(SIZES[size]))
        _, architecture, variables = read(found, SIZES[size])
        image = pixels(SIZES[size])
        ours = our_outputs(architecture.model, variables, image)
        difference = worst(ours, their_outputs(theirs, image))
        assert (difference < BOUND) == (size == "odd")
        assert size == "odd" or difference > 100 * BOUND


def test_ours_to_archives_and_back_is_bit_for_bit(tmp_path):
    model = ViT(
        width=WIDTH,
        depth=DEPTH,
        mlp_dim=4 * WIDTH,
        num_heads=HEADS,
        patch_size=1,
        pooling=Pooling.CLASS_TOKEN,
        positions=Positions.LEARNED,
        head=Classifier(num_classes=CLASSES),
        stem=Trunk(stages=(1, 2), width=32),
    )
    form = export.find(model, Library.NPZ, EVEN)
    assert form == NPZ
    variables = random_variables(model, EVEN)
    written = formats.write(form, model, EVEN, variables)
    wanted = {name: array.shape for name, array in archive().items()}
    assert {name: array.shape for name, array in written.items()} == wanted
    _, found, back = read(files.read(saved(tmp_path, written)))
    assert found.model == model
    for name, array in variables.items():
        np.testing.assert_array_equal(back[name], array)


NAMES = {
    "R+Ti/16": "vit_tiny_r_s16_p8_224",
    "R26+S/32": "vit_small_r26_s32_224",
    "R50+B/16": "vit_base_r50_s16_224",
    "R50+L/32": "vit_large_r50_s32_224",
}


@pytest.mark.parametrize("size", few(vit_variants.SIZES, "R+Ti/16", marks=PUBLISHED))
def test_published_sizes_have_as_many_parameters_as_timms(size):
    model = hybrid(size, head=Classifier(num_classes=1000))
    shapes = formats.shapes(model, (224, 224), 3)
    ours = sum(int(np.prod(shape)) for shape in shapes.values())
    with torch.device("meta"):
        # Otherwise the class token has a position, which here is part of it.
        theirs = timm.create_model(NAMES[size], no_embed_class=True, num_classes=1000)
    assert ours == sum(p.numel() for p in theirs.parameters())


@pytest.mark.slow
@pytest.mark.published
def test_r26_s_32_at_224_gives_the_numbers_of_timm():
    name = NAMES["R26+S/32"]
    theirs = randomise(timm.create_model(name), seed=5)
    _, found, variables = read(weights_of(theirs, {"architecture": name}), (224, 224))
    assert found.model == hybrid(
        "R26+S/32",
        head=Classifier(num_classes=1000),
        activation=found.model.activation,
        standardisation=Standardisation.INSIDE_ROOT,
        trunk_norm_epsilon=1e-5,
    )
    image = pixels((224, 224))
    ours = our_outputs(found.model, variables, image)
    assert worst(ours, their_outputs(theirs, image)) < BOUND


def test_unknown_hybrids_are_refused_with_those_that_are():
    with pytest.raises(ValueError, match="R26"):
        hybrid("R26+B/32")
