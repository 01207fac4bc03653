"""SAM and schedule-free AdamW: formulas, places, FLOPs, what evaluations see."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from recipes import digits_tiny
from tiers import few
from tiny_runs import OF_PACKAGE, Net, rows, start

from big_vision_lite import train, trees
from big_vision_lite.runs import health, load
from big_vision_lite.runs.records import read_history
from big_vision_lite.runtime import sharding
from big_vision_lite.runtime.sharding import Mesh
from big_vision_lite.schedules import Average, Constant, WarmupCosine
from big_vision_lite.training import program
from big_vision_lite.training.gradient_point import (
    SAM,
    GradientPoint,
    ScheduleFreeAdamW,
    average_of,
)
from big_vision_lite.training.layerwise import Muon
from big_vision_lite.training.optimizers import SGD, AdamW

PEAK = Constant(peak=0.05)
recipe = digits_tiny.get_config


def loss_and_gradient(params, batch):
    def loss(params):
        logits = Net().apply({"params": params}, image=jnp.asarray(batch["image"]))
        picked = jax.nn.log_softmax(logits["logits"])
        return -picked[np.arange(32), batch["label"]].mean()

    return jax.value_and_grad(loss)(params)


def leaves(tree):
    return trees.flatten(jax.device_get(tree))


def close(found, expected, atol=1e-6):
    for name, value in leaves(expected).items():
        np.testing.assert_allclose(leaves(found)[name], value, atol=atol, err_msg=name)


def test_sam_takes_the_gradient_where_the_first_points_to():
    run = start(optimizer="sam")
    params, batch = jax.device_get(run.state.params), rows(seed=1)
    (metrics,) = run.advance(batch)
    loss, first = loss_and_gradient(params, batch)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(first)))
    up = jax.tree.map(lambda p, g: p + 0.2 * g / norm, params, first)
    higher, second = loss_and_gradient(up, batch)
    assert higher > loss + 0.01
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    size = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(second)))
    np.testing.assert_allclose(metrics["gradient_norm"], size, rtol=1e-5)
    clipped = jax.tree.map(lambda p, g: p - 0.05 * g / max(size, 1), params, second)
    close(run.state.params, clipped)


def test_sam_keeps_the_batch_statistics_of_the_first_pass():
    plain, sam = (start(Net(batch_norm=True), optimizer=o) for o in ("gradient", "sam"))
    before = leaves(sam.state.collections)
    for run in (plain, sam):
        run.advance(rows(seed=1))
    close(sam.state.collections, plain.state.collections, atol=0)
    assert any(np.any(x != before[n]) for n, x in leaves(sam.state.collections).items())


def test_a_step_of_sam_costs_two_gradients_of_flops():
    assert GradientPoint.of(SAM(base=AdamW(schedule=PEAK)), None).passes == 2
    mesh, counted = sharding.make_mesh(Mesh(), jax.devices()[:1]), []
    for optimizer in (AdamW(schedule=PEAK), SAM(base=AdamW(schedule=PEAK))):
        config = dataclasses.replace(recipe(), optimizer=optimizer, ema=None)
        spec = {"image": jax.ShapeDtypeStruct((64, 8, 8, 1), np.uint8)}
        spec["label"] = jax.ShapeDtypeStruct((64,), np.int32)
        with jax.set_mesh(mesh):
            counted.append(program.build(config, mesh, spec).flops_per_step)
    assert counted[1] == 2 * counted[0] > 0


def by_hand(optimizer, params, batches):
    """Algorithm 1 of the paper in float64 steps; yields (z, x, y before) a batch."""
    rate_of = optimizer.schedule.build(20)
    z = {n: np.float64(p) for n, p in leaves(params).items()}
    x, nu, total = dict(z), dict.fromkeys(z, 0.0), 0.0
    for step, batch in enumerate(batches):
        beta = optimizer.beta1
        y = {n: (1 - beta) * z[n] + beta * x[n] for n in z}
        at = trees.unflatten({n: np.float32(p) for n, p in y.items()})
        gradient = leaves(loss_and_gradient(at, batch)[1])
        norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in gradient.values()))
        rate = float(rate_of(step))
        total += rate**2
        share = rate**2 / total if total else 0.0
        for name, g in gradient.items():
            g = np.float64(g) * min(1, optimizer.clip_norm / norm)
            nu[name] = optimizer.beta2 * nu[name] + (1 - optimizer.beta2) * g**2
            root = np.sqrt(nu[name] / (1 - optimizer.beta2 ** (step + 1)))
            decay = optimizer.weight_decay * name.endswith("kernel")
            z[name] = (
                z[name]
                - rate * g / (root + optimizer.epsilon)
                - rate / optimizer.schedule.peak * decay * y[name]
            )
            x[name] = (1 - share) * x[name] + share * z[name]
    return z, x


def test_schedule_free_is_the_papers_algorithm(monkeypatch):
    optimizer = ScheduleFreeAdamW(
        schedule=Constant(peak=0.05, warmup_steps=2), weight_decay=0.01
    )
    monkeypatch.setitem(OF_PACKAGE, "warm", optimizer)
    run = start(optimizer="warm")
    params = jax.device_get(run.state.params)
    batches = [rows(seed=seed) for seed in range(4)]
    run.advance(*batches)
    z, x = by_hand(optimizer, params, batches)
    for name, value in leaves(run.state.params).items():
        # Adam divides by small gradients: rounding counts there.
        np.testing.assert_allclose(value, z[name], atol=2e-4, err_msg=name)
        np.testing.assert_allclose(leaves(run.state.ema)[name], x[name], atol=2e-4)
    apart = max(np.abs(z[n] - x[n]).max() for n in z)
    assert apart > 0.01


def test_schedule_free_is_optaxs():
    theirs = optax.contrib.schedule_free_adamw(0.05, b1=0.9, b2=0.999, eps=1e-8)
    optimizer = ScheduleFreeAdamW(schedule=PEAK, weight_decay=0.0, clip_norm=None)
    ours, point = optimizer.build(20), GradientPoint.of(optimizer, None)
    target = jnp.linspace(-1, 1, 12).reshape(3, 4)

    def gradient(params):
        return jax.grad(lambda p: jnp.sum((p["kernel"] - target) ** 4))(params)

    z = x = y = {"kernel": jnp.zeros((3, 4))}
    state, other = ours.init(z), theirs.init(y)
    for _ in range(30):
        at = point.interpolated(z, x)
        np.testing.assert_allclose(at["kernel"], y["kernel"], atol=1e-5)
        updates, state = ours.update(gradient(at), state, at)
        z = optax.apply_updates(z, updates)
        decay = point.decay(state, None)
        x = {"kernel": decay * x["kernel"] + (1 - decay) * z["kernel"]}
        updates, other = theirs.update(gradient(y), other, y)
        y = optax.apply_updates(y, updates)
    expected = optax.contrib.schedule_free_eval_params(other, y)
    np.testing.assert_allclose(x["kernel"], expected["kernel"], atol=1e-5)


PLACES = {
    "fsdp": dict(devices=8, fsdp=8),
    "both": dict(devices=8, fsdp=4, micro_batches=2),
    "zero": dict(devices=8, fsdp=8, rules="optimizer"),
}


@pytest.mark.parametrize(
    "optimizer",
    few(("lion", "lars", "lamb", "muon", "sam", "schedule_free"), "muon", "sam"),
)
@pytest.mark.parametrize(
    "place",
    ["both", *(pytest.param(p, marks=pytest.mark.slow) for p in ("fsdp", "zero"))],
)
def test_wherever_parameters_live_the_step_is_that_of_one_device(optimizer, place):
    one, other = start(optimizer=optimizer), start(optimizer=optimizer, **PLACES[place])
    losses = [
        [m["loss"] for m in run.advance(*(rows(seed=s) for s in range(3)))]
        for run in (one, other)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    for name, value in leaves(one.state).items():
        # Where a gradient is zero but for rounding, Lion and Adam move by its sign.
        found = leaves(other.state)[name]
        far = np.abs(np.float64(found) - value) > 1e-4 + 1e-4 * np.abs(value)
        assert far.mean() < 0.01, name
    split = 0
    for name, leaf in trees.flatten(other.state.opt_state).items():
        if name.endswith("block_00/dense/kernel"):
            split += 1
            assert not leaf.sharding.is_fully_replicated, name
    assert split or optimizer == "sam"
    assert other.step._cache_size() == 1


def of_a_run(name):
    optimizer = OF_PACKAGE[name]
    if isinstance(optimizer, Muon):
        optimizer = Muon(schedule=optimizer.schedule)  # A ViT's class names its blocks.
    config = recipe()
    evaluators = {"test": config.evaluators["test"]}
    small = dict(num_steps=8, evaluators=evaluators, ema=None)
    return dataclasses.replace(config, optimizer=optimizer, **small)


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_PACKAGE)
def test_a_resumed_run_is_the_straight_one_bit_for_bit(name, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    straight = jax.device_get(train.train(of_a_run(name), workdir, quiet=True))
    shutil.rmtree(workdir / "checkpoints" / "8")
    resumed = jax.device_get(train.train(of_a_run(name), workdir, quiet=True))
    for (leaf, a), b in zip(
        leaves(straight).items(), leaves(resumed).values(), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=leaf)
    lines = [r for r in read_history(workdir) if "train/loss" in r]
    assert [r["step"] for r in lines] == list(range(1, 9))
    score = "test_ema/accuracy" if name == "schedule_free" else "test/accuracy"
    assert [r["step"] for r in read_history(workdir) if score in r] == [4, 8]
    weights = load.open_weights(str(workdir)).variables
    used = straight.ema if name == "schedule_free" else straight.params
    for leaf, value in leaves(used).items():
        np.testing.assert_array_equal(weights[leaf], value, err_msg=leaf)


def test_advice_for_sam_names_the_fields_of_its_base(tmp_path):
    base = SGD(schedule=Constant(peak=0.3), clip_norm=None)
    config = dataclasses.replace(recipe(), optimizer=SAM(base=base))
    advice = health.advise(config, epath.Path(tmp_path))
    assert "--config.optimizer.base.schedule.peak=0.1 " in advice
    assert "--config.optimizer.base.clip_norm=1.0" in advice


def test_the_average_of_schedule_free_is_in_the_place_of_an_ema():
    optimizer = ScheduleFreeAdamW(schedule=PEAK, recalibrate_statistics=7)
    assert average_of(optimizer, None).recalibrate_statistics == 7
    assert average_of(SGD(schedule=PEAK), None) is None
    own = Average(start=0.9)
    assert average_of(SGD(schedule=PEAK), own) is own
    with pytest.raises(ValueError, match=r"average of its own.*--config.ema=none"):
        average_of(optimizer, own)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAM(base=SGD(schedule=PEAK), radius=0.0), "radius=0.0 must be above"),
        (
            lambda: SAM(base=ScheduleFreeAdamW(schedule=PEAK)),
            "both move the point of the gradient",
        ),
        (
            lambda: ScheduleFreeAdamW(schedule=WarmupCosine(peak=0.1)),
            r"use schedule=Constant\(peak=0.1, warmup_steps=...\)",
        ),
        (
            lambda: ScheduleFreeAdamW(schedule=Constant(peak=0.1, cooldown_steps=5)),
            "without cooldown",
        ),
        (lambda: ScheduleFreeAdamW(schedule=PEAK, beta1=1.0), "beta1=1.0 must be"),
    ],
)
def test_values_that_make_no_optimizer_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
