"""Shows the progress of a run: speed, data wait, MFU, time left and scores."""

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from big_vision_lite.console import tables
from big_vision_lite.runtime import cpu
from big_vision_lite.runtime.targets import peak_flops


class Clock:
    """A count of steps, seconds waited for data and seconds paused, from the start."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.steps = 0
        self.waited = 0.0
        self.paused = 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def active_seconds(self) -> float:
        return max(self.seconds() - self.paused, 1e-9)

    def wait(self) -> float:
        return min(1.0, self.waited / self.active_seconds())


REDRAW_SECONDS = 0.5
ADVISE_AFTER_STEPS = 100
INNER = "  "  # before the line of a run inside a run

# A terminal has one live line: a run inside a run (fine-tuning as an evaluator) prints
# through the outer one.
_outer: contextvars.ContextVar["Progress | None"] = contextvars.ContextVar(
    "outer_progress", default=None
)


class Progress:
    """A display of a run's steps, counted and timed: a live line, or log lines.

    Use as a context, which draws the live line of a terminal; a run inside that context
    is shown below that line. Only process 0 prints.
    """

    def __init__(
        self,
        num_steps: int,
        batch_size: int,
        *,
        quiet: bool = False,
        console: Console | None = None,
    ):
        self._num_steps = num_steps
        self._batch_size = batch_size
        self._flops_per_step: float | int | None = None
        self._outer = _outer.get()
        self._console = console or (self._outer._console if self._outer else Console())
        self._quiet = quiet or jax.process_index() > 0
        self._live: Live | None = None
        self._step = 0
        self._shown: Mapping[str, float | int] = {}
        self._inner: str | None = None
        self._drawn = 0.0
        self._clock: Clock | None = None  # from the second step on
        self._since_log: Clock | None = None
        self._since_advice: Clock | None = None
        self._advise_after = ADVISE_AFTER_STEPS

    def __enter__(self) -> "Progress":
        self._token = _outer.set(self)
        if self._outer is None and not self._quiet and self._console.is_terminal:
            # No refreshing thread: it would take CPU time from the run.
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
            self._draw()
        return self

    def __exit__(self, *_: Any) -> None:
        _outer.reset(self._token)
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._outer is not None:
            self._outer._show_inner(None)

    def begin(self, start: int, flops_per_step: float | int | None = None) -> None:
        """Sets the number of steps already done and the FLOPs of a step.

        `flops_per_step` are model FLOPs of the global batch, over all devices.
        """
        self._step = start
        self._flops_per_step = flops_per_step
        self._draw()

    def watch(
        self,
        batches: Iterable[Any],
        until: int,
        idle_since: Callable[[float], float] = lambda asked: asked,
    ) -> Iterator[tuple[int, Any]]:
        """Yields (step, batch) up to step `until` and times the wait for each batch.

        A wait counts from `idle_since(asked)` on, the time at which the device became
        idle; both times are seconds of `time.perf_counter`.
        """
        source = iter(batches)
        while self._step < until:
            asked = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            came = time.perf_counter()
            idle = came - max(asked, idle_since(asked))
            for clock in self._clocks():
                clock.waited += max(0.0, idle)
                clock.steps += 1
            self._step += 1
            if came - self._drawn > REDRAW_SECONDS:
                self._draw()
            yield self._step, batch
            if self._clock is None:  # the first step includes the compilation
                self._clock, self._since_log = Clock(), Clock()
                self._since_advice = Clock()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes evaluations and saves from images_per_second, data_wait and mfu."""
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            for clock in self._clocks():
                clock.paused += seconds

    def rates(self, step: int) -> dict[str, float]:
        """Returns the speed since the last call; {} while only compiling.

        images_per_second; data_wait, the fraction of time the device was idle waiting
        for a batch; mfu, model FLOPs over the devices' data-sheet bfloat16 peak, if
        that is known; eta_seconds, pauses included.
        """
        clock, whole = self._since_log, self._clock
        if clock is None or whole is None or not clock.steps:
            return {}
        self._since_log = Clock()
        seconds = clock.active_seconds()
        rates = {
            "images_per_second": clock.steps * self._batch_size / seconds,
            "data_wait": clock.wait(),
        }
        peak = peak_flops(jax.devices()[0].device_kind)
        if peak is not None and self._flops_per_step is not None:
            flops = clock.steps * self._flops_per_step / seconds
            rates["mfu"] = flops / (peak * jax.device_count())
        left = max(0, self._num_steps - step)
        rates["eta_seconds"] = left * whole.seconds() / whole.steps
        return rates

    def show(
        self, step: int, metrics: Mapping[str, float | int], batches: Any = None
    ) -> None:
        """Shows one log record, in the live line or as a log line.

        With `batches` (their `threads` and `stages()`) it gives advice if the device
        mostly waits for data.
        """
        self._shown = dict(metrics)
        if self._quiet:
            return
        if self._outer is not None:
            columns = self._console.width - len(INNER)
            line = tables.format_line(step, self._num_steps, metrics, columns)
            self._outer._show_inner(line)
        elif self._live is not None:
            self._draw()
        else:
            self._print(tables.format_line(step, self._num_steps, metrics))
        if batches is not None:
            self._advise(batches)

    def scores(self, step: int, scores: Mapping[str, float | int]) -> None:
        """Shows an evaluator's scores, one line per group, without controls."""
        lines: dict[str, list[str]] = {}
        for name, text in tables.format_scores(scores).items():
            group, _, leaf = name.rpartition("/")
            if not leaf.startswith(("control_", "l2_chosen", "examples")):
                lines.setdefault(group, []).append(f"{leaf} {text}")
        for group, parts in lines.items():
            self.message(f"step {step}  {group}  {'  '.join(parts)}")

    def message(self, text: str) -> None:
        """Prints permanent lines above the live line."""
        if self._quiet or not text:
            return
        if self._outer is not None:
            self._outer.message("\n".join(f"  {line}" for line in text.splitlines()))
        else:
            self._print(text)

    def summary(
        self, scores: Mapping[str, float | int], next_commands: Sequence[str]
    ) -> None:
        """Prints the table of all scores and the next commands."""
        if self._quiet or self._outer is not None:
            return
        columns = self._console.width if self._console.is_terminal else None
        for table in tables.score_tables(scores, columns):
            self._print(f"\n{table}\n")
        if next_commands:
            self._print("Next:\n" + "\n".join(f"  {line}" for line in next_commands))

    def _advise(self, batches: Any) -> None:
        clock = self._since_advice
        if clock is None or clock.steps < self._advise_after:
            return
        self._since_advice = Clock()
        advice = tables.input_bound_message(
            clock.wait(),
            clock.steps,
            batches.stages(),
            batches.threads,
            cpu.available(),
        )
        if advice is not None:
            self._advise_after *= 10  # not to be repeated soon
            self.message(advice)

    def _clocks(self) -> list[Clock]:
        clocks = (self._clock, self._since_log, self._since_advice)
        return [clock for clock in clocks if clock is not None]

    def _draw(self) -> None:
        if self._live is None:
            return
        self._drawn = time.perf_counter()
        columns = self._console.width
        lines = [tables.format_line(self._step, self._num_steps, self._shown, columns)]
        if self._inner is not None:
            lines.append(f"{INNER}{self._inner}")
        drawn = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
        self._live.update(Group(*drawn), refresh=True)

    def _show_inner(self, line: str | None) -> None:
        if self._outer is not None:
            self._outer._show_inner(line)
            return
        self._inner = line
        self._draw()

    def _print(self, text: str) -> None:
        # Text, not markup: brackets in file names and recipes are just brackets.
        self._console.print(Text(text), soft_wrap=True)
