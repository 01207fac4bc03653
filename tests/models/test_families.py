import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite import trees
from big_vision_lite.models.bit import (
    BiT,
    Block,
    PoolPadding,
    Stem,
    group_norm,
    max_pool,
    standardise,
)
from big_vision_lite.models.bit_v1 import BiTV1, Trunk
from big_vision_lite.models.blocks.attention import Attention, attend
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import Dtype, Remat, scale_pixels
from big_vision_lite.models.blocks.patches import Positions, patchify, sincos
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.mixer import MlpMixer
from big_vision_lite.models.resnet import ResNet
from big_vision_lite.models.vit import ViT
from big_vision_lite.runtime import layout

CLASSES = 5
PUBLISHED = (pytest.mark.slow, pytest.mark.published)


def tiny_vit(**overrides):
    fields = dict(
        width=16,
        depth=2,
        mlp_dim=24,
        num_heads=2,
        patch_size=4,
        head=Classifier(num_classes=CLASSES),
    )
    return ViT(**{**fields, **overrides})


def tiny_resnet(**overrides):
    fields = dict(
        stages=(1, 2),
        width=4,
        groups=2,
        stem=Stem.SMALL,
        head=Classifier(num_classes=CLASSES),
    )
    return BiT(**{**fields, **overrides})


def pixels(batch, height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, height, width, channels)
    return jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))


def shapes(model, image):
    return jax.eval_shape(model.init, jax.random.key(0), image)["params"]


def random_params(model, image, seed=0):
    """Parameters in general position: no zero head, no unit scale."""
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        value = rng.normal(0, 0.3, leaf.shape) + name.endswith("scale")
        return jnp.asarray(value, jnp.float32)

    return trees.map_named(draw, shapes(model, image))


def count_parameters(model, side):
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model, image)))


def run(model, params, image, **options):
    """The model's outputs, compiled as a whole: op by op takes ten times as long."""
    return jax.jit(lambda params, image: model.apply(params, image, **options))(
        {"params": params}, image
    )


def numpy_params(params):
    return {
        name: np.asarray(x, np.float64) for name, x in trees.flatten(params).items()
    }


MODELS = {
    "vit_average": lambda **f: tiny_vit(**f),
    "vit_class_token": lambda **f: tiny_vit(
        pooling=Pooling.CLASS_TOKEN, positions=Positions.LEARNED, **f
    ),
    "vit_attention": lambda **f: tiny_vit(
        pooling=Pooling.ATTENTION,
        head=Classifier(num_classes=CLASSES, hidden_dim=6),
        **f,
    ),
    "resnet_bottleneck": lambda **f: tiny_resnet(**f),
    "resnet_basic": lambda **f: tiny_resnet(block=Block.BASIC, **f),
}


@functools.cache
def compiled(name):
    """One of MODELS, its parameters and its compiled forward pass on [2, 8, 8, 3]."""
    model = MODELS[name]()
    params = random_params(model, pixels(2, 8, 8))
    return model, params, jax.jit(lambda params, x: model.apply({"params": params}, x))


@pytest.mark.parametrize(
    ("pooling", "positions"), list(itertools.product(Pooling, Positions))
)
def test_vit_outputs_have_the_shapes_of_the_contract(pooling, positions):
    model = tiny_vit(pooling=pooling, positions=positions)
    image = pixels(2, 8, 12)  # not square
    out = jax.eval_shape(model.init_with_output, jax.random.key(0), image)[0]
    pooled = 2 * 16 if pooling == Pooling.CLASS_TOKEN_AND_AVERAGE else 16
    assert {name: x.shape for name, x in out.items()} == {
        "image": (2, 8, 12, 3),
        "grid": (2, 2, 3, 16),
        "pooled": (2, pooled),
        "logits": (2, CLASSES),
    }


@pytest.mark.parametrize(
    ("stem", "grid"),
    [(Stem.LARGE, (3, 4)), (Stem.MEDIUM, (5, 8)), (Stem.SMALL, (10, 15))],
)
def test_resnet_outputs_have_the_shapes_of_the_contract(stem, grid):
    image = pixels(2, 20, 30)
    for block, width in ((Block.BASIC, 8), (Block.BOTTLENECK, 32)):
        model = tiny_resnet(stem=stem, block=block)
        out = jax.eval_shape(model.init_with_output, jax.random.key(0), image)[0]
        assert out["grid"].shape == (2, *grid, width)
        assert out["pooled"].shape == (2, width)
        assert out["logits"].shape == (2, CLASSES)


