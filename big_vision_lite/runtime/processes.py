"""Coordinates the processes of one run, and ends all of them if one fails.

Processes wait for each other in collectives, which nothing can interrupt. So process 0
broadcasts the result of what it does alone, and a failed process exits at once: its
broken connections end the others.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np

# The size of process 0's broadcast, as JSON; longer error messages are cut.
TOLD_BYTES = 8192
# Words of library errors when the process at the other end of a connection is gone.
LOST = ("Gloo", "NCCL", "oordination service", "Connection reset", "heartbeat")


class OtherProcessFailed(ValueError):
    """The failure of another process of this run; its own message says why."""


def barrier(name: str) -> None:
    """Waits until all processes reach this call."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def on_first(function: Callable[[], Any]) -> Any:
    """Calls `function` on process 0 and returns its result (plain JSON) on all.

    Raises:
        OtherProcessFailed: on the others, with the message of process 0's error.
    """
    if jax.process_count() == 1:
        return function()
    from jax.experimental import multihost_utils

    told: dict[str, Any] = {"result": None, "error": None}
    error = None
    if jax.process_index() == 0:
        try:
            told["result"] = function()
        except Exception as raised:
            error, told["error"] = raised, str(raised)[: TOLD_BYTES // 8]
    text = json.dumps(told).encode().ljust(TOLD_BYTES)
    heard = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
    if error is not None:
        raise error
    told = json.loads(bytes(np.asarray(heard, np.uint8)))
    if told["error"] is not None:
        raise OtherProcessFailed(f"process 0 stopped: {told['error']}")
    return told["result"]


def gather(*values: bool | float) -> list[tuple[float, ...]]:
    """Returns the `values` of every process, as float32, on every process."""
    if jax.process_count() == 1:
        return [tuple(float(value) for value in values)]
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.asarray(values, np.float32))
    return [tuple(row) for row in np.asarray(gathered).tolist()]


@contextlib.contextmanager
def named_losses() -> Iterator[None]:
    """Replaces library errors about a lost process by one readable message.

    Raises:
        OtherProcessFailed: the connection to another process broke.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if jax.process_count() == 1 or not any(sign in str(error) for sign in LOST):
            raise
        raise OtherProcessFailed(
            f"process {jax.process_index()} of {jax.process_count()} lost another one, "
            "which failed, was killed or cannot be reached: the message is in that "
            "one's output. The same command on all of them resumes from the last "
            f"checkpoint. ({str(error).splitlines()[0][:200]})"
        ) from error


def leave(code: int) -> int:
    """Returns exit code `code`, or exits at once if this is a failed one of several.

    An orderly exit waits for the others, which may wait for this one in a collective.
    Codes above 128 are those of signals, at which all stop together.
    """
    if code in range(1, 129) and jax.distributed.is_initialized():
        # The others may be about to print the same error; the exit of process 0, which
        # holds the coordination service, would cut them off.
        if jax.process_index() == 0:
            time.sleep(3)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def run(main: Callable[[], int]) -> int:
    """Calls `main`, which returns an exit code, and leaves with it."""
    try:
        code = main()
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    return leave(code)


# Several processes exchange their signals this often: a preempted machine gets a notice
# of 30 seconds, in which a save must follow.
SECONDS_BETWEEN = 5.0


class StopSignal:
    """A handler of SIGTERM and SIGINT that stops all processes at the same step.

    Use as a context. A second Ctrl-C interrupts at once. A StopSignal inside another
    one shares the outer one's signal, so an inner training stops too. A message is
    printed at once; on a CPU, which computes in the main thread, message and interrupt
    wait for the step in progress.
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
        """Returns whether all processes stop after `step`; call it after every step.

        One process decides at once. Several exchange their signals about every 5
        seconds, at the same steps, so all save the same one.
        """
        here = self.requested() is not None
        self._step = step
        if jax.process_count() == 1:
            return here
        if step < self._ask_at:
            return False
        # A step is assumed to take the slowest process's time since the last exchange.
        (last_step, last_time), now = self._asked, time.monotonic()
        told = gather(here, (now - last_time) / max(1, step - last_step))
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
            # Not print: the signal may have interrupted one.
            with contextlib.suppress(OSError):
                os.write(2, f"{text} at once\n".encode())


class Stopped(Exception):
    """The stop of a run on request: it has saved and can be resumed."""

    def __init__(self, name: str | None, step: int, workdir: Any):
        self.exit_code = 128 + (signal.Signals[name] if name else signal.SIGTERM)
        super().__init__(
            f"{name or 'Another process'}: saved step {step} in {workdir}. The same "
            "command continues from there."
        )
