"""Norms against float64: where the mean is large, in groups of rows, on devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import gradients, rows, start

from big_vision_lite import trees
from big_vision_lite.models.bit import Stem
from big_vision_lite.models.blocks.batch_norm import BatchNorm, Statistics
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import Dtype, GroupNorm, LayerNorm
from big_vision_lite.models.resnet import ResNet

CHANNELS = 6
# Axes of [B, H, W, groups of channels, channels of a group], groups, and epsilon.
NORMS = {
    "batch": (BatchNorm(), (0, 1, 2), CHANNELS, 1e-5),
    "layer": (LayerNorm(), (4,), 1, 1e-6),
    "group": (GroupNorm(groups=2, epsilon=1e-5), (1, 2, 4), 2, 1e-5),
}


def apply(norm, x, params=None, stats=None):
    """Returns (normalised, changed statistics) of a norm in training."""
    variables = norm.init(jax.random.key(0), x)
    variables = {**variables, "params": params or variables["params"]}
    if not isinstance(norm, BatchNorm):
        return norm.apply(variables, x), {}
    if stats is not None:
        variables["batch_stats"] = stats
    y, changed = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    return y, changed["batch_stats"]


def exact(kind, x, upstream):
    """Returns the normalised x and the gradient of (y * upstream).sum(), in float64."""
    _, axes, groups, epsilon = NORMS[kind]
    shape = (*x.shape[:-1], groups, x.shape[-1] // groups)
    x, g = (np.asarray(z, np.float64).reshape(shape) for z in (x, upstream))
    deviation = np.sqrt(x.var(axes, keepdims=True) + epsilon)
    y = (x - x.mean(axes, keepdims=True)) / deviation
    along = y * (g * y).mean(axes, keepdims=True)
    gradient = (g - g.mean(axes, keepdims=True) - along) / deviation
    return y, gradient


def drawn(ratio, seed=0, shape=(8, 5, 4, CHANNELS)):
    """Returns values of which the mean is `ratio` deviations, and a gradient of y."""
    rng = np.random.default_rng(seed)
    x = ratio + rng.normal(0, 1, shape)
    return np.float32(x), np.float32(rng.normal(size=shape))


# float32 itself holds x to 3e-5 of a deviation at 1000. In one pass from zero, all
# would be off by 3e-2 at 100 and by more than 1 at 1000.
@pytest.mark.parametrize("ratio", [0, 100, 1000])
@pytest.mark.parametrize("kind", NORMS)
def test_large_means_cost_no_digits_of_the_result_or_its_gradient(kind, ratio):
    x, upstream = drawn(ratio)
    norm = NORMS[kind][0]

    def loss(x):
        y, _ = apply(norm, x)
        return (y * upstream).sum(), y

    (_, y), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    wanted, wanted_gradient = exact(kind, x, upstream)
    atol = 2e-5 + 1e-6 * ratio
    np.testing.assert_allclose(y, wanted.reshape(x.shape), atol=atol)
    np.testing.assert_allclose(gradient, wanted_gradient.reshape(x.shape), atol=atol)


@pytest.mark.parametrize("kind", NORMS)
def test_scales_and_biases_have_the_gradients_of_the_formula(kind):
    x, upstream = drawn(100)
    y, _ = exact(kind, x, upstream)
    params = {"scale": jnp.full(CHANNELS, 2.0), "bias": jnp.full(CHANNELS, 3.0)}

    def loss(params):
        z, _ = apply(NORMS[kind][0], jnp.asarray(x), params)
        return (z * upstream).sum()

    found = jax.jit(jax.grad(loss))(params)
    each = (upstream * y.reshape(x.shape)).sum((0, 1, 2))
    np.testing.assert_allclose(found["scale"], each, rtol=1e-3, atol=3e-3)
    np.testing.assert_allclose(found["bias"], upstream.sum((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize("kind", NORMS)
def test_bfloat16_loses_no_more_than_its_own_digits(kind):
    # Statistics in bfloat16, or about nothing at larger ratios, would be off by 1.
    x = drawn(30)[0].astype(jnp.bfloat16)
    y, stats = apply(NORMS[kind][0].clone(dtype=Dtype.BFLOAT16), jnp.asarray(x))
    assert y.dtype == jnp.bfloat16
    assert all(s.dtype == jnp.float32 for s in jax.tree.leaves(stats))
    wanted, _ = exact(kind, x, x)
    # 8 bits of a result of up to 4.
    np.testing.assert_allclose(np.float32(y), wanted.reshape(x.shape), atol=0.02)


def test_batch_norm_in_bfloat16_counts_from_the_running_mean():
    rng = np.random.default_rng(0)
    shape = (8, 5, 4, CHANNELS)
    # Whole numbers, which bfloat16 holds up to 256: no rounding but the norm's own.
    x = jnp.asarray(rng.integers(196, 206, shape), jnp.bfloat16)
    stats = {"mean": jnp.full(CHANNELS, 200.0), "variance": jnp.ones(CHANNELS)}
    _, changed = apply(BatchNorm(), x, stats=stats)
    variance = (np.asarray(changed["variance"]) - 0.9) * 10
    wanted = np.asarray(x, np.float64).var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(variance, wanted, rtol=1e-5)


@pytest.mark.parametrize("groups", [2, 8])
def test_every_group_of_rows_is_normalised_by_itself(groups):
    x, _ = drawn(3)
    y, stats = apply(BatchNorm(statistics_groups=groups), jnp.asarray(x))
    parts = np.split(np.asarray(x, np.float64), groups)
    alone = [apply(BatchNorm(), jnp.asarray(part, jnp.float32)) for part in parts]
    np.testing.assert_allclose(y, np.concatenate([z for z, _ in alone]), atol=1e-5)
    # The running averages are the averages of those that the groups would have had.
    for name in ("mean", "variance"):
        average = np.mean([each[name] for _, each in alone], axis=0)
        np.testing.assert_allclose(stats[name], average, rtol=1e-5)
    means = [part.mean((0, 1, 2)) for part in parts]
    variances = [part.var((0, 1, 2), ddof=1) for part in parts]
    np.testing.assert_allclose(stats["mean"], 0.1 * np.mean(means, 0), rtol=1e-5)
    wanted = 0.9 + 0.1 * np.mean(variances, 0)
    np.testing.assert_allclose(stats["variance"], wanted, rtol=1e-5)


def resnet(**overrides):
    """A unit and the stem, five norms, for images of 8 px."""
    fields = dict(stages=(1,), width=8, stem_width=8, stem=Stem.SMALL)
    head = Classifier(num_classes=10)
    return ResNet(**{**fields, "head": head, **overrides})


# 4 groups lie on two devices each, 16 are two a device, 1 is on all.
@pytest.mark.parametrize(
    "groups", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8, 16))]
)
def test_groups_are_the_same_on_one_and_on_eight_devices(groups):
    found = {}
    for devices, fsdp in ((1, 1), (8, 1), (8, 4)):
        run = start(resnet(statistics_groups=groups), devices=devices, fsdp=fsdp)
        (metrics,) = run.advance(rows())
        stats = trees.flatten(jax.device_get(run.state.collections))
        found[devices, fsdp] = {
            "loss": metrics["loss"],
            **gradients(run.state),
            **stats,
        }
    one = found.pop((1, 1))
    for many in found.values():
        for name, value in one.items():
            largest = np.abs(value).max()
            assert np.abs(many[name] - value).max() <= 1e-5 * largest + 1e-7, name


def collectives(model):
    """Returns the names of the collectives in a step on eight devices, 48 rows."""
    run = start(model, devices=8)
    with jax.set_mesh(run.mesh):
        lowered = run.step.lower(run.abstract, run.put(rows(48)))
    text = lowered.compile().as_text()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    for line in text.splitlines():
        if kind := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
            # No activation moves: those of a device are 6 rows.
            assert not re.search(r"\[(6|48),\d+,\d+", kind[1]), line
    return re.findall(rf" ({kinds})(?:-start)?\(", text)


@pytest.mark.parametrize(
    "dtype", [Dtype.FLOAT32, pytest.param(Dtype.BFLOAT16, marks=pytest.mark.slow)]
)
def test_a_norm_costs_one_collective_each_way_and_groups_none(dtype):
    model = resnet(dtype=dtype)
    frozen = collectives(model.clone(statistics=Statistics.FROZEN))
    whole = collectives(model)
    norms = 5
    assert whole.count("all-gather") <= norms
    # XLA:CPU may combine all that waits for nothing; it never needs more than these.
    assert len(whole) <= len(frozen) + 2 * norms, (whole, frozen)
    for groups in (8, 16):
        apart = collectives(model.clone(statistics_groups=groups))
        assert set(apart) == {"all-reduce"}
        # The running averages, once, at the end.
        assert len(apart) <= len(frozen) + 1, (apart, frozen)


def test_groups_that_do_not_divide_the_batch_or_do_nothing_are_refused():
    message = r"statistics_groups=3 does not divide a batch of 8.*statistics_groups=2"
    with pytest.raises(ValueError, match=message):
        apply(BatchNorm(statistics_groups=3), jnp.asarray(drawn(0)[0]))
    with pytest.raises(ValueError, match="one value a channel.*each of 8 groups of 1"):
        apply(BatchNorm(statistics_groups=8), jnp.ones((8, 1, 1, CHANNELS)))
    with pytest.raises(ValueError, match="statistics_groups=0: must be at least 1"):
        resnet(statistics_groups=0)
    with pytest.raises(ValueError, match="statistics_groups=2 with statistics=frozen"):
        resnet(statistics_groups=2, statistics=Statistics.FROZEN)