def test_without_a_head_there_are_no_logits():
    for model in (tiny_vit(head=None), tiny_resnet(head=None)):
        out = jax.eval_shape(
            model.init_with_output, jax.random.key(0), pixels(1, 8, 8)
        )[0]
        assert "logits" not in out and "pooled" in out


def test_the_hidden_layer_of_a_head_is_an_output():
    model = MODELS["vit_attention"]()
    out = jax.eval_shape(model.init_with_output, jax.random.key(0), pixels(2, 8, 8))[0]
    assert out["pre_logits"].shape == (2, 6) and out["pooled"].shape == (2, 16)


def test_parameters_have_the_documented_names():
    vit = tiny_vit(
        depth=1,
        pooling=Pooling.ATTENTION,
        positions=Positions.LEARNED,
        head=Classifier(num_classes=CLASSES, hidden_dim=6),
    )
    attention = [
        f"attention/{part}/{leaf}"
        for part in ("key", "out", "query", "value")
        for leaf in ("bias", "kernel")
    ]
    mlp = [
        f"mlp/{part}/{leaf}"
        for part in ("hidden", "out")
        for leaf in ("bias", "kernel")
    ]

    def norm(name):
        return [f"{name}/bias", f"{name}/scale"]

    block = [*attention, *norm("attention_norm"), *mlp, *norm("mlp_norm")]
    pooling = [*attention, *mlp, *norm("norm"), "probe"]
    params = shapes(vit, pixels(1, 8, 8))
    assert sorted(trees.names(params)) == sorted(
        [f"encoder/block_00/{name}" for name in block]
        + [f"encoder/{name}" for name in norm("norm")]
        + [f"pooling/{name}" for name in pooling]
        + ["head/bias", "head/kernel", "head/pre_logits/bias", "head/pre_logits/kernel"]
        + ["patch_embedding/bias", "patch_embedding/kernel", "position_embedding"]
    )
    leaves = trees.flatten(params)
    assert leaves["encoder/block_00/attention/query/kernel"].shape == (16, 2, 8)
    assert leaves["encoder/block_00/attention/out/kernel"].shape == (2, 8, 16)
    assert leaves["patch_embedding/kernel"].shape == (4, 4, 3, 16)
    assert leaves["position_embedding"].shape == (2, 2, 16)

    resnet = shapes(tiny_resnet(), pixels(1, 8, 8))
    assert {
        "stem/kernel",
        "norm/scale",
        "head/kernel",
        "block1/unit01/conv_proj/kernel",
    } < (set(trees.names(resnet)))
    assert {"block2/unit02/gn3/bias", "block2/unit02/conv3/kernel"} < set(
        trees.names(resnet)
    )


@pytest.mark.parametrize(
    ("size", "count"),
    [
        # timm 1.0's counts, with class token and learned positions.
        ("S/16", 22_050_664),
        pytest.param("Ti/16", 5_717_416, marks=PUBLISHED),
        pytest.param("B/16", 86_567_656, marks=PUBLISHED),
        pytest.param("L/16", 304_326_632, marks=PUBLISHED),
        pytest.param("H/14", 632_045_800, marks=PUBLISHED),
        pytest.param("g/14", 1_012.61e6, marks=PUBLISHED),
        pytest.param("G/14", 1_844.44e6, marks=PUBLISHED),
    ],
)
def test_vit_sizes_have_the_published_number_of_parameters(size, count):
    model = ViT.of(
        size,
        pooling=Pooling.CLASS_TOKEN,
        positions=Positions.LEARNED,
        head=Classifier(num_classes=1000),
    )
    # timm gives the class token a position, big_vision and we do not.
    ours = count_parameters(model, 224) + model.width
    assert ours == count if isinstance(count, int) else abs(ours - count) < 5e3


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        # timm 1.0's resnetv2_*_bit with 1000 classes.
        ("R50x1", 25.55),
        pytest.param("R101x1", 44.54, marks=PUBLISHED),
        pytest.param("R50x3", 217.32, marks=PUBLISHED),
        pytest.param("R101x3", 387.93, marks=PUBLISHED),
        pytest.param("R152x2", 236.34, marks=PUBLISHED),
        pytest.param("R152x4", 936.53, marks=PUBLISHED),
    ],
)
def test_resnet_sizes_have_the_published_number_of_parameters(size, millions):
    model = BiT.of(size, head=Classifier(num_classes=1000))
    assert count_parameters(model, 224) / 1e6 == pytest.approx(millions, abs=0.005)


