import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp
from outside.masked_autoencoder import MaskedAutoencoder
from tiny_runs import Net, rows, start, tiny_vit

from big_vision_lite import train, trees
from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import Decode
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits
from big_vision_lite.models.blocks.layers import Dtype, Remat
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.recipes import command_line
from big_vision_lite.runs import health
from big_vision_lite.runs.health import Monitor
from big_vision_lite.runtime import sharding
from big_vision_lite.schedules import Constant
from big_vision_lite.training import program
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.optimizers import SGD
from big_vision_lite.types import Model, Objective


def recipe(**overrides) -> TrainConfig:
    fields = dict(
        num_steps=12,
        model=Net(),
        objective=SoftmaxClassification(),
        data=Stream(source=Digits(), ops=(Decode(channels=1),), batch_size=32),
        preprocess=(Decode(channels=1),),
        optimizer=SGD(schedule=Constant(peak=0.1, warmup_steps=4)),
        log_every_steps=4,
        checkpoints=Checkpoints(every_steps=100),
    )
    return TrainConfig(**{**fields, **overrides})


def monitor(tmp_path, config=None, num_steps=12):
    return Monitor(
        config or recipe(),
        num_steps,
        epath.Path(tmp_path),
        lambda step: rows(seed=step),
    )


def metrics(loss=1.0, norm=2.0, finite=True):
    values = {"loss": loss, "gradient_norm": norm, "accuracy": 0.5, "finite": finite}
    return {name: jnp.asarray(value) for name, value in values.items()}


def test_the_record_is_of_the_newest_step_alone(tmp_path):
    watch = monitor(tmp_path)
    assert watch.fetch_and_check(start().state) == {}
    for step in (1, 2, 3):
        watch.add(step, metrics(loss=float(step)))
    record = watch.fetch_and_check(start().state)
    assert record == {
        "train/loss": 3.0,
        "train/gradient_norm": 2.0,
        "train/accuracy": 0.5,
        "train/learning_rate": pytest.approx(0.1 * 2 / 4),
    }
    assert watch.fetch_and_check(start().state) == {}


def test_the_learning_rate_on_record_is_the_one_the_step_used(tmp_path):
    # Read off a parameter: plain descent moves it by the rate times the gradient.
    config = recipe(optimizer=SGD(schedule=Constant(peak=0.5, warmup_steps=4)))
    watch = monitor(tmp_path, config)
    schedule = config.optimizer.schedule.build(12)
    found = []
    for step in (1, 2, 5, 12):
        watch.add(step, metrics())
        found.append(watch.fetch_and_check(start().state)["train/learning_rate"])
    assert found == [0.0, 0.125, 0.5, 0.5]
    assert found == [float(schedule(step - 1)) for step in (1, 2, 5, 12)]


def test_no_step_that_is_not_finite_goes_by_unseen(tmp_path):
    watch = monitor(tmp_path)
    state = start().state
    for step in range(1, 5):
        bad = step == 2
        watch.add(step, metrics(norm=float(step), finite=not bad))
    with pytest.raises(FloatingPointError) as caught:
        watch.fetch_and_check(state)
    message = str(caught.value)
    assert message.startswith("Loss not finite at step 2. First bad tensor: none in a")
    assert "Gradient norm 1 -> 2 in 2 steps" in message
    assert f"learning rate 2.50e-02. Saved: {tmp_path}/crash/step_2" in message
    # Once told, it begins anew.
    assert watch.fetch_and_check(state) == {}


def explained(model, state, batch=None):
    return health.explain(
        7,
        state,
        batch or {n: jnp.asarray(x) for n, x in rows().items()},
        model,
        [{"gradient_norm": 1.2}, {"gradient_norm": np.float32(np.inf)}],
        1e-3,
        epath.Path("runs/x/crash/step_7"),
        "Try another recipe.",
    )


def set_leaf(state, name, value):
    flat = trees.flatten(state.params)
    flat[name] = flat[name].at[(0,) * flat[name].ndim].set(value)
    return dataclasses.replace(state, params=trees.unflatten(flat))


def test_a_parameter_that_is_not_finite_is_named():
    state = set_leaf(start().state, "block_01/dense/kernel", jnp.nan)
    assert "First bad tensor: parameter block_01/dense/kernel." in explained(
        Net(), state
    )


class Explodes(nn.Module, Model, kw_only=True):
    """Overflows in the middle; what comes later, and deeper, is bad because of it."""

    @nn.compact
    def __call__(self, image, *, train=False):
        x = image.astype(jnp.float32).reshape(image.shape[0], -1)
        x = nn.Dense(4, name="zz_first")(x)
        x = Power(name="middle")(x)
        return {"logits": nn.Dense(10, name="a_last")(nn.Dense(4, name="a")(x))}


