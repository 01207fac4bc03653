"""Clusters of hidden patches: the loss of CAPI, and which patches are hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_context import make_mesh

from big_vision_lite.models.masked_model import rolled_blocks
from big_vision_lite.objectives.clusters import ClusterPrediction
from big_vision_lite.objectives.self_distillation import sinkhorn
from big_vision_lite.runtime import layout

KEY = jax.random.key(0)
R = np.random.default_rng(2)
GRID = R.standard_normal((6, 2, 2, 5)).astype(np.float32)
CLUSTERS = R.standard_normal((5, 8)).astype(np.float32)
SCORES = R.standard_normal((6, 4, 8)).astype(np.float32)
MASKED = np.arange(4) != np.arange(6)[:, None] % 4


def forward(*, method=None, params="online", whole=False, **inputs):
    if method == "cluster":
        return {"scores": inputs["features"] @ CLUSTERS}
    if whole:
        assert params == "ema"
        return {"grid": jnp.asarray(GRID)}
    return {
        "scores": jnp.asarray(SCORES),
        "masked": jnp.asarray(MASKED),
        "pooled": jnp.asarray(GRID[:, 0, 0]),
    }


@pytest.mark.parametrize("positionwise", [True, False])
def test_the_loss_is_that_of_a_loop(positionwise):
    objective = ClusterPrediction(positionwise=positionwise)
    batch = {"image": jnp.zeros((6, 8, 8, 1), jnp.uint8)}
    losses, metrics = jax.jit(lambda: objective(forward, batch, KEY))()
    scores = jnp.asarray(GRID.reshape(6, 4, 5) @ CLUSTERS)
    if positionwise:
        parts = [sinkhorn(scores[:, i] / 0.06, jnp.ones(6, bool)) for i in range(4)]
        targets = np.stack(parts, axis=1)
    else:
        flat = sinkhorn(scores.reshape(24, 8) / 0.06, jnp.ones(24, bool))
        targets = np.asarray(flat).reshape(6, 4, 8)
    predicted = -(targets * jax.nn.log_softmax(SCORES / 0.12)).sum(axis=-1)
    own = -(targets * jax.nn.log_softmax(scores / 0.12)).sum(axis=-1)
    wanted = [predicted[i][MASKED[i]].mean() + own[i].mean() for i in range(len(GRID))]
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    used = len(np.unique(targets.argmax(axis=-1)))
    assert metrics["clusters_used"] == used


def test_visible_patches_are_one_rolled_block():
    order = np.asarray(rolled_blocks(KEY, 300, 6, (4, 5)))
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(range(20), (300, 1)))
    seen = np.zeros((300, 20), bool)
    np.put_along_axis(seen, order[:, :6], True, axis=1)
    seen = seen.reshape(300, 4, 5)
    for one in seen:
        # Rolled so that it begins in the corner, it fills a rectangle but its last row.
        fits = [np.roll(one, (-t, -m), (0, 1)) for t in range(4) for m in range(5)]
        assert any(_is_block(x) for x in fits)
    assert seen.mean(axis=0).min() > 0.15
    assert len(np.unique(seen.reshape(300, -1), axis=0)) == 40


def _is_block(x):
    rows = x.sum(axis=1)
    width, height = rows[0], int((rows > 0).sum())
    full = all(rows[: height - 1] == width) and 0 < rows[height - 1] <= width
    return bool(full and all(x[i, : rows[i]].all() for i in range(height)))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="above 0"):
        ClusterPrediction(temperature=0.0)
    with pytest.raises(ValueError, match="every cluster the same share"):
        ClusterPrediction()(forward, {"image": jnp.zeros((1, 8, 8, 1))}, KEY)


def test_eight_devices_give_the_loss_of_one():
    r = np.random.default_rng(5)
    images = jnp.asarray(r.standard_normal((16, 2, 2, 5)), jnp.float32)

    def forward(*, method=None, params="online", whole=False, **inputs):
        if method == "cluster":
            return {"scores": inputs["features"] @ CLUSTERS}
        grid = inputs["image"]
        if whole:
            return {"grid": grid}
        tokens = grid.reshape(16, 4, 5)
        masked = jnp.arange(4) != jnp.arange(16)[:, None] % 4
        scores = tokens[:, ::-1] @ CLUSTERS
        return {"scores": scores, "masked": masked, "pooled": grid[:, 0, 0]}

    def loss(images):
        return ClusterPrediction()(forward, {"image": images}, KEY)[0]

    one = jax.jit(loss)(images)
    place = layout.batch_sharding(make_mesh(8))
    eight = jax.jit(loss)(jax.device_put(images, place))
    np.testing.assert_allclose(eight, one, rtol=2e-5)
