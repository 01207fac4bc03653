"""Batch statistics of averaged parameters."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from big_vision_lite import train, trees
from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import Decode, Resize
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.models.blocks.batch_norm import Statistics
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.resnet import Block, ResNet
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.runs import load
from big_vision_lite.runtime.processes import Stopped
from big_vision_lite.schedules import Average, Constant
from big_vision_lite.training import recalibration
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.gradient_point import ScheduleFreeAdamW
from big_vision_lite.training.optimizers import SGD
from big_vision_lite.training.step import make_eval_step
from tests.tiny_runs import Net, rows, start


def resnet(**overrides):
    fields = dict(
        stages=(1,),
        width=8,
        stem_width=8,
        block=Block.BASIC,
        head=Classifier(num_classes=10),
        mean=(127.5,),
        std=(127.5,),
    )
    return ResNet(**{**fields, **overrides})


def measure(run, model, *batches):
    step = recalibration.make_statistics_step(model, run.abstract)
    with jax.set_mesh(run.mesh):
        totals = recalibration.start(run.abstract)
        for batch in batches:
            totals = step(run.state, run.put(batch), totals)
        return jax.device_get(recalibration.measured(totals))


def test_running_statistics_are_averaged_as_the_parameters_are():
    run = start(Net(batch_norm=True), ema=0.75)
    expected = jax.device_get(run.state.ema_statistics["batch_stats"])
    for seed in (1, 2):
        run.advance(rows(seed=seed))
        live = jax.device_get(run.state.collections["batch_stats"])
        expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, expected, live)
    found = jax.device_get(run.state.ema_statistics["batch_stats"])
    for a, b, now in zip(*map(jax.tree.leaves, (found, expected, live)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        assert np.abs(a - now).max() > 1e-4


def test_a_teacher_uses_the_averaged_statistics():
    def objective(forward, batch, rng):
        teacher = forward(image=batch["image"], params="ema")["logits"]
        student = forward(image=batch["image"])["logits"]
        return (student - teacher).mean(-1), {"teacher": teacher.mean(-1)}

    run = start(Net(batch_norm=True), objective=objective, ema=0.5)
    run.advance(rows(), rows(seed=1))
    state = jax.device_get(run.state)
    variables = {"params": state.ema, **state.ema_statistics}
    expected = Net(batch_norm=True).apply(variables, rows()["image"])["logits"].mean()
    (metrics,) = run.advance(rows())
    np.testing.assert_allclose(metrics["teacher"], expected, rtol=1e-5)


@pytest.mark.parametrize("model", [Net(batch_norm=True), resnet()])
def test_measured_statistics_are_those_of_all_images_together(model):
    """The first norm of each sees what no other norm has changed."""
    run = start(model, ema=0.5)
    run.advance(rows())
    found = trees.flatten(
        measure(run, model, rows(seed=1), rows(seed=2), rows(seed=3))["batch_stats"]
    )
    state = jax.device_get(run.state)
    images = np.concatenate([rows(seed=seed)["image"] for seed in (1, 2, 3)])
    if isinstance(model, ResNet):
        _, caught = model.apply(
            {"params": state.ema, **state.ema_statistics},
            jnp.asarray(images),
            capture_intermediates=lambda module, _: module.name == "stem",
        )
        (values,) = caught["intermediates"]["stem"]["__call__"]
        mean, variance = found["stem_norm/mean"], found["stem_norm/variance"]
        values = np.asarray(values, np.float64).reshape(-1, values.shape[-1])
        # As torch: of each batch the sample variance.
        part = values.reshape(3, -1, values.shape[-1])
        expected = part.var(1, ddof=1).mean(0) + part.mean(1).var(0)
    else:
        values = nn.Dense(16).apply(
            {"params": state.ema["stem"]}, images.reshape(96, -1) / np.float32(255)
        )
        mean, variance = found["norm/mean"], found["norm/var"]
        values = np.asarray(values, np.float64)
        expected = values.var(0)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, expected, rtol=1e-5)


def test_eight_devices_measure_what_one_does_and_the_state_stays():
    found = {}
    for devices in (1, 8):
        run = start(resnet(), ema=0.5, devices=devices)
        run.advance(rows())
        before = jax.device_get(run.state)
        found[devices] = measure(run, resnet(), rows(seed=1), rows(seed=2))
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(run.state))
    assert found[1]["batches"] == found[8]["batches"] == 2
    for a, b in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_frozen_modules_keep_their_statistics():
    frozen = ("stem/.*", "stem_norm/.*")
    run = start(resnet(), ema=0.5, freeze=frozen)
    run.advance(rows())
    found = trees.flatten(measure(run, resnet(), rows(seed=1))["batch_stats"])
    kept = trees.flatten(jax.device_get(run.state.ema_statistics["batch_stats"]))
    same = {name for name in kept if np.array_equal(kept[name], found[name])}
    assert same == {"stem_norm/mean", "stem_norm/variance"}


def test_only_models_that_change_statistics_are_measured():
    for model, expected in (
        (resnet(), True),
        (resnet(statistics=Statistics.FROZEN), False),
        (Net(), False),
    ):
        abstract = start(model, ema=0.5).abstract
        assert recalibration.keeps_statistics(model, abstract) == expected
        assert bool(recalibration.saved(abstract).recalibrated) == (model != Net())


def test_evaluation_prefers_measured_statistics_to_averaged_ones():
    model = resnet()
    run = start(model, ema=0.5)
    run.advance(rows(), rows(seed=1))
    measured = measure(run, model, rows())
    evaluate = make_eval_step(model, lambda f, b, _: f(image=b["image"])["logits"])
    state = jax.device_get(run.state)
    for recalibrated in (None, measured):
        used = dataclasses.replace(run.state, recalibrated=recalibrated)
        statistics = (recalibrated or state.ema_statistics)["batch_stats"]
        variables = {"params": state.ema, "batch_stats": statistics}
        expected = model.apply(variables, jnp.asarray(rows()["image"]))["logits"]
        with jax.set_mesh(run.mesh):
            found = evaluate(used, run.put(rows()))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        named = state_lib.variables(used, averaged=True)
        for name, leaf in trees.flatten(statistics).items():
            np.testing.assert_array_equal(named[f"batch_stats/{name}"], leaf)


@pytest.mark.parametrize("count", [-1])
def test_a_negative_number_of_batches_is_refused(count):
    with pytest.raises(ValueError, match=r"=-1 is no number of batches; use 0"):
        Average(recalibrate_statistics=count)


def recipe(batches=3):
    ops = (Decode(channels=1), Resize(size_px=8))
    return TrainConfig(
        num_steps=4,
        model=resnet(),
        objective=SoftmaxClassification(),
        data=Stream(source=Digits(), ops=ops, batch_size=64),
        preprocess=ops,
        optimizer=SGD(schedule=Constant(peak=0.05)),
        ema=Average(start=0.9, recalibrate_statistics=batches),
        evaluators={
            "test": Classification(
                source=Digits(split="test"), batch_size=64, every_steps=2
            )
        },
        checkpoints=Checkpoints(every_steps=3, keep_latest=9),
    )


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found: dict[int, dict] = {}
    for line in map(json.loads, lines):
        found.setdefault(line["step"], {}).update(line)
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = epath.Path(tmp_path_factory.mktemp("straight") / "run")
    return folder, train.train(recipe(), folder, quiet=True)


def test_scores_and_weights_have_the_measured_statistics(straight):
    folder, state = straight
    assert state.recalibrated is None
    assert {s: r.get("statistics_batches") for s, r in records(folder).items()} == {
        2: 3,
        4: 3,
    }
    loaded, manifest = load.load_variables(folder / "checkpoints" / "4")
    saved = load.load(folder)
    named = state_lib.variables(saved.state, averaged=True)
    live = trees.flatten(state.collections)
    for name, leaf in named.items():
        np.testing.assert_array_equal(loaded[name], leaf)
        if name in live:
            assert np.abs(leaf - live[name]).max() > 1e-3, name
    assert recalibration.describe(saved.state).endswith("of 3 training batches")


@pytest.mark.slow
def test_schedule_free_weights_get_statistics_of_their_own(tmp_path):
    optimizer = ScheduleFreeAdamW(
        schedule=Constant(peak=0.05), recalibrate_statistics=3
    )
    config = dataclasses.replace(recipe(), optimizer=optimizer, ema=None)
    folder = epath.Path(tmp_path / "run")
    train.train(config, folder, quiet=True)
    counts = {s: r.get("statistics_batches") for s, r in records(folder).items()}
    assert counts == {2: 3, 4: 3}
    assert "test_ema/accuracy" in records(folder)[4]
    saved = load.load(folder)
    assert recalibration.describe(saved.state).endswith("of 3 training batches")


def test_a_resumed_run_measures_the_same_bit_for_bit(straight, tmp_path):
    folder, state = straight
    again = epath.Path(tmp_path / "run")
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "4")
    resumed = train.train(recipe(), again, quiet=True)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (state, resumed)))
    for step in (2, 4):
        first, second = records(folder)[step], records(again)[step]
        for name in first:
            if name.startswith(("test_ema/", "statistics")):
                assert first[name] == second[name], name
    for a, b in zip(
        *(
            load.load_variables(f / "checkpoints" / "4")[0].values()
            for f in (folder, again)
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_save_in_a_hurry_keeps_the_averaged_statistics(
    straight, tmp_path, monkeypatch
):
    """A machine that is about to be taken away gets no passes over training data."""
    folder, state = straight
    hurried = epath.Path(tmp_path / "run")
    agreed = train.Run.note

    def note(run, step, metrics):
        agreed(run, step, metrics)
        run._leaving = step == 2

    with monkeypatch.context() as patched:
        patched.setattr(train.Run, "note", note)
        patched.setattr(
            train.Run, "stopped", lambda run, step: Stopped("SIGTERM", step, folder)
        )
        with pytest.raises(Stopped):
            train.train(recipe(), hurried, quiet=True)
    saved = load.load(hurried).state
    assert int(saved.recalibrated["batches"]) == 0
    for a, b in zip(
        jax.tree.leaves(saved.recalibrated["batch_stats"]),
        jax.tree.leaves(saved.ema_statistics["batch_stats"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    resumed = train.train(recipe(), hurried, quiet=True)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (state, resumed)))
    # Its evaluation was due at the step of the save, and measured after the resume.
    assert records(hurried)[2]["statistics_batches"] == 3
    assert (
        records(hurried)[2]["test_ema/accuracy"]
        == records(folder)[2]["test_ema/accuracy"]
    )
