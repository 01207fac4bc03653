"""Detects losses and gradients that are not finite; finds the first bad tensor."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from orbax.checkpoint import v1 as ocp

from big_vision_lite import trees
from big_vision_lite.config import TrainConfig
from big_vision_lite.objectives import collapse
from big_vision_lite.recipes import mistakes
from big_vision_lite.runs import step_folder
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.forward import random_keys
from big_vision_lite.training.gradient_point import SAM
from big_vision_lite.training.state import TrainState
from big_vision_lite.types import Batch, Model


class Monitor:
    """A check that step metrics are finite; they stay on the device until fetched.

    `batch_of(step)` rebuilds the batch of a step, which depends only on the seed.
    """

    def __init__(
        self,
        config: TrainConfig,
        num_steps: int,
        workdir: epath.Path,
        batch_of: Callable[[int], Batch],
    ):
        self._config = config
        self._workdir = workdir
        self._batch_of = batch_of
        self._learning_rate = config.optimizer.schedule.build(num_steps)
        self._pending: list[tuple[int, Mapping[str, Any]]] = []

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds the metrics of one step without fetching them."""
        self._pending.append((step, metrics))

    def fetch_and_check(self, state: TrainState) -> dict[str, float]:
        """Returns the record of the newest step: "train/loss", "train/learning_rate".

        Raises:
            FloatingPointError: a step since the last call was not finite; names it and
                the first bad tensor, with advice. The state is saved in `crash/`.
        """
        if not self._pending:
            return {}
        pending, self._pending = self._pending, []
        fetched = jax.device_get([metrics for _, metrics in pending])
        for index, ((step, _), metrics) in enumerate(
            zip(pending, fetched, strict=True)
        ):
            if not metrics["finite"]:
                raise FloatingPointError(
                    self._explain(step, state, fetched[: index + 1])
                )
        step, newest = pending[-1][0], dict(fetched[-1])
        del newest["finite"]
        record = {f"train/{name}": float(value) for name, value in newest.items()}
        # Update `step` used the schedule's value at step - 1.
        record["train/learning_rate"] = float(self._learning_rate(np.int32(step - 1)))
        return record

    def _explain(self, step: int, state: TrainState, history: list[Any]) -> str:
        # Steps that are not finite change no parameter; finite ones after the bad step
        # (at most log_every_steps of them) have.
        folder = self._workdir / "crash" / f"step_{step}"
        save_crash(folder, state)
        return explain(
            step,
            state,
            self._batch_of(step),
            self._config.model,
            history,
            float(self._learning_rate(np.int32(step - 1))),
            folder,
            advise(self._config, self._workdir),
        )


def explain(
    step: int,
    state: TrainState,
    batch: Batch,
    model: Model,
    history: Sequence[Mapping[str, Any]],
    learning_rate: float,
    saved: epath.Path,
    advice: str,
) -> str:
    """Returns a message that names the first tensor of `step` that is not finite.

    `history` holds the metrics of the steps up to this one, oldest first; `advice` ends
    the message.
    """
    bad = _first_bad(state, batch, model)
    norms = [m["gradient_norm"] for m in history]
    finite = [n for n in norms if np.isfinite(n)]
    rise = ""
    if finite:
        rise = (
            f" Gradient norm {finite[0]:.3g} -> {norms[-1]:.3g} in {len(norms)} steps;"
        )
    return (
        f"Loss not finite at step {step}. First bad tensor: {bad}.{rise} learning rate "
        f"{learning_rate:.2e}. Saved: {saved}. Nothing of this step is in the "
        f"parameters. {advice}"
    )


class CollapseWatch:
    """Says once that the features of all images have become the same, and what to try.

    Objectives without labels report "feature_sd" and "effective_rank" (see
    objectives/collapse.py). Random features may begin so, so that the first fifth of
    the run is not judged.
    """

    def __init__(self, num_steps: int):
        self._first = num_steps // 5
        self._said = False

    def message(self, step: int, record: Mapping[str, float]) -> str:
        """Returns a sentence for the record of a collapsed step, else ""."""
        sd, rank = (record.get(f"train/{name}") for name in collapse.LIMITS)
        if self._said or step <= self._first or sd is None or rank is None:
            return ""
        if sd >= collapse.SMALLEST_SD and rank >= collapse.SMALLEST_RANK:
            return ""
        self._said = True
        return (
            f"step {step}: the features collapse, they are almost the same for all "
            f"images (feature_sd {sd:.3g}, effective_rank {rank:.3g}). Of what the "
            "recipe has, try --config.model.projector.batch_norm=true, "
            "--config.objective.balance=sinkhorn, a lower "
            "--config.objective.teacher_temperature, --config.ema.start=0.97, a larger "
            "--config.data.batch_size or a lower --config.optimizer.schedule.peak."
        )