def test_so400m_with_attention_pooling_has_the_parameters_of_siglip():
    model = ViT.of("So400m/14", pooling=Pooling.ATTENTION, positions=Positions.LEARNED)
    assert count_parameters(model, 224) / 1e6 == pytest.approx(427.68, abs=0.005)


def test_the_small_resnet_has_less_than_0_4_million_parameters():
    model = BiT.of("small", head=Classifier(num_classes=26))
    assert count_parameters(model, 32) < 0.4e6


@pytest.mark.parametrize("name", MODELS)
def test_a_gradient_reaches_every_parameter(name):
    model, params, _ = compiled(name)
    image = pixels(2, 8, 8)

    def loss(params):
        logits = model.apply({"params": params}, image)["logits"]
        return jnp.sum(jnp.sin(logits * jnp.arange(1, CLASSES + 1)))

    gradients = trees.flatten(jax.jit(jax.grad(loss))(params))
    for leaf_name, gradient in gradients.items():
        if leaf_name.endswith("key/bias"):
            continue  # softmax cancels what all keys share
        assert np.all(np.isfinite(gradient)), leaf_name
        assert np.abs(gradient).max() > 1e-6, leaf_name


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_close_to_float32_and_its_ends_are_float32(name):
    image = pixels(2, 8, 8)
    _, params, forward = compiled(name)
    exact = forward(params, image)
    half = MODELS[name](dtype=Dtype.BFLOAT16)
    rounded = run(half, params, image)
    for leaf in jax.tree.leaves(shapes(half, image)):
        assert leaf.dtype == jnp.float32
    assert rounded["grid"].dtype == jnp.bfloat16
    for output in ("pooled", "logits"):
        assert rounded[output].dtype == jnp.float32
        scale = np.abs(exact[output]).max()
        # bfloat16 keeps 8 bits; a handful of layers.
        np.testing.assert_allclose(rounded[output], exact[output], atol=0.05 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_an_image_does_not_see_its_neighbours(name):
    _, params, forward = compiled(name)
    image = np.array(pixels(2, 8, 8))
    together = forward(params, jnp.asarray(image))["logits"]
    image[1] = pixels(1, 8, 8, seed=1)[0]
    other = forward(params, jnp.asarray(image))["logits"]
    np.testing.assert_allclose(other[0], together[0], rtol=1e-5, atol=1e-5)
    assert np.abs(other[1] - together[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("make", "kinds"),
    [
        (lambda **f: tiny_vit(depth=1, **f), (Remat.DOTS, Remat.FULL)),
        (lambda **f: tiny_resnet(stages=(1,), **f), (Remat.FULL,)),
    ],
    ids=["vit", "resnet"],
)
def test_rematerialisation_does_not_change_gradients(make, kinds):
    image, gradients, recomputed = pixels(2, 8, 8), {}, {}
    params = random_params(make(), image)
    for remat in (Remat.NONE, *kinds):
        model = make(remat=remat)
        assert trees.names(shapes(model, image)) == trees.names(params)

        def loss(params, model=model):
            logits = model.apply({"params": params}, image, train=True)["logits"]
            return jnp.square(logits).sum()

        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        # A ViT's patches and activations are recomputed whatever `remat` says.
        recomputed[remat] = text.count("checkpoint") + text.count("remat")
        gradients[remat] = trees.flatten(jax.jit(jax.grad(loss))(params))
    for remat in kinds:
        assert recomputed[remat] > recomputed[Remat.NONE]
        for name, expected in gradients[Remat.NONE].items():
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                gradients[remat][name], expected, atol=1e-4 * scale + 1e-5
            )


def test_a_fresh_classifier_predicts_its_bias():
    head = Classifier(num_classes=CLASSES, bias_init=-10.0)
    outputs, variables = head.init_with_output(jax.random.key(0), jnp.ones((2, 3)))
    np.testing.assert_array_equal(outputs["logits"], np.full((2, CLASSES), -10.0))
    assert variables["params"]["kernel"].shape == (3, CLASSES)


def layer_norm(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * scale + bias


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


class NumpyViT:
    """A transformer in loops, one image, float64."""

    def __init__(self, params):
        self.params = numpy_params(params)

    def norm(self, name, x):
        return layer_norm(x, self.params[f"{name}/scale"], self.params[f"{name}/bias"])

    def attention(self, name, queries, memory):
        def project(part, x):
            kernel = self.params[f"{name}/{part}/kernel"]
            return (
                np.einsum("nd,dhe->nhe", x, kernel) + self.params[f"{name}/{part}/bias"]
            )

        q, k, v = (
            project("query", queries),
            project("key", memory),
            project("value", memory),
        )
        out = np.tile(self.params[f"{name}/out/bias"], (len(queries), 1))
        for head in range(q.shape[1]):
            for n in range(len(queries)):
                weights = np.exp(k[:, head] @ q[n, head] / np.sqrt(q.shape[2]))
                attended = weights / weights.sum() @ v[:, head]
                out[n] += attended @ self.params[f"{name}/out/kernel"][head]
        return out

    def dense(self, name, x):
        return x @ self.params[f"{name}/kernel"] + self.params[f"{name}/bias"]

    def mlp(self, name, x):
        return self.dense(f"{name}/out", gelu(self.dense(f"{name}/hidden", x)))

    def embed(self, image, patch=4):
        kernel = self.params["patch_embedding/kernel"]
        scaled = np.asarray(image, np.float64) / 127.5 - 1
        tokens = [
            np.einsum("ijc,ijcd->d", scaled[y : y + patch, x : x + patch], kernel)
            for y in range(0, image.shape[0], patch)
            for x in range(0, image.shape[1], patch)
        ]
        return np.stack(tokens) + self.params["patch_embedding/bias"]

    def encode(self, x, depth=2):
        for index in range(depth):
            block = f"encoder/block_{index:02d}"
            y = self.norm(f"{block}/attention_norm", x)
            x = x + self.attention(f"{block}/attention", y, y)
            x = x + self.mlp(f"{block}/mlp", self.norm(f"{block}/mlp_norm", x))
        return self.norm("encoder/norm", x)


@pytest.mark.parametrize("pooling", Pooling)
def test_vit_equals_a_transformer_written_in_numpy(pooling):
    model = tiny_vit(
        pooling=pooling,
        positions=Positions.LEARNED,
        head=Classifier(num_classes=CLASSES, hidden_dim=6),
    )
    image = pixels(2, 8, 12)
    params = random_params(model, image)
    ours = run(model, params, image)
    reference = NumpyViT(params)
    for index in range(2):
        positions = reference.params["position_embedding"]
        x = reference.embed(image[index])
        x = x + positions.reshape(x.shape)
        if "class_token" in reference.params:
            x = np.concatenate([reference.params["class_token"][0], x])
        x = reference.encode(x)
        if pooling == Pooling.AVERAGE:
            pooled = x.mean(0)
        elif pooling == Pooling.CLASS_TOKEN:
            pooled, x = x[0], x[1:]
        elif pooling == Pooling.CLASS_TOKEN_AND_AVERAGE:
            pooled, x = np.concatenate([x[0], x[1:].mean(0)]), x[1:]
        else:
            probe = reference.params["pooling/probe"][0]
            z = reference.attention("pooling/attention", probe, x)
            y = reference.mlp("pooling/mlp", reference.norm("pooling/norm", z))
            pooled = (z + y)[0]
        logits = reference.dense(
            "head", np.tanh(reference.dense("head/pre_logits", pooled))
        )
        # float32 against float64, two blocks.
        tokens = ours["grid"][index].reshape(x.shape)
        np.testing.assert_allclose(tokens, x, atol=2e-5)
        np.testing.assert_allclose(ours["pooled"][index], pooled, atol=2e-5)
        np.testing.assert_allclose(ours["logits"][index], logits, atol=2e-5)


def test_patches_are_those_of_a_convolution_with_its_stride():
    image = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 9, 2)), jnp.float32)
    kernel = jnp.asarray(
        np.random.default_rng(1).normal(size=(3, 3, 2, 5)), jnp.float32
    )
    convolved = jax.lax.conv_general_dilated(
        image, kernel, (3, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    ours = np.asarray(patchify(image, 3)) @ np.reshape(kernel, (-1, 5))
    np.testing.assert_allclose(ours, convolved, atol=1e-5)


def test_sincos_is_the_form_of_moco_v3_and_not_of_mae():
    table = sincos(3, 5, 16)
    for row, column, band in itertools.product(range(3), range(5), range(4)):
        omega = 10_000 ** (-band / 3)  # MAE: -band / 4
        expected = [
            np.sin(column * omega),
            np.cos(column * omega),
            np.sin(row * omega),
            np.cos(row * omega),
        ]
        np.testing.assert_allclose(
            table[row * 5 + column, band::4], expected, atol=1e-6
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)]
)
def test_the_gradient_of_attention_is_that_of_its_formula(dtype, tolerance):
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        jnp.asarray(rng.normal(size=(2, tokens, 3, 8)), dtype)
        for tokens in (5, 7, 7, 5)
    )

    def formula(q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(8)
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(logits), v)

    def gradients(function):
        def loss(*qkv):
            return (function(*qkv).astype(jnp.float32) * weights).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    ours = gradients(lambda *qkv: attend(*qkv, Attention.XLA))
    for found, expected in zip(ours, gradients(formula), strict=True):
        assert found.dtype == jnp.dtype(dtype)
        found, expected = (np.asarray(x, np.float32) for x in (found, expected))
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found / scale, expected / scale, atol=tolerance)


