"""Records what the devices did in a few steps, for TensorBoard's profiler."""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath


class Profiler:
    """Traces the steps `steps` = (first, last), both included; () traces none.

    The trace lies in `folder`; `tensorboard --logdir` shows it with the plugin
    tensorboard-plugin-profile installed.
    """

    def __init__(self, steps: Sequence[int], folder: epath.Path):
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._folder = folder
        self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def before(self, step: int) -> None:
        """Starts the trace when `step` is the first of its steps."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, outputs: Any) -> None:
        """Ends the trace when `step` is the last of its steps and has been computed."""
        if self._running and step == self._steps[-1]:
            jax.block_until_ready(outputs)
            jax.profiler.stop_trace()
            self._running = False
