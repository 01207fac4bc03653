"""Prepares the evaluators of a run and runs them when due."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from big_vision_lite.config import MatchClasses, TrainConfig
from big_vision_lite.data import pipeline
from big_vision_lite.data.pipeline import EvaluationSet
from big_vision_lite.messages import did_you_mean, some
from big_vision_lite.runs.class_pairs import Classes, class_table
from big_vision_lite.runs.scores import named_scores
from big_vision_lite.runs.session import Run
from big_vision_lite.runtime import layout
from big_vision_lite.runtime.processes import Stopped
from big_vision_lite.training import step as step_lib
from big_vision_lite.training.forward import MissingOutput
from big_vision_lite.training.program import Program
from big_vision_lite.training.state import TrainState
from big_vision_lite.types import (
    Array,
    Batch,
    Forward,
    Model,
    Objective,
    Op,
    Runner,
    Source,
    backbone_of,
)

# function(forward, batch, rng) -> {name: array [B, ...]}: a row an example. Rows of
# padding, or of an image that is unreadable, are computed too and then left out.
RowFunction = Callable[[Forward, Batch, Array], dict[str, Array]]
# step(state, batch, ordinal=0): the same, jitted, with the state's parameters.
EvalStep = Callable[..., dict[str, Array]]
Rows = dict[str, np.ndarray]


@dataclasses.dataclass(kw_only=True)
class Context:
    """The run's model, settings and state shapes, passed to `Evaluator.prepare`.

    `preprocess` is the recipe's preprocessing, `class_names` are the model's, () if
    unknown. `num_steps` is the length of the run, `threads` the number of decoding
    threads (None: by the cores). `abstract_state` has the shapes of the train state,
    `untrained_state()` returns a randomly initialised one. `log` prints a message.
    Call steps under `jax.set_mesh(mesh)`.
    """

    name: str
    model: Model
    mesh: jax.sharding.Mesh
    preprocess: tuple[Op, ...]
    class_names: tuple[str, ...]
    workdir: epath.Path
    seed: int
    objective: Objective
    num_steps: int
    abstract_state: Any
    untrained_state: Callable[[], Any]
    log: Callable[[str], None]
    threads: int | None = None

    @property
    def backbone(self) -> Model:
        """Returns the model's backbone, which computes the features."""
        return backbone_of(self.model)[1]

    def make_eval_step(self, function: RowFunction) -> EvalStep:
        """Jits a function of the model with the state's parameters.

        It runs in evaluation mode, with the averaged parameters (EMA) if there are any.
        """
        return self._step(function, "", self.model)

    def make_backbone_step(self, function: RowFunction) -> EvalStep:
        """Jits a function of the backbone with its parameters in the state."""
        return self._step(function, *backbone_of(self.model))

    def _step(self, function: RowFunction, part: str, model: Model) -> EvalStep:
        return step_lib.make_eval_step(
            model, function, seed=self.seed, num_steps=self.num_steps, part=part
        )

    def eval_batches(
        self, source: Source, ops: Sequence[Op], batch_size: int
    ) -> EvaluationSet:
        """Returns global batches with "valid": every example once, in order."""
        return pipeline.eval_batches(
            source, tuple(ops), batch_size, self.mesh, threads=self.threads
        )

    def classes(
        self, source: Source, match: MatchClasses = MatchClasses.BY_NAME
    ) -> Classes:
        """Returns the model's classes and the labels of `source` among them.

        Logs which classes the source lacks, and what is assumed.

        Raises:
            ValueError: the source has a class that the model lacks, only one side has
                names, or names are ambiguous.
        """
        theirs, ours = tuple(source.class_names), self.class_names
        if self.objective.logits is None and not (theirs and ours):
            # No class is looked at, in pretraining for example.
            return Classes(evaluator=self.name, names=ours or theirs)
        table = class_table(
            theirs,
            ours,
            name=self.name,
            ours_is="train" if ours else "the model",
            match=match,
            option=f"--config.evaluators.{self.name}.match_classes",
        )
        if table.message is not None:
            self.log(table.message)
        indices = None if table.is_identity else table.indices
        return Classes(evaluator=self.name, names=ours or theirs, indices=indices)

    def check_set(
        self,
        source: Source,
        batch_size: int,
        *,
        what: str = "its set",
        option: str = "batch_size",
    ) -> None:
        """Checks, before any step, that a set can be evaluated.

        In messages `what` names the set, and `option` the evaluator's field that holds
        the batch size.

        Raises:
            ValueError: the set is empty, or the batch does not divide over the devices.
        """
        if not len(source):
            raise ValueError(
                f"{self.name}: {what} has no images; give a split that has some."
            )
        option = f"--config.evaluators.{self.name}.{option}"
        layout.check_batch_size(batch_size, self.mesh, option=option)

    def check_step(
        self,
        step: EvalStep,
        source: Source,
        ops: Sequence[Op],
        batch_size: int,
        *,
        keys: Sequence[str] = ("label",),
    ) -> Mapping[str, Any]:
        """Checks the set, and returns the output shapes of `step` on its examples.

        A mismatch would otherwise end the run at its first evaluation, after hours.

        Raises:
            ValueError: `check_set` raises, the examples lack one of `keys`, the model
                lacks an output or takes no image of that size, or an output is not
                [B, ...].
        """
        self.check_set(source, batch_size)
        spec = self.eval_batches(source, ops, batch_size).spec()
        for key in keys:
            if key not in spec:
                raise ValueError(
                    f"{self.name}: {source.name(0)} has no {key}, only "
                    f"{some(sorted(spec.keys() - {'valid'}))}; give a set with {key}s."
                )
        try:
            outputs = jax.eval_shape(step, self.abstract_state, spec)
        except MissingOutput as error:
            raise ValueError(f"{self.name}: {error}") from error
        except KeyError as error:
            if error.args[0] in spec or not isinstance(error.args[0], str):
                raise
            raise ValueError(
                f"{self.name}: the batch is asked for {error}, but what the ops make "
                f"of {source.name(0)} has only {some(sorted(spec.keys() - {'valid'}))}."
                f"{did_you_mean(error.args[0], spec)} Give it by the source and the "
                "ops of the evaluator."
            ) from error
        self._check_rows(outputs, batch_size)
        return outputs

    def rows(
        self,
        step: EvalStep,
        state: Any,
        source: Source,
        ops: Sequence[Op],
        batch_size: int,
        *,
        most: int | None = None,
    ) -> Rows:
        """Returns the outputs of `step` for all valid rows, in the source's order.

        Every process gets all rows. `most` reads the batches of the first so many.

        Raises:
            ValueError: no example could be read.
        """
        found = []
        enough = None if most is None else -(-most // batch_size)
        batches = self._outputs(step, state, source, ops, batch_size)
        for outputs, valid in itertools.islice(batches, enough):
            tree = {"rows": dict(outputs), "valid": valid}
            host = multihost_utils.process_allgather(tree, tiled=True)
            found.append({n: x[host["valid"]] for n, x in host["rows"].items()})
        rows = {n: np.concatenate([part[n] for part in found])[:most] for n in found[0]}
        self._check_read(source, len(next(iter(rows.values()))))
        return rows

    def sums(
        self,
        step: EvalStep,
        state: Any,
        source: Source,
        ops: Sequence[Op],
        batch_size: int,
    ) -> Rows:
        """Returns each output's sum over all valid rows, and their number, "examples".

        For outputs [B, ...] too large to gather, such as the confusion matrices of the
        pixels of images. Rows of padding and of unreadable images do not count. The
        device holds all rows of a batch: [B, C, C] of 1,000 classes takes a gigabyte,
        so let `rows` bring label and prediction of each image to the host, and count
        there. Batches are added in int64 and float64.

        Raises:
            ValueError: no example could be read.
        """
        add = jax.jit(_sum_rows, out_shardings=layout.replicated(self.mesh))
        totals: Rows = {}
        for outputs, valid in self._outputs(step, state, source, ops, batch_size):
            for name, x in jax.device_get(add(outputs, valid)).items():
                wide = x.astype(np.float64 if x.dtype.kind == "f" else np.int64)
                totals[name] = np.asarray(totals.get(name, 0) + wide)
        self._check_read(source, int(totals["examples"]))
        return totals

    def _check_read(self, source: Source, read: int) -> None:
        if not read:
            raise ValueError(
                f"{self.name}: not one of {len(source)} examples could be read, the "
                f"first is {source.name(0)}; look at them with tools/check_dataset.py."
            )

    def counts(self, source: Source, read: Any) -> dict[str, int]:
        """Returns the scores "examples" and "unreadable"; logs if any is unreadable."""
        unreadable = len(source) - int(read)
        if unreadable:
            self.log(
                f"{self.name}: {unreadable} of {len(source)} examples are unreadable "
                "and not counted; tools/check_dataset.py lists them."
            )
        return {"examples": int(read), "unreadable": unreadable}

    def _outputs(
        self,
        step: EvalStep,
        state: Any,
        source: Source,
        ops: Sequence[Op],
        batch_size: int,
    ) -> Iterator[tuple[dict[str, Array], Array]]:
        """Yields outputs and "valid" of each batch, while the next is computed."""
        waiting = None
        for ordinal, batch in enumerate(self.eval_batches(source, ops, batch_size)):
            outputs = step(state, batch, ordinal)
            self._check_rows(outputs, batch_size)
            if waiting is not None:
                yield waiting
            waiting = outputs, batch["valid"]
        if waiting is not None:
            yield waiting

    def _check_rows(self, outputs: Mapping[str, Any], batch_size: int) -> None:
        wrong = {n: x.shape for n, x in outputs.items() if x.shape[:1] != (batch_size,)}
        if wrong:
            shown = ", ".join(f'"{n}" of shape {s}' for n, s in sorted(wrong.items()))
            raise ValueError(
                f"{self.name}: the evaluator's function returned {shown} for a batch "
                f"of {batch_size} examples; return one row an example, "
                f"[{batch_size}, ...]: rows that are padding must be left out, so "
                "Context.sums does the summing."
            )


def _sum_rows(outputs: Mapping[str, Array], valid: Array) -> dict[str, Array]:
    if "examples" in outputs:
        raise ValueError(
            'Context.sums returns the number of rows as "examples": give the output '
            "of that name another."
        )

    def total(x: Array) -> Array:
        kept = valid.reshape(-1, *[1] * (x.ndim - 1))
        exact = x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return jnp.where(kept, exact, 0).sum(axis=0)

    return {"examples": valid.sum()} | {name: total(x) for name, x in outputs.items()}


class Evaluations:
    """The evaluators of a run, prepared before its first step.

    A wrong path, an empty set or unknown classes raise an error here, not after hours;
    this opens the sets but reads none completely. A score is named
    `<evaluator>/<score>`, or `<evaluator>_ema/<score>` if it is of the averaged
    parameters.
    """

    def __init__(self, run: Run, program: Program):
        evaluators = run.config.evaluators
        self._run = run
        self._program = program
        self._evaluators = {n: e for n, e in evaluators.items() if e.every_steps}
        self._runners: dict[str, Runner] = {
            name: evaluator.prepare(
                make_context(
                    name,
                    run.config,
                    mesh=run.mesh,
                    workdir=run.workdir,
                    class_names=tuple(run.config.data.source.class_names),
                    num_steps=run.num_steps,
                    abstract_state=program.abstract,
                    untrained_state=program.fresh,
                    log=run.say,
                )
            )
            for name, evaluator in self._evaluators.items()
        }
        self._suffix = "" if program.abstract.ema is None else "_ema"

    def due(self, step: int) -> list[str]:
        """Returns the names of evaluators to run after `step`; all after the last."""
        last = step == self._run.num_steps
        return [
            name
            for name, evaluator in self._evaluators.items()
            if step > 0 and (last or step % evaluator.every_steps == 0)
        ]

    def run_due(self, step: int, state: TrainState) -> None:
        """Runs evaluators due at `step` that have no record yet; records their scores.

        Raises:
            Stopped: a training inside an evaluator was told to stop; `state` is saved,
                and the resumed run repeats the evaluation.
        """
        due = self.due(step)
        if not due:
            return
        try:
            with self._run.progress.paused():
                averaged = self._run.recalibrated(step, state)
                self._record_statistics(step, averaged)
                for name in due:
                    self._evaluate(name, step, averaged)
        except Stopped:
            if step > self._run.done:
                self._run.save(step, state)
            raise self._run.stopped(step) from None

    def _record_statistics(self, step: int, state: TrainState) -> None:
        """Records on how many batches the statistics were measured; 0: averaged."""
        name, found = "statistics_batches", state.recalibrated
        if found is not None and not self._run.writer.recorded(step, name):
            self._run.writer.write(step, {name: found["batches"]})

    def _evaluate(self, name: str, step: int, state: TrainState) -> None:
        prefix = f"{name}{self._suffix}"
        if not self._run.writer.recorded(step, prefix):
            self._program.make_room()
            named = named_scores(self._runners[name], state, prefix)
            self._run.writer.write(step, named)
            self._run.progress.scores(step, named)


def make_context(name: str, config: TrainConfig, **others: Any) -> Context:
    """Returns the context of evaluator `name`; `others` are fields not in `config`."""
    return Context(
        name=name,
        model=config.model,
        preprocess=config.preprocess,
        seed=config.seed,
        objective=config.objective,
        threads=config.data.threads,
        **others,
    )
