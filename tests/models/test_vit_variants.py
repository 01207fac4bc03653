"""What published ViTs add to the plain one, without another library."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiers import few

from big_vision_lite import trees
from big_vision_lite.models import vit_variants
from big_vision_lite.models.blocks import patches
from big_vision_lite.models.blocks.attention import MultiHeadAttention
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import Dtype, LayerNorm
from big_vision_lite.models.blocks.mlp import Activation, Mlp
from big_vision_lite.models.blocks.patches import (
    PatchEmbedding,
    Positions,
    bilinear,
    resize_kernel,
)
from big_vision_lite.models.blocks.pooling import FinalNorm, Pooling
from big_vision_lite.models.vit import ViT

CLASSES = 5
PUBLISHED = (pytest.mark.slow, pytest.mark.published)


class Halves(nn.Module):
    """A stem: a convolution that halves the sides."""

    input_kernel: ClassVar = "conv/kernel"
    standardises_kernels: ClassVar = False

    @nn.compact
    def __call__(self, image, train):
        return nn.Conv(6, (2, 2), (2, 2), name="conv")(image)


TOKENS = dict(pooling=Pooling.CLASS_TOKEN, positions=Positions.LEARNED)
VARIANTS = {
    "gelu_erf": dict(activation=Activation.GELU_ERF),
    "swiglu": dict(activation=Activation.SWIGLU, layer_scale=0.5),
    "pooled norm": dict(final_norm=FinalNorm.POOLED, qkv_bias=False),
    "registers": dict(registers=3, qk_norm=True, pooling=Pooling.ATTENTION),
    "distilled": dict(distillation_token=True, **TOKENS),
    "stem": dict(patch_size=2, **TOKENS),
    "flexi": dict(kernel_patch_size=6, position_grid=(3, 3), **TOKENS),
}


def variant(name, **more):
    stem = {"stem": Halves()} if name == "stem" else {}
    fields = dict(width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=4)
    head = Classifier(num_classes=CLASSES)
    return ViT(**{**fields, "head": head, **VARIANTS[name], **stem, **more})


def pixels(batch, height, width, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, height, width, 3)
    return jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))


def random_params(model, image, seed=0):
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        value = rng.normal(0, 0.3, leaf.shape) + name.endswith("scale")
        return jnp.asarray(value, jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    return trees.map_named(draw, shapes)


def run(model, params, image):
    return jax.jit(lambda params, image: model.apply({"params": params}, image))(
        params, image
    )


@pytest.mark.parametrize("name", few(VARIANTS, "registers", "swiglu", "distilled"))
def test_a_gradient_reaches_every_parameter_of_a_variant(name):
    model, image = variant(name), pixels(2, 8, 12)
    params = random_params(model, image)

    def loss(params):
        logits = model.apply({"params": params}, image, train=True)["logits"]
        return jnp.sum(jnp.sin(logits * jnp.arange(1, CLASSES + 1)))

    for leaf, gradient in trees.flatten(jax.jit(jax.grad(loss))(params)).items():
        shared = "key_norm/bias" if model.qk_norm else "key/bias"
        if leaf.endswith((shared, "pooling/attention/key/bias")):
            continue  # softmax cancels what all keys share
        assert np.all(np.isfinite(gradient)), leaf
        assert np.abs(gradient).max() > 1e-6, leaf


@pytest.mark.parametrize(
    "name", few(VARIANTS, "gelu_erf", "pooled norm", "stem", "flexi")
)
def test_a_variant_has_the_outputs_of_the_contract_in_both_dtypes(name):
    image = pixels(2, 8, 12)
    model = variant(name)
    params = random_params(model, image)
    exact = run(model, params, image)
    rounded = run(variant(name, dtype=Dtype.BFLOAT16), params, image)
    assert exact["grid"].shape == (2, 2, 3, 16)
    assert rounded["grid"].dtype == jnp.bfloat16
    for output in ("pooled", "logits"):
        assert rounded[output].dtype == jnp.float32
        scale = np.abs(exact[output]).max()
        # bfloat16 keeps 8 bits; a handful of layers.
        np.testing.assert_allclose(rounded[output], exact[output], atol=0.08 * scale)


def test_what_is_off_makes_no_parameters():
    plain = ViT(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=4)
    names = trees.names(random_params(plain, pixels(1, 8, 8)))
    extra = ("_scale", "query_norm", "registers", "distillation", "stem", "pooled_norm")
    assert not [name for name in names if any(part in name for part in extra)]


def test_layer_scale_multiplies_each_branch():
    model, image = variant("swiglu"), pixels(2, 8, 8)
    params = trees.flatten(random_params(model, image))
    scales = [n for n in params if n.endswith(("attention_scale", "mlp_scale"))]
    assert len(scales) == 4
    # A branch scaled by s equals the branch with its last layer scaled by s.
    folded = dict(params)
    for name in scales:
        block, branch = name.rsplit("/", 1)
        out = f"{block}/{branch.removesuffix('_scale')}/out"
        for leaf in ("kernel", "bias"):
            folded[f"{out}/{leaf}"] = params[f"{out}/{leaf}"] * params[name]
        del folded[name]
    ours = run(model, trees.unflatten(params), image)["logits"]
    plain = run(model.clone(layer_scale=None), trees.unflatten(folded), image)["logits"]
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_queries_and_keys_are_normalised_within_each_head():
    attention = MultiHeadAttention(num_heads=2, qk_norm=True)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 8)), jnp.float32)
    variables = attention.init(jax.random.key(0), x, x)
    plain = attention.apply(variables, x, x)
    params = variables["params"]
    # A norm forgets the scale of what it normalises.
    scaled = {**params, "query": jax.tree.map(lambda a: 100 * a, params["query"])}
    np.testing.assert_allclose(
        attention.apply({"params": scaled}, x, x), plain, atol=1e-4
    )
    assert params["query_norm"]["scale"].shape == (4,)


@pytest.mark.parametrize(
    ("name", "count"),
    # Two a block; two more of queries and keys; the last; that of the pooling.
    [("gelu_erf", 5), ("pooled norm", 5), ("registers", 10)],
)
def test_the_constant_of_the_norms_reaches_every_norm(name, count):
    model, image = variant(name, norm_epsilon=0.5), pixels(2, 8, 8)
    params = random_params(model, image)

    @jax.jit
    def norms(params):
        seen = {}

        def look(call, args, kwargs, context):
            result = call(*args, **kwargs)
            if isinstance(context.module, LayerNorm):
                seen["/".join(context.module.path)] = args[0], result
            return result

        with nn.intercept_methods(look):
            model.apply({"params": params}, image)
        return seen

    seen = norms(params)
    assert len(seen) == count
    for path, (x, found) in seen.items():
        leaves = {n: trees.flatten(params)[f"{path}/{n}"] for n in ("scale", "bias")}
        x = np.asarray(x, np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.5)
        # float32, its variance in one pass about the first value.
        wanted = x * leaves["scale"] + leaves["bias"]
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=path)


def test_swiglu_is_silu_of_the_first_half_times_the_second():
    mlp = Mlp(hidden_dim=6, activation=Activation.SWIGLU)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    variables = mlp.init(jax.random.key(0), x)
    params = variables["params"]
    assert params["hidden"]["kernel"].shape == (4, 12)
    both = np.asarray(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    gate, value = both[:, :6], both[:, 6:]
    hidden = gate / (1 + np.exp(-gate)) * value
    expected = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(mlp.apply(variables, x), expected, atol=1e-5)


def test_distillation_averages_two_heads():
    model, image = variant("distilled"), pixels(2, 8, 8)
    params = random_params(model, image)
    out = run(model, params, image)
    parts = np.asarray(out["class_logits"]), np.asarray(out["distillation_logits"])
    assert np.abs(parts[0] - parts[1]).max() > 1e-2
    np.testing.assert_allclose(out["logits"], (parts[0] + parts[1]) / 2, atol=1e-6)
    # The pooled vector is the mean of both tokens: so is what linear heads make of it.
    head, other = params["head"], params["distillation_head"]
    same = {**params, "distillation_head": head}
    out = run(model, same, image)
    expected = out["pooled"] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(out["logits"], expected, atol=1e-4)
    assert other["kernel"].shape == head["kernel"].shape


def test_both_heads_of_a_distilled_model_start_at_their_bias():
    head = Classifier(num_classes=CLASSES, bias_init=-10.0)
    model, image = variant("distilled", head=head), pixels(2, 8, 8)
    outputs, variables = jax.jit(model.init_with_output)(jax.random.key(0), image)
    for name in ("logits", "class_logits", "distillation_logits"):
        np.testing.assert_array_equal(outputs[name], np.full((2, CLASSES), -10.0))
    for name in ("head", "distillation_head"):
        np.testing.assert_array_equal(variables["params"][name]["bias"], -10.0)


def test_registers_are_seen_by_patches_and_are_no_output():
    model, image = variant("registers"), pixels(2, 8, 8)
    params = random_params(model, image)
    out = run(model, params, image)
    other = run(model, {**params, "registers": -params["registers"]}, image)
    assert out["grid"].shape == (2, 2, 2, 16)
    assert np.abs(out["grid"] - other["grid"]).max() > 1e-3


def test_a_stem_makes_the_grid_that_patches_are_cut_from():
    model, image = variant("stem"), pixels(2, 8, 8)
    params = random_params(model, image)
    assert params["stem"]["conv"]["kernel"].shape == (2, 2, 3, 6)
    assert params["patch_embedding"]["kernel"].shape == (2, 2, 6, 16)
    assert run(model, params, image)["grid"].shape == (2, 2, 2, 16)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(distillation_token=True), "goes with pooling=class_token"),
        (dict(position_grid=(7, 7)), "use positions=learned"),
        (dict(position_grid=(7,), positions=Positions.LEARNED), "(rows, columns)"),
        (dict(registers=-1), "registers=-1"),
        (dict(norm_epsilon=0.0), "norm_epsilon=0.0"),
        (dict(kernel_patch_size=0), "kernel_patch_size=0"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError) as caught:
        ViT(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=4, **fields)
    assert words in str(caught.value)


def enlarge(patches, size):
    """Resizes [N, p, p, C] bilinearly, half-pixel centres, no antialiasing."""
    shape = (len(patches), size, size, patches.shape[-1])
    return jax.image.resize(patches, shape, "linear", antialias=False)


def kernel_and_patches(side=8):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(side, side, 3, 5)).astype(np.float32)
    return kernel, jnp.asarray(rng.normal(size=(20, side, side, 3)), jnp.float32)


def products(patches, kernel):
    return np.einsum("nijc,ijcd->nd", patches, kernel)


@pytest.mark.parametrize("patch", [9, 12, 16, 20])
def test_a_kernel_for_larger_patches_gives_enlarged_patches_their_tokens(patch):
    kernel, patches = kernel_and_patches()
    expected = products(patches, kernel)
    found = products(enlarge(patches, patch), resize_kernel(kernel, patch))
    # float32 products of 8 * 8 * 3 values about 14.
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("patch", [4, 6, 7])
def test_a_kernel_for_smaller_patches_is_not_exact_and_cannot_come_back(patch):
    kernel, patches = kernel_and_patches()
    expected = products(patches, kernel)
    smaller = resize_kernel(kernel, patch)
    found = products(enlarge(patches, patch), smaller)
    assert np.abs(found - expected).max() > 0.1 * np.abs(expected).max()
    back = resize_kernel(smaller, kernel.shape[0])
    assert np.abs(back - kernel).max() > 0.1
    # But it is the least-squares answer: no other kernel is nearer on white noise.
    matrix = np.kron(bilinear(8, patch), bilinear(8, patch))
    flat = kernel.reshape(64, -1)
    best = np.linalg.lstsq(matrix.T, flat, rcond=None)[0]
    np.testing.assert_allclose(smaller.reshape(patch**2, -1), best, atol=1e-4)


def test_a_kernel_of_the_same_size_stays_as_it_is():
    kernel, _ = kernel_and_patches()
    assert resize_kernel(kernel, 8) is kernel


@pytest.mark.parametrize("patch", [6, 12])
def test_a_kernel_resized_at_use_equals_the_one_resized_before(patch):
    image = jnp.asarray(np.random.default_rng(1).normal(size=(2, 24, 36, 3)))
    stored = PatchEmbedding(patch_size=patch, width=5, kernel_patch_size=8)
    params = random_params(stored, image)
    assert params["kernel"].shape == (8, 8, 3, 5)
    plain = PatchEmbedding(patch_size=patch, width=5)
    kernel = resize_kernel(np.asarray(params["kernel"]), patch)
    np.testing.assert_allclose(
        stored.apply({"params": params}, image),
        plain.apply({"params": {**params, "kernel": kernel}}, image),
        atol=1e-4,
    )


def test_a_flexivit_has_the_same_parameters_for_every_patch_and_image_size():
    shapes = []
    for patch, side in ((8, 240), (16, 240), (30, 240), (48, 192)):
        model = vit_variants.flexivit(f"Ti/{patch}", depth=1)
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
        found = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
        shapes.append({n: leaf.shape for n, leaf in trees.flatten(found).items()})
    assert all(found == shapes[0] for found in shapes)
    assert shapes[0]["position_embedding"] == (7, 7, 192)
    assert shapes[0]["patch_embedding/kernel"] == (32, 32, 3, 192)


def test_positions_on_their_own_grid_are_not_touched():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)), jnp.float32)
    np.testing.assert_array_equal(patches.resample_positions(table, (3, 5)), table)


# Parameters without a head, from timm 1.0.31 (num_classes=0), less what timm's class
# and distillation tokens have as positions, which are folded here.
@pytest.mark.parametrize(
    ("model", "side", "count"),
    [
        (vit_variants.dinov2("S/14"), 518, 22_056_192 - 384),
        (vit_variants.dinov2("B/14", registers=4), 518, 86_582_016),
        (vit_variants.siglip("B/16"), 224, 92_884_224),
        pytest.param(
            vit_variants.siglip("So400m/14"), 224, 427_680_704, marks=PUBLISHED
        ),
        (
            vit_variants.deit("S/16", head=Classifier(num_classes=1000)),
            224,
            22_050_664 - 384,
        ),
        (
            vit_variants.deit(
                "B/16", distilled=True, head=Classifier(num_classes=1000)
            ),
            *(224, 87_338_192 - 2 * 768),
        ),
        (
            vit_variants.deit3("M/16", head=Classifier(num_classes=1000)),
            224,
            38_849_512,
        ),
        pytest.param(
            vit_variants.dinov2("g/14"),
            518,
            1_136_479_232 - 1536,
            marks=PUBLISHED,
        ),
        pytest.param(
            vit_variants.deit3("H/14", head=Classifier(num_classes=1000)),
            *(224, 632_126_440),
            marks=PUBLISHED,
        ),
    ],
)
def test_towers_have_the_published_number_of_parameters(model, side, count):
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