class Power(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.exp(jnp.exp(jnp.abs(nn.Dense(4, name="inner")(x)) + 100))


def test_the_first_bad_module_is_named_not_those_after_it():
    state = start(Explodes()).state
    message = explained(Explodes(), state)
    assert (
        "First bad tensor: the output of middle (the one before, middle/inner, h"
        in (message)
    )


@pytest.mark.parametrize("remat", [Remat.NONE, Remat.FULL])
def test_a_bad_block_of_a_vit_is_named_by_its_innermost_module(remat):
    model = tiny_vit(depth=2, remat=remat)
    state = start(model).state
    # Finite weights, infinite product.
    big = jnp.full_like(
        state.params["encoder"]["block_00"]["mlp"]["out"]["kernel"], 3e38
    )
    flat = trees.flatten(state.params) | {"encoder/block_00/mlp/out/kernel": big}
    state = dataclasses.replace(state, params=trees.unflatten(flat))
    message = explained(model, state)
    assert "bad tensor: the output of encoder/block_00/mlp/out (the one be" in message


def test_bad_images_are_named():
    batch = {"image": jnp.full((4, 8, 8, 1), jnp.nan), "label": jnp.zeros(4, jnp.int32)}
    message = explained(Net(), start().state, batch)
    assert "First bad tensor: the images themselves." in message


def test_what_to_try_can_be_typed_and_is_not_what_the_recipe_does_already(tmp_path):
    config = recipe(
        optimizer=SGD(schedule=Constant(peak=0.3), momentum=0.0, clip_norm=None)
    )
    workdir = epath.Path(tmp_path / "run")
    advice = health.advise(config, workdir)
    assert "use a new --workdir, and change" in advice and "init.path" not in advice
    words = [word.strip(",") for word in advice.split() if word.startswith("--config")]
    values = dict(word.removeprefix("--config.").split("=") for word in words)
    assert values == {"optimizer.schedule.peak": "0.1", "optimizer.clip_norm": "1.0"}
    train.train(dataclasses.replace(config, num_steps=1), workdir, quiet=True)
    clipped = dataclasses.replace(config.optimizer, clip_norm=0.5)
    config = dataclasses.replace(
        config,
        optimizer=clipped,
        model=tiny_vit(dtype=Dtype.BFLOAT16),
    )
    advice = health.advise(config, workdir)
    assert f"with --config.init.path={workdir}, which starts from its last" in advice
    assert "clip_norm" not in advice and "--config.model.dtype=float32" in advice


def test_the_message_says_what_rose_where_it_is_saved_and_what_to_try():
    message = explained(Net(), start().state)
    for part in (
        "Loss not finite at step 7.",
        "Gradient norm 1.2 -> inf in 2 steps",
        "learning rate 1.00e-03",
        "Saved: runs/x/crash/step_7",
        "Try another recipe.",
    ):
        assert part in message


def train_until_it_fails(config, workdir, capsys):
    code = command_line.run(
        lambda argv: train.train(config, workdir, quiet=True), ["train"]
    )
    error = capsys.readouterr().err
    assert code == 1 and "Traceback" not in error
    return error


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_huge_learning_rate_ends_the_run_with_what_there_is_to_know(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # Any rate blows a quadratic up; the softmax needs more.
    config = recipe(
        objective=Square(),
        optimizer=SGD(schedule=Constant(peak=1e12), momentum=0.0, clip_norm=None),
        num_steps=8,
        log_every_steps=2,
    )
    workdir = epath.Path(tmp_path / "run")
    error = train_until_it_fails(config, workdir, capsys)
    assert "Loss not finite" in error, error
    step = int(error.split("Loss not finite at step ")[1].split(".")[0])
    assert 2 <= step <= 8
    assert f"Saved: {workdir}/crash/step_{step}." in error
    assert "learning rate 1.00e+12" in error and "Gradient norm" in error
    assert "new --workdir, and change" in error and "schedule.peak=3e+11 or" in error
    assert all(record["step"] < step for record in records(workdir))

    # What is saved is the state before the bad step, whole: it restores.
    mesh = sharding.make_mesh(config.mesh)
    spec = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in rows().items()}
    with jax.set_mesh(mesh):
        built = program.build(config, mesh, spec)
    found = ocp.load(workdir / "crash" / f"step_{step}", built.abstract)
    state_lib.check_same(built.abstract, found)
    leaves = jax.tree.leaves(jax.device_get(found.params))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert max(np.abs(leaf).max() for leaf in leaves) > 1e6
    # No checkpoint of it, so that the same command begins at a good one.
    assert not list((workdir / "checkpoints").iterdir())


@dataclasses.dataclass(kw_only=True)
class Square(Objective):
    """A loss that grows with the square of the logits."""

    def __call__(self, forward, batch, rng):
        logits = forward(image=batch["image"])["logits"]
        return jnp.square(logits).sum(-1), {}


def test_a_bad_parameter_is_found_in_a_model_that_draws_masks():
    vit = ViT(width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=2)
    model = MaskedAutoencoder(encoder=vit, decoder_width=8)
    state = start(model).state
    flat = trees.flatten(state.params)
    flat["pixels/kernel"] = jnp.full_like(flat["pixels/kernel"], 3e38)
    state = dataclasses.replace(state, params=trees.unflatten(flat))
    assert "First bad tensor: the output of pixels" in explained(model, state)


def test_a_collapse_is_said_once_after_the_first_fifth_of_a_run():
    watch = health.CollapseWatch(num_steps=100)
    good = {"train/feature_sd": 0.5, "train/effective_rank": 4.0}
    same = {"train/feature_sd": 0.001, "train/effective_rank": 3.0}
    line = {"train/feature_sd": 0.5, "train/effective_rank": 1.05}
    assert watch.message(10, same) == ""  # random features may begin so
    assert watch.message(30, good) == "" and watch.message(30, {}) == ""
    said = watch.message(40, line)
    assert "step 40: the features collapse" in said and "batch_norm=true" in said
    assert watch.message(50, same) == ""
    assert "feature_sd 0.001" in health.CollapseWatch(100).message(60, same)
