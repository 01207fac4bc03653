"""Which patches iBOT hides, and what their loss is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_context import make_mesh

from big_vision_lite.objectives.masked_patches import MaskedPatches, block_order
from big_vision_lite.objectives.self_distillation import SelfDistillation, sinkhorn
from big_vision_lite.runtime import layout

KEY = jax.random.key(0)
GRID = (14, 14)


def drawn(patches, count, grid):
    found = jax.jit(lambda: patches.draw(KEY, count, grid))()
    return [np.asarray(x) for x in found]


def test_half_of_the_views_hide_patches_and_their_ratios_are_spread():
    places, hidden, replaced = drawn(MaskedPatches(), 64, GRID)
    assert places.shape == hidden.shape == (64, 98) and replaced.shape == (64, 196)
    counts = np.sort(replaced.sum(axis=1))
    wanted = np.floor(np.linspace(0.1, 0.5, 32) * 196 + 1e-4)
    np.testing.assert_array_equal(counts, [*np.zeros(32), *wanted])
    for view in range(64):
        chosen = places[view][hidden[view]]
        assert sorted(chosen) == list(np.flatnonzero(replaced[view]))


def test_all_patches_have_a_place_where_visible_ones_count():
    patches = MaskedPatches(weight=2.0, visible_weight=0.5)
    places, hidden, replaced = drawn(patches, 8, (4, 4))
    np.testing.assert_array_equal(np.sort(places, axis=1), np.tile(range(16), (8, 1)))
    weights = patches.weights(jnp.asarray(hidden), jnp.float32(1))
    some = np.asarray(hidden.any(axis=1))
    np.testing.assert_allclose(weights.sum(axis=1), np.where(some, 2.5, 0.5), rtol=1e-6)
    assert np.unique(weights[0][hidden[0]]).size <= 1


def test_hidden_patches_lie_in_blocks():
    hidden = jnp.full(200, 60)
    order = np.asarray(jax.jit(block_order, static_argnums=2)(KEY, hidden, GRID))
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(range(196), (200, 1)))
    mask = np.zeros((200, 196), bool)
    np.put_along_axis(mask, order[:, :60], True, axis=1)
    mask = mask.reshape(200, *GRID)
    # Of the right neighbours of hidden patches most are hidden: by chance 60 / 196.
    beside = mask[:, :, 1:][mask[:, :, :-1]].mean()
    assert beside > 0.7
    # Each image has its own, and no place is left out.
    assert len(np.unique(mask.reshape(200, -1), axis=0)) == 200
    assert mask.any(axis=0).all()


def test_weights_begin_and_grow_with_the_run():
    patches = MaskedPatches(progress_start=0.2, progress_end=0.6)
    hidden = jnp.ones((1, 4), bool)
    totals = [
        float(patches.weights(hidden, jnp.float32(p)).sum())
        for p in (0.1, 0.4, 0.6, 1.0)
    ]
    np.testing.assert_allclose(totals, [0, 0.5, 1, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ratio_min": 0.6}, "ratio_min <= ratio_max"),
        ({"views": 0.0}, "0 < views <= 1"),
        ({"weight": -1.0}, "must not be below 0"),
        ({"progress_start": 0.5}, "in this order"),
    ],
)
def test_unusable_settings_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        MaskedPatches(**fields)


def test_no_patch_to_hide_is_refused():
    with pytest.raises(ValueError, match="smaller patches or larger images"):
        MaskedPatches(ratio_max=0.1).draw(KEY, 4, (2, 2))


class TwoNetworks:
    """A forward whose student and teacher give what it holds, for 3 x 2 views."""

    progress = 1.0

    def __init__(self):
        r = np.random.default_rng(1)

        def make(*shape):
            return jnp.asarray(r.standard_normal(shape), jnp.float32)

        self.of = {name: make(6, 2, 2, 5) for name in ("online", "ema")}
        self.scores = {name: make(6, 7) for name in self.of}
        self.heads = {name: make(5, 7) for name in self.of}
        self.replaced = None

    def __call__(self, *, method=None, params="online", **inputs):
        if method == "score_patches":
            return {"scores": inputs["tokens"] @ self.heads[params]}
        if params == "online" and "replaced" in inputs:
            self.replaced = inputs["replaced"]
        grid = self.of[params]
        pooled = grid.mean(axis=(1, 2))
        return {
            "grid": grid,
            "pooled": pooled,
            "embedding": pooled,
            "scores": self.scores[params],
        }


@pytest.mark.parametrize("visible_weight", [0.0, 0.5])
def test_the_loss_of_patches_is_that_of_a_loop(visible_weight):
    forward = TwoNetworks()
    batch = {"views": jnp.zeros((3, 2, 8, 8, 1), jnp.uint8)}
    patches = MaskedPatches(
        ratio_min=0.25, ratio_max=0.75, weight=3.0, visible_weight=visible_weight
    )
    with_patches = SelfDistillation(patches=patches)

    @jax.jit
    def both():
        losses, metrics = with_patches(forward, batch, KEY)
        plain, _ = SelfDistillation()(forward, batch, KEY)
        return losses, metrics, plain, forward.replaced

    losses, metrics, plain, hidden = both()
    hidden = np.asarray(hidden)
    counted = np.ones_like(hidden) if visible_weight else hidden
    rows = forward.of["ema"].reshape(24, 5) @ forward.heads["ema"]
    shares = sinkhorn(rows / 0.04, jnp.asarray(counted).reshape(-1))
    predicted = forward.of["online"].reshape(24, 5) @ forward.heads["online"] / 0.1
    cross = np.asarray(-(shares * jax.nn.log_softmax(predicted)).sum(axis=1))
    cross = cross.reshape(6, 4)
    wanted = np.zeros(6)
    for view in range(6):
        if hidden[view].any():
            wanted[view] += 3.0 * cross[view][hidden[view]].mean()
        if visible_weight:
            wanted[view] += 0.5 * cross[view][~hidden[view]].mean()
    found = losses - plain
    np.testing.assert_allclose(found, wanted.reshape(3, 2).mean(axis=1), rtol=1e-4)
    assert metrics["patch_loss"] == pytest.approx(cross[hidden].mean(), rel=1e-5)


def test_eight_devices_hide_the_same_patches_and_give_the_loss_of_one():
    r = np.random.default_rng(4)
    views = jnp.asarray(r.standard_normal((16, 2, 4, 4, 1)), jnp.float32)
    head = jnp.asarray(r.standard_normal((4, 7)), jnp.float32)

    def forward(*, method=None, params="online", **inputs):
        if method == "score_patches":
            return {"scores": inputs["tokens"] @ head}
        image = inputs["image"][..., 0] * (2.0 if params == "ema" else 1.0)
        grid = image.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4)
        grid = grid.reshape(-1, 2, 2, 4)
        if "replaced" in inputs:
            hidden = inputs["replaced"].reshape(-1, 2, 2, 1)
            grid = jnp.where(hidden, 0.5, grid)
        pooled = grid.mean(axis=(1, 2))
        outputs = {"pooled": pooled, "embedding": pooled, "scores": pooled @ head}
        return {"grid": grid, **outputs}

    patches = MaskedPatches(ratio_min=0.3, ratio_max=0.75, visible_weight=0.5)
    objective = SelfDistillation(patches=patches)

    def loss(views):
        return objective(forward, {"views": views}, KEY)[0]

    one = jax.jit(loss)(views)
    place = layout.batch_sharding(make_mesh(8))
    eight = jax.jit(loss)(jax.device_put(views, place))
    np.testing.assert_allclose(eight, one, rtol=2e-5)
