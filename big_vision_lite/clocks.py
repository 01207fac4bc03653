"""Clocks of a run: its steps and pauses, and when the device had nothing to do."""

import contextlib
import queue
import threading
import time
from typing import Any

import jax

STEPS_IN_FLIGHT = 2
# How long closing waits for the steps in flight; the thread's end is awaited at exit.
CLOSE_SECONDS = 30


class Clock:
    """Steps, seconds waited for data and seconds paused since it was made."""

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


class DeviceClock:
    """Notes, in a thread of its own, when the device had finished each step.

    Close it on every way out: the thread waits inside of JAX, and the interpreter
    aborts if it ends around a thread that does. So it is no daemon, either.
    """

    def __init__(self) -> None:
        self._slots = threading.Semaphore(STEPS_IN_FLIGHT)
        self._outputs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._dispatched = 0
        self._finished = 0
        self._finished_at = 0.0

    def dispatched(self, outputs: Any) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._wait, name="device-clock", daemon=False
            )
            self._thread.start()
        self._dispatched += 1
        self._outputs.put(outputs)
        self._slots.acquire()

    def idle_since(self, otherwise: float) -> float:
        """Returns since when the device has had no work; now, if it has some."""
        if self._thread is None:
            return otherwise
        if self._finished < self._dispatched:
            return time.perf_counter()
        return self._finished_at

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
