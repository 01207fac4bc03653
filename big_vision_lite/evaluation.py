"""When evaluators run, on what, and where their scores are recorded."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from big_vision_lite import step as step_lib
from big_vision_lite.config import TrainConfig
from big_vision_lite.data import pipeline
from big_vision_lite.data.stream import EvaluationSet
from big_vision_lite.evaluators.context import Context
from big_vision_lite.metrics import Writer
from big_vision_lite.state import TrainState
from big_vision_lite.types import Runner


class Evaluations:
    """The evaluators of a run, prepared before its first step.

    What a wrong path, an empty set or another set of classes would end after hours is
    refused at the start; preparing opens the sets and reads none whole.

    `before()` is called before each of them, `show(step, scores)` after.

    A score is named `<evaluator>/<score>`, `<evaluator>_ema/...` when the averaged
    parameters were evaluated.
    """

    def __init__(
        self,
        config: TrainConfig,
        make_context: Callable[[str], Context],
        writer: Writer,
        num_steps: int,
        *,
        before: Callable[[], None],
        show: Callable[[int, Mapping[str, float]], None],
    ):
        self._evaluators = {n: e for n, e in config.evaluators.items() if e.every_steps}
        self._runners: dict[str, Runner] = {
            name: evaluator.prepare(make_context(name))
            for name, evaluator in self._evaluators.items()
        }
        self._writer = writer
        self._num_steps = num_steps
        self._before = before
        self._show = show
        self._suffix = "" if config.ema is None else "_ema"

    def due(self, step: int) -> list[str]:
        """Returns the evaluators that run after `step`: after the last one all do."""
        last = step == self._num_steps
        return [
            name
            for name, evaluator in self._evaluators.items()
            if step > 0 and (last or step % evaluator.every_steps == 0)
        ]

    def run_due(self, step: int, state: TrainState) -> None:
        """Runs what is due at `step` and not on record, and records the scores."""
        for name in self.due(step):
            prefix = f"{name}{self._suffix}"
            if not self._writer.recorded(step, prefix):
                self._before()
                scores = self._runners[name](state)
                named = {f"{prefix}/{k}": v for k, v in scores.items()}
                self._writer.write(step, named)
                self._show(step, named)


def make_context(
    name: str,
    *,
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    workdir: epath.Path,
    abstract_state: TrainState,
    untrained_state: Callable[[], TrainState],
    log: Callable[[str], None],
) -> Context:
    """Builds what one evaluator may know of the run."""

    def eval_batches(source: Any, ops: Any, batch_size: int) -> EvaluationSet:
        return pipeline.eval_batches(
            source, tuple(ops), batch_size, mesh, threads=config.data.threads
        )

    return Context(
        name=name,
        model=config.model,
        mesh=mesh,
        preprocess=config.preprocess,
        class_names=tuple(config.data.source.class_names),
        workdir=workdir,
        seed=config.seed,
        objective=config.objective,
        make_eval_step=functools.partial(step_lib.make_eval_step, config.model),
        eval_batches=eval_batches,
        abstract_state=abstract_state,
        untrained_state=untrained_state,
        log=log,
    )
