"""A masked autoencoder hides what it says, and only that."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite.models.blocks.patches import patchify, unpatchify
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.masked_autoencoder import MaskedAutoencoder
from big_vision_lite.models.vit import ViT


def vit(**fields) -> ViT:
    small = dict(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=4)
    return ViT(**small | fields)


def autoencoder(encoder=None, **fields) -> MaskedAutoencoder:
    small = dict(decoder_width=8, decoder_depth=1, decoder_heads=2)
    return MaskedAutoencoder(encoder=encoder or vit(), **small | fields)


RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.integers(0, 256, (4, 16, 24, 3)), jnp.uint8)


def keys(mask=1):
    return {"params": jax.random.key(0), "mask": jax.random.key(mask)}


@functools.cache
def made(model):
    """(variables, the model as one program): op by op is slow."""
    return jax.jit(model.init)(keys(), IMAGES), jax.jit(model.apply)


def run(model, images=IMAGES, mask=1):
    variables, apply = made(model)
    return apply(variables, images, rngs={"mask": jax.random.key(mask)})


@pytest.mark.parametrize(
    "ratio, visible", [(0.75, 6), (0.5, 12), (0.9, 2), (0.95, 1), (1 / 24, 23)]
)
def test_each_image_hides_its_share_elsewhere(ratio, visible):
    masked = np.asarray(run(autoencoder(mask_ratio=ratio))["masked"])
    assert (24 - masked.sum(axis=1) == visible).all()
    assert len({row.tobytes() for row in masked}) > 1 or visible in (1, 23)


def test_blocks_are_hidden_whole():
    masked = np.asarray(run(autoencoder(mask_block=2, mask_ratio=0.5))["masked"])
    blocks = masked.reshape(4, 2, 2, 3, 2).swapaxes(2, 3).reshape(4, 6, 4)
    assert (blocks.min(axis=2) == blocks.max(axis=2)).all()
    assert (blocks[:, :, 0].sum(axis=1) == 3).all()


def test_the_mask_is_a_function_of_its_key():
    model = autoencoder()
    first, again, other = (run(model, mask=m)["masked"] for m in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@pytest.mark.parametrize("pooling", [Pooling.AVERAGE, Pooling.CLASS_TOKEN])
def test_hidden_pixels_change_nothing_but_the_target(pooling):
    model = autoencoder(vit(pooling=pooling))
    found = run(model)
    hidden = jnp.broadcast_to(found["masked"][:, :, None], (4, 24, 48))
    hidden = np.asarray(unpatchify(hidden.reshape(4, 4, 6, 48), 3))
    changed = run(model, jnp.where(hidden, 255 - IMAGES, IMAGES))
    for name in ("reconstruction", "pooled", "masked"):
        np.testing.assert_array_equal(changed[name], found[name])
    # A visible pixel does change it.
    seen = run(model, jnp.where(hidden, IMAGES, 255 - IMAGES))
    assert np.any(seen["reconstruction"] != found["reconstruction"])


def test_patches_are_in_order_of_row_column_and_channel():
    found = run(autoencoder())
    by_hand = np.empty((4, 24, 48), np.float32)
    scaled = (np.asarray(IMAGES, np.float32) - 127.5) / 127.5
    for row in range(4):
        for column in range(6):
            patch = scaled[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            by_hand[:, 6 * row + column] = patch.reshape(4, -1)
    np.testing.assert_allclose(found["patches"], by_hand, atol=1e-6)
    grid = patchify(jnp.asarray(IMAGES), 4)
    np.testing.assert_array_equal(unpatchify(grid, 3), IMAGES)


def test_the_decoder_puts_patches_back_where_they_were():
    """Encoded tokens alone reach it: without positions it could not tell places."""
    model = autoencoder(mask_ratio=0.5)
    variables, apply = made(model)
    params = jax.tree.map(jnp.zeros_like, variables["params"]["decoder"])
    # A decoder of zeros passes its input on, normalised with scale 1.
    params["norm"]["scale"] = jnp.ones(8)
    pixels = {"kernel": jnp.eye(8, 48), "bias": jnp.zeros(48)}
    variables = {"params": variables["params"] | {"decoder": params, "pixels": pixels}}
    rngs = {"mask": jax.random.key(3)}
    found = apply(variables, IMAGES, rngs=rngs)
    masked = np.asarray(found["masked"])
    given = np.asarray(found["reconstruction"])[..., :8]
    # Hidden places hold the token and their position, the same in every image.
    for place in range(24):
        rows = given[masked[:, place], place]
        np.testing.assert_allclose(rows, np.broadcast_to(rows[:1], rows.shape))
    seen = given[~masked]
    assert len(np.unique(seen.round(5), axis=0)) == len(seen)


def test_a_gradient_reaches_every_parameter_class_tokens_too():
    model = autoencoder(vit(pooling=Pooling.CLASS_TOKEN, class_tokens=3, registers=2))
    variables, _ = made(model)

    def loss(params):
        rngs = {"mask": jax.random.key(1)}
        outputs = model.apply({"params": params}, IMAGES, rngs=rngs)
        error = jnp.square(outputs["reconstruction"] - outputs["patches"]).mean(-1)
        return (error * outputs["masked"]).sum()

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    silent = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if not np.any(leaf)
    ]
    # The softmax does not change when all scores move alike.
    assert all("key" in name and "bias" in name for name in silent), silent


def test_several_class_tokens_are_pooled_by_their_mean():
    model = vit(pooling=Pooling.CLASS_TOKEN, class_tokens=3)
    variables, apply = made(model)
    visible = jnp.tile(jnp.arange(24), (4, 1))
    found = apply(variables, IMAGES, visible=visible)
    assert found["special"].shape == (4, 3, 16)
    expected = np.asarray(found["special"]).mean(axis=1)
    np.testing.assert_allclose(found["pooled"], expected, atol=1e-6)
    whole = apply(variables, IMAGES)
    np.testing.assert_allclose(whole["pooled"], found["pooled"], atol=1e-5)
    assert "special" not in whole


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mask_ratio": 0.0}, "mask_ratio=0.0 is the share of hidden patches"),
        ({"mask_ratio": 1.0}, "between 0 and 1; use 0.75"),
        ({"mask_ratio": 0.99}, "leaves 0 visible; between 1 and 23 must be"),
        ({"mask_block": 3}, r"grid of 4 x 6 patches; use one of 1, 2\."),
        ({"mask_block": 2, "mask_ratio": 0.9}, "of 6 blocks of patches leaves 0"),
        ({"mask_block": 0}, "mask_block=0: must be at least 1"),
        ({"decoder_width": 10, "decoder_heads": 4}, "does not divide over"),
    ],
)
def test_what_leaves_nothing_to_see_or_to_hide_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        run(autoencoder(**fields))


@pytest.mark.parametrize(
    "fields", [{"class_tokens": 0}, {"class_tokens": 2}, {"pooling": Pooling.ATTENTION}]
)
def test_class_tokens_go_with_a_pooling_that_reads_them(fields):
    with pytest.raises(ValueError, match="class_tokens=.*else use 1"):
        vit(**{"class_tokens": 2} | fields)