# The exponential of logits of some hundreds is infinite in float32.
@pytest.mark.parametrize("scale", [1, 1000])
def test_attention_equals_that_of_jax(scale):
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, tokens, 4, 8)), jnp.float32)
        for tokens in (3, 5, 5)
    )
    q = scale * q
    ours = jax.jit(lambda *qkv: attend(*qkv, Attention.XLA))(q, k, v)
    theirs = jax.jit(jax.nn.dot_product_attention)(q, k, v)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_uint8_and_float_pixels_are_scaled_alike_by_own_constants():
    image = pixels(1, 4, 4)
    mean, std = (1.0, 2.0, 3.0), (10.0, 20.0, 40.0)
    expected = (np.asarray(image, np.float64) - mean) / std
    for given in (image, image.astype(jnp.float32)):
        np.testing.assert_allclose(scale_pixels(given, mean, std), expected, rtol=1e-6)
    ends = jnp.asarray([0, 255], jnp.uint8).reshape(1, 1, 2, 1)
    np.testing.assert_array_equal(
        scale_pixels(ends, tiny_vit().mean, tiny_vit().std).ravel(), [-1, 1]
    )


FAMILIES = {
    "ViT": tiny_vit(depth=1),
    "BiT": tiny_resnet(stages=(1,)),
    "BiTV1": BiTV1(trunk=Trunk(stages=(), width=4, groups=2)),
    "ResNet": ResNet(stages=(1,), width=4),
    "MlpMixer": MlpMixer(
        width=8, depth=1, token_mlp_dim=8, channel_mlp_dim=8, patch_size=4
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_sees_pixels_in_minus_one_to_one_by_default(family):
    model = FAMILIES[family]
    image = pixels(1, 8, 8).at[0, 0, :3, 0].set(jnp.asarray([0, 51, 255], jnp.uint8))
    outputs, variables = jax.jit(model.init_with_output)(jax.random.key(0), image)
    expected = np.asarray(image, np.float64) / 127.5 - 1
    np.testing.assert_allclose(outputs["image"], expected, atol=1e-6)
    np.testing.assert_array_equal(outputs["image"][0, 0, 0:3:2, 0], [-1, 1])
    # And it computes on just that: the scaled pixels, taken as they are, give the same;
    # pixels in [0, 1] do not.
    plain = jax.jit(model.clone(mean=(0.0,), std=(1.0,)).apply)
    same = plain(variables, jnp.asarray(expected, jnp.float32))["pooled"]
    unit = plain(variables, jnp.asarray(image / 255, jnp.float32))["pooled"]
    np.testing.assert_allclose(outputs["pooled"], same, atol=1e-5)
    assert np.abs(outputs["pooled"] - unit).max() > 1e-3


def test_stochastic_depth_drops_whole_branches_of_whole_images_in_training_only():
    model = tiny_vit(stochastic_depth=0.5)
    image = jnp.tile(pixels(1, 8, 8), (32, 1, 1, 1))
    params = random_params(model, image)
    evaluated = run(model, params, image)["logits"]
    np.testing.assert_allclose(evaluated, jnp.tile(evaluated[:1], (32, 1)), atol=1e-5)
    rngs = {"dropout": jax.random.key(0)}
    trained = run(model, params, image, train=True, rngs=rngs)["logits"]
    # The first block's rate is 0; two branches of the last one: kept or dropped.
    assert len({tuple(row) for row in np.round(np.asarray(trained), 3)}) == 4


def test_dropout_needs_training_and_differs_by_key():
    model, image = tiny_vit(dropout=0.3), pixels(2, 8, 8)
    _, params, forward = compiled("vit_average")

    @jax.jit
    def train(key):
        rngs = {"dropout": key}
        return model.apply({"params": params}, image, train=True, rngs=rngs)["logits"]

    first, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    np.testing.assert_array_equal(
        run(model, params, image)["logits"], forward(params, image)["logits"]
    )


def test_the_residual_stream_is_pinned_to_the_batch_axes():
    mesh = jax.make_mesh(
        (4, 2), layout.BATCH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    image = pixels(8, 8, 8)
    for model, least in ((tiny_vit(), 5), (tiny_resnet(), 4)):
        with jax.set_mesh(mesh):
            jaxpr = jax.make_jaxpr(model.apply)({"params": shapes(model, image)}, image)
        assert str(jaxpr).count("sharding_constraint[") >= least


def test_standardised_kernels_equal_numpy():
    kernel = np.random.default_rng(0).normal(3, 2, (3, 3, 4, 5)).astype(np.float32)
    expected = np.empty_like(kernel, dtype=np.float64)
    for channel in range(5):
        weights = kernel[..., channel].astype(np.float64)
        expected[..., channel] = (weights - weights.mean()) / np.sqrt(
            weights.var() + 1e-10
        )
    np.testing.assert_allclose(standardise(jnp.asarray(kernel)), expected, atol=1e-5)


def numpy_group_norm(x, groups, scale=1.0, bias=0.0):
    out = np.empty(x.shape)
    size = x.shape[-1] // groups
    for image, group in itertools.product(range(len(x)), range(groups)):
        channels = slice(group * size, (group + 1) * size)
        part = x[image, :, :, channels]
        out[image, :, :, channels] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    return out * scale + bias


def test_group_norm_equals_numpy():
    x = np.random.default_rng(0).normal(1, 0.01, (2, 3, 5, 6))
    norm = group_norm(3, Dtype.FLOAT32, "norm")
    ours = jax.jit(norm.init_with_output)(
        jax.random.key(0), jnp.asarray(x, jnp.float32)
    )[0]
    # Mean 100 times the deviation: the one-pass variance keeps 3 digits of it.
    np.testing.assert_allclose(ours, numpy_group_norm(x, 3), atol=5e-3)


class NumpyBiT:
    """A BiT ResNet in loops, float64."""

    def __init__(self, params, groups):
        self.params, self.groups = numpy_params(params), groups

    def conv(self, name, x, stride=1):
        kernel = self.params[f"{name}/kernel"]
        axes = (0, 1, 2)
        kernel = (kernel - kernel.mean(axes)) / np.sqrt(kernel.var(axes) + 1e-10)
        size = kernel.shape[0]
        pad = size // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        rows = range(0, x.shape[1] - size + 1, stride)
        columns = range(0, x.shape[2] - size + 1, stride)
        windows = [[x[:, r : r + size, c : c + size] for c in columns] for r in rows]
        return np.einsum("rcbhwi,hwio->brco", np.array(windows), kernel)

    def norm_relu(self, name, x):
        scale, bias = self.params[f"{name}/scale"], self.params[f"{name}/bias"]
        return np.maximum(numpy_group_norm(x, self.groups, scale, bias), 0)

    def unit(self, name, x, stride):
        u = self.norm_relu(f"{name}/gn1", x)
        if f"{name}/conv3/kernel" in self.params:
            y = self.conv(f"{name}/conv1", u)
            y = self.conv(f"{name}/conv2", self.norm_relu(f"{name}/gn2", y), stride)
            y = self.conv(f"{name}/conv3", self.norm_relu(f"{name}/gn3", y))
        else:
            y = self.conv(f"{name}/conv1", u, stride)
            y = self.conv(f"{name}/conv2", self.norm_relu(f"{name}/gn2", y))
        if f"{name}/conv_proj/kernel" in self.params:
            x = self.conv(f"{name}/conv_proj", u, stride)
        return x + y


@pytest.mark.parametrize(
    ("block", "around"), [(Block.BOTTLENECK, 0.0), (Block.BASIC, -np.inf)]
)
def test_resnet_equals_loops_in_numpy(block, around):
    zeros = around == 0
    model = tiny_resnet(
        block=block,
        stem=Stem.LARGE,
        pool_padding=PoolPadding.ZEROS if zeros else PoolPadding.NEGATIVE_INFINITY,
    )
    image = pixels(2, 16, 18)
    params = random_params(model, image)
    ours = run(model, params, image)
    reference = NumpyBiT(params, groups=2)
    x = reference.conv("stem", np.asarray(image, np.float64) / 127.5 - 1, stride=2)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=around)
    x = np.stack(
        [
            np.stack(
                [x[:, r : r + 3, c : c + 3].max((1, 2)) for c in range(0, 9, 2)], 1
            )
            for r in range(0, 8, 2)
        ],
        1,
    )
    for name, stride in (
        ("block1/unit01", 1),
        ("block2/unit01", 2),
        ("block2/unit02", 1),
    ):
        x = reference.unit(name, x, stride)
    x = reference.norm_relu("norm", x)
    logits = (
        x.mean((1, 2)) @ reference.params["head/kernel"] + reference.params["head/bias"]
    )
    np.testing.assert_allclose(ours["grid"], x, atol=5e-4)
    np.testing.assert_allclose(ours["logits"], logits, atol=5e-4)


def test_the_padding_of_the_pool_shows_on_negative_borders():
    x = -jnp.ones((1, 4, 4, 1))
    zeros = max_pool(x, PoolPadding.ZEROS)[0, :, :, 0]
    infinity = max_pool(x, PoolPadding.NEGATIVE_INFINITY)[0, :, :, 0]
    np.testing.assert_array_equal(zeros, [[0, 0], [0, -1]])
    np.testing.assert_array_equal(infinity, -np.ones((2, 2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViT.of("S16"), 'like "S/16"'),
        (lambda: ViT.of("X/16"), "Ti, S, M, B, L"),
        (lambda: BiT.of("R51x1"), "R26, R50"),
        (lambda: tiny_vit(num_heads=3), "use width=18"),
        (lambda: tiny_vit(dropout=1.0), "0 <= dropout < 1"),
        (lambda: tiny_vit(depth=0), "depth=0"),
        (lambda: tiny_resnet(width=12, groups=8), "groups=6"),
        (lambda: tiny_resnet(stages=()), r"\(3, 4, 6, 3\)"),
        (lambda: Classifier(num_classes=0), "num_classes=0"),
        (lambda: sincos(2, 2, 18), "use 16 or positions=learned"),
    ],
)
def test_a_wrong_field_is_refused_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("model", "image", "message"),
    [
        (tiny_vit(), pixels(1, 9, 8), "resize to 8x8 or 12x8"),
        (tiny_vit(), pixels(1, 3, 8), "resize to 4x8 or 4x8"),
        (tiny_vit(), pixels(1, 8, 8).astype(jnp.int32), "takes uint8, or floats"),
        (tiny_vit(mean=(1.0, 2.0)), pixels(1, 8, 8), "give 1 value or 3"),
        (tiny_resnet(std=(0.0,)), pixels(1, 8, 8), "must be positive"),
        (tiny_vit(attention=Attention.CUDNN), pixels(1, 8, 8), "attention=auto"),
        (tiny_vit(attention=Attention.PALLAS), pixels(1, 8, 8), "needs a TPU"),
    ],
)
def test_a_wrong_image_is_refused_with_what_to_do(model, image, message):
    with pytest.raises(ValueError, match=message):
        shapes(model, image)


def test_an_unknown_choice_is_refused_with_the_known_ones():
    # The runtime type check of the tests would refuse the constructor's argument.
    model = tiny_vit()
    object.__setattr__(model, "pooling", "median")
    with pytest.raises(ValueError, match="average, class_token, .*, attention"):
        model.__post_init__()