def advise(config: TrainConfig, workdir: epath.Path) -> str:
    """Returns a sentence of flags for a new run; the same recipe would fail again."""
    optimizer, path = config.optimizer, "--config.optimizer"
    if isinstance(optimizer, SAM):
        optimizer, path = optimizer.base, f"{path}.base"
    peak = optimizer.schedule.peak
    changes = [f"{path}.schedule.peak={peak / 3:.1g}"]
    clip_norm = getattr(optimizer, "clip_norm", None)
    if clip_norm is None or clip_norm > 1:
        changes.append(f"{path}.clip_norm=1.0")
    for path, value, _ in mistakes.list_leaves(config.model, "config.model."):
        if path.endswith(".dtype") and value == "bfloat16":
            changes.append(f"--{path}=float32")
    start = ""
    if step_folder.complete_steps(workdir / step_folder.FOLDER):
        start = f" --config.init.path={workdir}, which starts from its last weights"
    return (
        "The same recipe comes to the same step again: use a new --workdir"
        f"{start and ' with'}{start}, and change something, for example "
        f"{' or '.join(changes)}, or give it a longer warm-up."
    )


def save_crash(folder: epath.Path, state: TrainState) -> None:
    """Writes the current state for inspection.

    The bad step changed no parameter; finite steps between it and the check did.
    """
    ocp.save(folder, state, overwrite=True)


def _first_bad(state: TrainState, batch: Batch, model: Model) -> str:
    for key, values in batch.items():
        if jnp.issubdtype(values.dtype, jnp.floating) and not _finite(values):
            return "the images themselves" if key == "image" else f'"{key}" itself'
    params = state_lib.merge(state.params, state.frozen)
    for name, leaf in trees.flatten(params).items():
        if not _finite(leaf):
            return f"parameter {name}"

    order: list[str] = []

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        outputs = call(*args, **kwargs)
        if context.method_name == "__call__":
            order.append("/".join(context.module.path))
        return outputs

    @jax.jit
    def forward(params: Any, collections: Any, batch: Batch) -> Any:
        with nn.intercept_methods(note):
            _, changed = model.apply(
                {"params": params, **collections},
                **model.inputs(batch),
                train=False,
                # Random masks are drawn too; they differ from those of the step.
                rngs=random_keys(model, jax.random.key(0), 0),
                capture_intermediates=True,
                mutable=["intermediates"],
            )
        return jax.tree.map(
            lambda x: (jnp.isfinite(x).all(), jnp.abs(x).max().astype(jnp.float32)),
            changed["intermediates"],
        )

    seen: dict[str, list[tuple[bool, float]]] = {}
    found = trees.flatten(forward(params, state.collections, batch))
    for name in (n.removesuffix("/0") for n in found if n.endswith("/0")):
        module = name.partition("__call__")[0].rstrip("/")
        values = bool(found[f"{name}/0"]), float(found[f"{name}/1"])
        seen.setdefault(module, []).append(values)
    # In the order in which the modules ended: inner before outer, early before late.
    largest = ""
    for module in (module for module in order if module in seen):
        if not all(finite for finite, _ in seen[module]):
            return f"the output of {module or 'the model'}{largest}"
        top = max(value for _, value in seen[module])
        largest = f" (the one before, {module}, has max {top:.2g})"
    return (
        "none in a forward pass without dropout and augmentation, so it arose in the "
        "loss, the gradient or the augmented images"
    )


def _finite(x: Any) -> bool:
    return bool(jnp.isfinite(x).all())


class Profiler:
    """A profiler trace of `steps` = (first, last), both included; () traces none.

    The trace is written to `folder`; `tensorboard --logdir` shows it if the package
    tensorboard-plugin-profile is installed.
    """

    def __init__(self, steps: Sequence[int], folder: epath.Path):
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._folder = folder
        self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """Starts the trace before the first of its steps that is run."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, outputs: Any) -> None:
        """Ends the trace after the last of its steps, once `outputs` are computed."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(outputs)
            jax.profiler.stop_trace()
            self._running = False
