"""Defines `Run`: one training's folder, data, checkpoints, records and display."""

import contextlib
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from big_vision_lite.config import TrainConfig
from big_vision_lite.console.progress import Progress
from big_vision_lite.data import pipeline
from big_vision_lite.runs import image_folders
from big_vision_lite.runs.checkpoint import Checkpointer
from big_vision_lite.runs.folder import RunFolder
from big_vision_lite.runs.health import CollapseWatch, Monitor, Profiler
from big_vision_lite.runs.records import Writer
from big_vision_lite.runs.suggestions import next_commands
from big_vision_lite.runtime import files, startup
from big_vision_lite.runtime.processes import Stopped, StopSignal
from big_vision_lite.training import recalibration
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.gradient_point import average_of
from big_vision_lite.training.program import Program
from big_vision_lite.training.state import TrainState
from big_vision_lite.types import backbone_of

STEPS_IN_FLIGHT = 2
# Seconds that closing waits for the steps in flight; exit waits for the thread's end.
CLOSE_SECONDS = 30


class StepsInFlight:
    """A limit on how many steps the host dispatches ahead of the device.

    Without it batches pile up on the device, and a wait for data counts as idle time
    while the device still computes. A thread notes when each step is finished. Use as a
    context, or close it on every way out: the thread waits inside JAX, and the
    interpreter aborts if it exits during that. So it is no daemon, either.
    """

    def __init__(self) -> None:
        self._slots = threading.Semaphore(STEPS_IN_FLIGHT)
        self._outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._dispatched = 0
        self._finished = 0
        self._finished_at = 0.0

    def add(self, outputs: Any) -> None:
        """Waits until at most one other step than that of `outputs` is in flight."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._wait, name="steps-in-flight", daemon=False
            )
            self._thread.start()
        self._dispatched += 1
        self._outputs.put(outputs)
        self._slots.acquire()

    def idle_since(self, otherwise: float) -> float:
        """Returns the `perf_counter` time when the device became idle, now if busy.

        Returns `otherwise` before the first step.
        """
        if self._thread is None:
            return otherwise
        if self._finished < self._dispatched:
            return time.perf_counter()
        return self._finished_at

    def __enter__(self) -> "StepsInFlight":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the thread as soon as the steps in flight are computed."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._outputs.put(None)
            thread.join(CLOSE_SECONDS)

    def _wait(self) -> None:
        while (outputs := self._outputs.get()) is not None:
            # An error of the device is raised where the loop reads the value.
            with contextlib.suppress(Exception):
                jax.block_until_ready(outputs)
            self._finished_at = time.perf_counter()
            self._finished += 1
            self._slots.release()


class Run:
    """One training in `workdir`: its folder, data, checkpoints, records and display.

    Use as a context, under the mesh. `command` resumes the run; the closing message
    suggests it.

    Raises:
        ValueError, OSError: a mistake in the recipe, the data or the folder.
    """

    def __init__(
        self,
        config: TrainConfig,
        workdir: epath.Path,
        mesh: jax.sharding.Mesh,
        *,
        command: str | None = None,
        quiet: bool = False,
    ):
        image_folders.refuse_workdir_inside(config, workdir)
        self.config = config
        self.workdir = workdir
        self.mesh = mesh
        self.num_steps = config.resolve_steps(len(config.data.source))
        self._command = command
        self._quiet = quiet
        self._opened = contextlib.ExitStack()
        self._leaving = False
        # The number of finished steps in the restored state, set by `begin`.
        self.done = 0
        self._measured: tuple[int, dict[str, Any]] | None = None

    def __enter__(self) -> "Run":
        with contextlib.ExitStack() as opened:
            self._open(opened.enter_context)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        if error is None:
            self.say(self._batches.unreadable.message() or "")
        return self._opened.__exit__(kind, error, trace)

    def _open(self, enter: Any) -> None:
        config, workdir = self.config, self.workdir
        size = config.data.batch_size
        self._stop: StopSignal = enter(StopSignal())
        self.progress: Progress = enter(
            Progress(self.num_steps, size, quiet=self._quiet)
        )
        # Closed on every way out: an error in the loop's body leaves `steps` suspended
        # in the traceback.
        self._in_flight: StepsInFlight = enter(StepsInFlight())
        self._folder: RunFolder = enter(
            RunFolder(workdir, config, log=self.progress.message)
        )
        bad_files = workdir / "bad_files.txt"
        self._batches: pipeline.Batches = enter(
            pipeline.open_batches(config.data, config.seed, self.mesh, bad_files)
        )
        self._checkpointer: Checkpointer = enter(
            Checkpointer(
                workdir,
                config.checkpoints,
                config_text=self._folder.config_text(),
                metadata=describe(config, self.num_steps, self.batch_spec()),
                log=self.progress.message,
            )
        )
        self.writer: Writer = enter(Writer(workdir))
        self._profiler: Profiler = enter(
            Profiler(config.profile_steps, workdir / "profile")
        )
        self._monitor = Monitor(config, self.num_steps, workdir, self._batch_of)
        self._collapse = CollapseWatch(self.num_steps)
        self.say(config.length_note() or "")
        self.say("\n".join(image_folders.paragraph(config)))

    def say(self, text: str) -> None:
        """Prints a permanent line."""
        self.progress.message(text)

    def batch_spec(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Returns the shapes, dtypes and shardings of a batch."""
        return self._batches.spec()

    def is_saving(self) -> bool:
        """Returns whether a checkpoint is being written."""
        return self._checkpointer.saving()

    def note_origin(self, origin: Mapping[str, Any] | None) -> None:
        """Records the origin of the initial weights in every checkpoint."""
        self._checkpointer.note_origin(origin)

    def restore(self, program: Program) -> TrainState | None:
        """Returns the state of the newest checkpoint, or None for a new run.

        Raises:
            DamagedCheckpoint: it is damaged; names the newest intact one.
        """
        for note in program.notes:
            self.say(note)
        self._program = program
        saved = recalibration.saved(program.abstract)
        self._checkpointer.prepare(saved)
        state = self._checkpointer.restore_latest(saved)
        return state and dataclasses.replace(state, recalibrated=None)

    def begin(self, program: Program, state: TrainState) -> None:
        """Continues from `state`; drops the records of later steps."""
        # Anything else would compile the step a second time.
        state_lib.check_same(program.abstract, state)
        self.done = int(state.step)
        if self.done:
            self.say(f"resuming from step {self.done} of {self.num_steps}")
        self.writer.resume_at(self.done)

    def steps(self) -> Iterator[tuple[int, Any]]:
        """Yields every remaining (step, batch); at most two steps are in flight."""
        self._folder.begin()
        self.progress.begin(self.done, self._program.flops_per_step)
        batches = self._batches.starting_at(self.done + 1)
        idle_since = self._in_flight.idle_since
        for step, batch in self.progress.watch(batches, self.num_steps, idle_since):
            self._profiler.before(step)
            yield step, batch

    def note(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keeps the metrics of a step on the device; asks all hosts whether to stop."""
        self._profiler.after(step, metrics)
        self._in_flight.add(metrics)
        self._monitor.add(step, metrics)
        self._leaving = self._stop.agreed(step)

    def logs_at(self, step: int) -> bool:
        """Returns whether `step` is recorded: every `log_every_steps`, and the last."""
        return step == self.num_steps or step % self.config.log_every_steps == 0

    def saves_at(self, step: int) -> bool:
        """Returns whether `step` is saved: at the interval, at the end, on a stop."""
        return self._leaving or self._saves_anyway(step)

    def _saves_anyway(self, step: int) -> bool:
        return step == self.num_steps or self._checkpointer.due(step)

    def stops_at(self, step: int) -> bool:
        """Returns whether to stop at `step` after a signal, as all hosts agreed."""
        return self._leaving and step < self.num_steps

    def log(self, step: int, state: TrainState) -> None:
        """Records and shows the metrics of the newest step.

        Raises:
            FloatingPointError: a loss was not finite; names the first bad tensor.
            OSError: the last save failed.
        """
        record = self._monitor.fetch_and_check(state)
        self._checkpointer.check()
        record |= self.progress.rates(step)
        self.writer.write(step, record)
        self.progress.show(step, record, self._batches)
        self.say(self._collapse.message(step, record))

    def save(self, step: int, state: TrainState) -> None:
        """Checks that all losses so far are finite, then starts to save `state`.

        Raises:
            FloatingPointError: a loss was not finite; names the first bad tensor.
            OSError: the previous save failed.
        """
        self._monitor.fetch_and_check(state)
        with self.progress.paused():
            # A machine that is taken away leaves no time for more than the save.
            hurried = self._leaving and not self._saves_anyway(step)
            self._checkpointer.save(step, self.recalibrated(step, state, not hurried))

    def recalibrated(
        self, step: int, state: TrainState, measure: bool = True
    ) -> TrainState:
        """Returns `state` with the batch statistics of its averaged parameters.

        They are measured on batches that depend on the seed and `step` alone; without
        `measure` they are the averaged ones. `state` itself does not change.
        """
        if not state.ema_statistics:
            return state
        if not measure or self._program.statistics_step is None:
            found = recalibration.not_measured(state)
        elif self._measured is not None and self._measured[0] == step:
            found = self._measured[1]
        else:
            found = self._measure(step, state)
            self._measured = (step, found)
        return dataclasses.replace(state, recalibrated=found)

    def _measure(self, step: int, state: TrainState) -> dict[str, Any]:
        data = self.config.data
        average = average_of(self.config.optimizer, self.config.ema)
        add = self._program.statistics_step
        assert average is not None and add is not None
        self._program.make_room()
        epoch = max(1, len(data.source) // data.batch_size)
        count = min(average.recalibrate_statistics, epoch)
        seed = pipeline.seed_of_step(self.config.seed, step)
        stream = dataclasses.replace(data, processes=0)
        totals = recalibration.start(self._program.abstract)
        with (
            pipeline.open_batches(stream, seed, self.mesh) as batches,
            StepsInFlight() as in_flight,
        ):
            for batch in itertools.islice(batches.starting_at(1), count):
                totals = add(state, batch, totals)
                # A copy: the next step donates the totals.
                in_flight.add(totals.batches + 0)
        return recalibration.measured(totals)

    def stopped(self, step: int) -> Stopped:
        """Returns the exception for a run that stops after `step`, which is saved."""
        self._checkpointer.wait()
        return Stopped(self._stop.requested(), step, self.workdir)

    def show_results(self) -> None:
        """Shows all scores and the next commands; call it after the context."""
        workdir = files.absolute(self.workdir)
        commands = next_commands(
            workdir, self._command, self.config, self._program.outputs
        )
        self.progress.summary(self._in_recipes_order(self.writer.latest()), commands)

    def _in_recipes_order(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """Sorts scores by evaluator; records are in the order of their steps."""
        order = list(self.config.evaluators)

        def place(name: str) -> int:
            evaluator = name.partition("/")[0]
            for known in (evaluator, evaluator.removesuffix("_ema")):
                if known in order:
                    return order.index(known)
            return len(order)  # of an evaluator that the recipe no longer has

        return {name: scores[name] for name in sorted(scores, key=place)}

    def _batch_of(self, step: int) -> Any:
        return next(self._batches.starting_at(step))


def describe(
    config: TrainConfig, num_steps: int, spec: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the metadata of the run that every manifest records."""
    return {
        "num_steps": num_steps,
        "input": {
            name: {"shape": list(leaf.shape[1:]), "dtype": str(leaf.dtype)}
            for name, leaf in spec.items()
        },
        "class_names": list(config.data.source.class_names),
        "backbone": backbone_of(config.model)[0],
        "source": config.data.source.fingerprint,
        "folders": image_folders.fingerprints(config),
        "versions": startup.versions(),
    }
