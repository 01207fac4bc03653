"""Watches the numbers of a run: nothing that is not finite goes by unsaid."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from big_vision_lite import diagnose
from big_vision_lite.config import TrainConfig
from big_vision_lite.state import TrainState
from big_vision_lite.types import Batch


class Monitor:
    """Keeps the metrics of the steps since the last look on the device.

    `batch_of(step)` makes the batch of a step again, which needs no more than the seed.
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
        """Notes the metrics of one step; fetches nothing."""
        self._pending.append((step, metrics))

    def look(self, state: TrainState) -> dict[str, float]:
        """Returns the record of the newest step: "train/loss", "train/learning_rate".

        Raises:
            FloatingPointError: a step since the last look was not finite; says which,
                where it began, and what to try. The state before it is saved.
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
        diagnose.save_crash(folder, state)
        return diagnose.explain(
            step,
            state,
            self._batch_of(step),
            self._config.model,
            history,
            float(self._learning_rate(np.int32(step - 1))),
            folder,
            diagnose.advise(self._config, self._workdir),
        )
