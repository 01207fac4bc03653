"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import jax

from big_vision_lite import processes

# Several processes ask each other this often: the notice before a machine is taken
# away is 30 seconds, and a save follows.
SECONDS_BETWEEN = 5.0


class StopSignal:
    """Notes SIGTERM and SIGINT while it is open; all processes stop at one step.

    A second Ctrl-C interrupts at once. Inside another StopSignal it shares the outer
    one's note, so that an inner training stops too. What happens next is said at once;
    on a CPU, which computes in the main thread, both wait for the step in progress.
    """

    _open: "StopSignal | None" = None

    def __init__(self) -> None:
        self.received: str | None = None
        self._step = 0
        self._asked = (0, time.monotonic())
        self._ask_at = 0
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

    def agreed(self, step: int) -> bool:
        """Says whether all processes stop after `step`; to be asked after every step.

        One process decides at once. Several ask each other about every 5 seconds, at
        the same steps, so that all save the same one.
        """
        here = self.requested() is not None
        self._step = step
        if jax.process_count() == 1:
            return here
        if step < self._ask_at:
            return False
        # A step takes what it took the slowest of them since they asked last.
        (last_step, last_time), now = self._asked, time.monotonic()
        told = processes.gather(here, (now - last_time) / max(1, step - last_step))
        slowest = max(seconds for _, seconds in told)
        self._asked = (step, now)
        self._ask_at = step + max(1, int(SECONDS_BETWEEN / max(slowest, 1e-6)))
        return any(stops for stops, _ in told)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.received = self.received is None, signal.Signals(number).name
        again = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C"
        if first:
            step = f"step {self._step + 1}" if self._step else "the first step"
            if jax.process_count() > 1:
                step = "the steps until all processes have heard of it,"
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
