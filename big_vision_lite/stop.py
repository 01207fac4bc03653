"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax

from big_vision_lite import processes


class StopSignal:
    """Notes SIGTERM and SIGINT while it is open; all processes stop at one step.

    A second Ctrl-C interrupts at once. Inside another StopSignal it shares the outer
    one's note, so that an inner training stops too. What happens next is said at once.
    """

    _open: "StopSignal | None" = None

    def __init__(self) -> None:
        self.received: str | None = None
        self._step = 0
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
        self._step = step
        if jax.process_count() > 1 and step % every_steps:
            return False
        return any(processes.gather(here))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.received = self.received is None, signal.Signals(number).name
        again = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C"
        if first:
            step = f"step {self._step + 1}" if self._step else "the first step"
            text = f"\n{self.received}: finishing {step} and saving; {again} leaves"
            # Not print: the signal may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, f"{text} at once\n".encode())


class Stopped(Exception):
    """The run was asked to stop, has saved and can be resumed."""

    def __init__(self, name: str | None, step: int, workdir: Any):
        self.exit_code = 128 + (signal.Signals[name] if name else signal.SIGTERM)
        super().__init__(
            f"{name or 'Another process'}: saved step {step} in {workdir}. The same "
            "command continues from there."
        )
