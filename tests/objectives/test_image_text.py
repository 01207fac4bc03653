"""Losses of pairs: known numbers, loops, and the ring against the whole square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from big_vision_lite.objectives.image_text import CLIP, SigLIP
from big_vision_lite.runtime import layout

R = np.random.default_rng(0)
# The draws that come before these in the script of the known answers.
for shape in ((6, 4), (6, 4), (8, 5), (2, 2, 6, 5), (64, 8), (8, 16)):
    R.standard_normal(shape)
IMAGES, TEXTS = R.standard_normal((4, 3)), R.standard_normal((4, 3))
KEY = jax.random.key(0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


class Given:
    """A model whose embeddings are its inputs, in any length."""

    def __init__(self, temperature=10.0, bias=-10.0):
        self.numbers = {"temperature": jnp.float32(temperature)}
        if bias is not None:
            self.numbers["bias"] = jnp.float32(bias)

    def __call__(self, *, image, text):
        text = jnp.asarray(self.texts)
        return {
            "pooled": image,
            "image_embedding": image,
            "text_embedding": text,
            **self.numbers,
        }


def run(objective, images, texts, *, tokens=None, forward=None, **more):
    forward = forward or Given()
    forward.texts = jnp.asarray(texts, jnp.float32)
    if tokens is None:
        tokens = np.arange(len(images))[:, None]
    batch = {
        "image": jnp.asarray(images, jnp.float32),
        "text": jnp.asarray(tokens, jnp.int32),
        **more,
    }
    return objective(forward, batch, KEY)


def test_siglip_is_the_known_one_and_equals_a_double_loop():
    losses, metrics = run(SigLIP(), unit(IMAGES), unit(TEXTS))
    assert losses.mean() == pytest.approx(8.92147, rel=1e-5)
    right = 0
    for i, image in enumerate(unit(IMAGES)):
        scores = [10 * image @ text - 10 for text in unit(TEXTS)]
        signs = [1 if i == j else -1 for j in range(4)]
        loop = sum(np.log1p(np.exp(-z * s)) for z, s in zip(signs, scores, strict=True))
        assert losses[i] == pytest.approx(loop, rel=1e-5)
        right += int(np.argmax(scores) == i)
    assert np.mean(metrics["retrieved"]) == right / 4
    assert metrics["temperature"] == 10 and metrics["bias"] == -10


def test_clip_is_the_known_one_and_equals_a_double_loop():
    forward = Given(temperature=1 / 0.07, bias=None)
    losses, metrics = run(CLIP(), unit(IMAGES), unit(TEXTS), forward=forward)
    assert losses.mean() == pytest.approx(4.869707, rel=1e-5)
    scores = unit(IMAGES) @ unit(TEXTS).T / 0.07
    for i in range(4):
        of_image = np.log(np.exp(scores[i]).sum()) - scores[i, i]
        of_text = np.log(np.exp(scores[:, i]).sum()) - scores[i, i]
        assert losses[i] == pytest.approx((of_image + of_text) / 2, rel=1e-5)
    assert "bias" not in metrics


@pytest.mark.parametrize("objective", [SigLIP(), CLIP()])
def test_padding_is_no_pair(objective):
    alone, known = run(objective, unit(IMAGES), unit(TEXTS))
    padded = [np.concatenate([unit(x), unit(x[:2])]) for x in (IMAGES, TEXTS)]
    found, metrics = run(objective, *padded, valid=jnp.arange(6) < 4)
    np.testing.assert_allclose(found[:4], alone, rtol=1e-5)
    assert not np.any(found[4:])
    np.testing.assert_array_equal(metrics["retrieved"][:4], known["retrieved"])


def test_equal_captions_are_right_for_each_other():
    tokens = [[1, 2], [1, 3], [1, 2], [2, 1]]
    losses, metrics = run(
        SigLIP(equal_captions=True), unit(IMAGES), unit(TEXTS), tokens=tokens
    )
    for i in range(4):
        loop = 0.0
        for j in range(4):
            z = 1 if tokens[i] == tokens[j] else -1
            score = 10 * unit(IMAGES)[i] @ unit(TEXTS)[j] - 10
            loop += np.log1p(np.exp(-z * score))
        assert losses[i] == pytest.approx(loop, rel=1e-5)
    plain, _ = run(SigLIP(), unit(IMAGES), unit(TEXTS), tokens=tokens)
    np.testing.assert_array_equal(losses[1::2], plain[1::2])
    assert np.all(losses[::2] != plain[::2])
    assert metrics["retrieved"].shape == (4,)


def test_one_text_an_image_is_asked_for():
    with pytest.raises(ValueError, match=r"of shape \(4, 2, 3\) for 4 images; one"):
        run(SigLIP(), IMAGES, TEXTS, tokens=np.zeros((4, 2, 3)))


def mesh_of(*sizes):
    count = int(np.prod(sizes))
    axes = layout.AXES[: len(sizes)]
    return jax.make_mesh(
        sizes, axes, (AxisType.Auto,) * len(sizes), devices=jax.devices()[:count]
    )


ROWS = 840  # divides over 2 to 8 devices
WIDE = np.random.default_rng(1).standard_normal((2, ROWS, 6)).astype(np.float32)
TOKENS = np.random.default_rng(2).integers(0, 3, (ROWS, 4)).astype(np.int32)
VALID = np.random.default_rng(3).random(ROWS) < 0.9


def value_and_gradients(objective, mesh=None):
    """Losses, metrics, and gradients of a weighted sum of the losses."""

    def total(images, texts, temperature, bias):
        def forward(*, image, text):
            return {
                "pooled": image,
                "image_embedding": image / jnp.linalg.norm(image, axis=1)[:, None],
                "text_embedding": texts / jnp.linalg.norm(texts, axis=1)[:, None],
                "temperature": temperature,
                "bias": bias,
            }

        batch = {
            "image": images,
            "text": jnp.asarray(TOKENS),
            "valid": jnp.asarray(VALID),
        }
        losses, metrics = objective(forward, batch, KEY)
        # Not the mean: every row has a gradient of its own.
        weights = jnp.cos(jnp.arange(ROWS))
        kept = {n: metrics[n] for n in ("retrieved", "temperature")}
        return (losses * weights).sum(), (losses, kept)

    function = jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)
    numbers = jnp.float32(7.0), jnp.float32(-6.0)
    if mesh is None:
        return jax.device_get(jax.jit(function)(*WIDE, *numbers))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, layout.batch_sharding(mesh)) for x in WIDE]
        return jax.device_get(jax.jit(function)(*placed, *numbers))


RINGS = [(n, 1) for n in range(2, 9)] + [(4, 2), (1, 8), (2, 2, 2)]


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(s, marks=() if s == (4, 2) else pytest.mark.slow) for s in RINGS],
    ids=str,
)
@pytest.mark.parametrize(
    "objective", [SigLIP(), SigLIP(equal_captions=True), CLIP()], ids=repr
)
def test_the_ring_gives_losses_and_gradients_of_the_whole_square(objective, sizes):
    (_, (expected, known)), dense = value_and_gradients(objective)
    (_, (losses, metrics)), found = value_and_gradients(objective, mesh_of(*sizes))
    # Sums of 840 numbers in another order.
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    np.testing.assert_array_equal(metrics["retrieved"], known["retrieved"])
    for mine, theirs in zip(found, dense, strict=True):
        scale = np.abs(theirs).max()
        assert np.abs(mine - theirs).max() <= 2e-5 * scale


def test_a_device_never_holds_the_whole_square():
    """Compiled for 4 devices and for 8 with twice the batch: as much memory each."""

    def temporaries(devices):
        rows = 256 * devices
        mesh = mesh_of(devices, 1)

        def loss(images, texts):
            forward = Given()
            forward.texts = texts
            batch = {"image": images, "text": jnp.zeros((rows, 1), jnp.int32)}
            return SigLIP()(forward, batch, KEY)[0].mean()

        split = layout.batch_sharding(mesh)
        x = jax.ShapeDtypeStruct((rows, 16), jnp.float32, sharding=split)
        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    four, eight = temporaries(4), temporaries(8)
    assert eight <= 1.3 * four, (four, eight)
    # Losses of a chunk and a few arrays of its size, in float32.
    assert eight < 12 * 4 * 256 * 256
