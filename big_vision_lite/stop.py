"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import signal
import threading
from types import FrameType
from typing import Any

import jax

from big_vision_lite import processes


class StopSignal:
    """Notes SIGTERM and SIGINT while it is open; all processes stop at one step.

    A second Ctrl-C interrupts at once. Inside another StopSignal it shares the outer
    one's note, so that an inner training stops too.
    """

    _open: "StopSignal | None" = None

    def __init__(self) -> None:
        self.received: str | None = None
        self._outer: StopSignal | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        self._outer, StopSignal._open = StopSignal._open, self
        if self._outer is None and threading.current_thread() is (
            threading.main_thread()
        ):
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *unused: Any) -> None:
        StopSignal._open = self._outer
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> str | None:
        """Returns the name of the signal that this process has received, or None."""
        if self._outer is not None:
            return self._outer.requested()
        return self.received

    def agreed(self, step: int, every_steps: int) -> bool:
        """Says whether all processes stop after `step`.

        One process decides at once. Several ask each other every `every_steps`, when
        they wait for the device anyway, so that all save the same step.
        """
        here = self.requested() is not None
        if jax.process_count() > 1 and step % every_steps:
            return False
        return any(processes.gather(here))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class Stopped(Exception):
    """The run was asked to stop, has saved and can be resumed."""

    def __init__(self, name: str | None, step: int, workdir: Any):
        self.exit_code = 128 + (signal.Signals[name] if name else signal.SIGTERM)
        super().__init__(
            f"{name or 'Another process'}: saved step {step} in {workdir}. The same "
            "command continues from there."
        )
