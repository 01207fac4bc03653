"""Compiles in a separate process, where JAX sees the compilers but no device.

A compiler for an absent machine may end its process or print unrelated output: that
becomes one error message here, or nothing.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from big_vision_lite.config import TrainConfig
from big_vision_lite.recipes import serialize
from big_vision_lite.runtime import plugins, targets
from big_vision_lite.training import estimate as estimates
from big_vision_lite.training.estimate import Estimate

# Silences what compilers print about missing cloud, drivers and devices.
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
# Last lines of a dead process's stderr to show.
LAST_LINES = 8


class CompileProcess:
    """A process that compiles recipes one after the other; a context that ends it."""

    def __init__(self, allowed_modules: Sequence[str] = (), cpu_devices: int = 1):
        self._modules = list(allowed_modules)
        self._cpu_devices = cpu_devices
        self._process: subprocess.Popen[str] | None = None
        self._words: IO[str] = tempfile.TemporaryFile("w+")

    def __enter__(self) -> "CompileProcess":
        return self

    def __exit__(self, *unused: Any) -> None:
        self._end()
        self._words.close()

    def estimate(
        self, config: TrainConfig, target: str, num_steps: int | None
    ) -> Estimate:
        """Returns the estimate of the step on a target; see `estimate.on_target`.

        Raises:
            ValueError: the recipe does not fit the target, or its compiler is missing
                or failed; the message then has its last lines.
        """
        self._send(config, target, num_steps)
        return self._estimate_of(self._receive(target))

    def memory(
        self, config: TrainConfig, target: str, num_steps: int | None
    ) -> Estimate:
        """Returns an estimate with the step's memory as soon as the compiler knows it.

        XLA:TPU places all arrays in a tenth of the time it takes to generate code.

        Raises:
            ValueError: as `estimate`.
        """
        with tempfile.TemporaryDirectory(prefix="big_vision_lite_plan_") as dump:
            self._send(config, target, num_steps, dump)
            known = self._estimate_of(self._receive(target))
            while not self._answered():
                reports = list(pathlib.Path(dump).glob("*train_step*memory-usage*"))
                # Colors are written in order: with color 1, color 0 is complete.
                texts = [path.read_text() for path in reports]
                whole = [text for text in texts if "(color=1)" in text]
                if whole:
                    self._end()
                    return estimates.add_reported(known, whole[-1])
                time.sleep(0.2)
            return self._estimate_of(self._receive(target))

    def _send(
        self, config: TrainConfig, target: str, num_steps: int | None, dump: str = ""
    ) -> None:
        request = {
            "config": serialize.to_json(config),
            "modules": self._modules,
            "target": target,
            "num_steps": num_steps,
            "dump": dump,
        }
        process = self._process or self._start()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()

    def _receive(self, target: str) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(self._last_words(target))
        return json.loads(line)

    def _answered(self) -> bool:
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], 0)
        return bool(ready)

    def _estimate_of(self, found: dict[str, Any]) -> Estimate:
        if "error" in found:
            raise ValueError(found["error"])
        return Estimate(**found["estimate"])

    def _start(self) -> subprocess.Popen[str]:
        environment = dict(os.environ) | QUIET
        environment[plugins.WANTED] = "1"
        environment["JAX_PLATFORMS"] = "cpu"
        environment["JAX_NUM_CPU_DEVICES"] = str(self._cpu_devices)
        # Imports the package from where this process did, and the user's modules.
        paths = [str(pathlib.Path(__file__).parents[2]), *filter(None, sys.path)]
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "big_vision_lite.training.compile_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env=environment,
        )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _last_words(self, target: str) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._end()
        self._words.seek(0)
        lines = [line for line in self._words.read().splitlines() if line.strip()]
        said = "\n  ".join(lines[-LAST_LINES:]) or "nothing"
        killed = " (killed: the machine may be short of memory)" if code == -9 else ""
        return (
            f"The compiler for {target} ended with code {code}{killed}. Its last words:"
            f"\n  {said}\nTry another target, or a model of a smaller depth."
        )


def answer(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Compiles a request; sends {"estimate": ...}, or {"error": ...} for a ValueError.

    With a dump folder, first sends the estimate known without compiling.
    """
    dump = request["dump"]

    def first(known: Estimate) -> None:
        if dump:
            send({"estimate": dataclasses.asdict(known)})

    try:
        config = serialize.from_json(request["config"], request["modules"])
        target = targets.parse(request["target"])
        found = estimates.on_target(
            config, target, request["num_steps"], dump=dump, first=first
        )
    except ValueError as error:
        send({"error": str(error)})
    else:
        send({"estimate": dataclasses.asdict(found)})


def main() -> None:
    """Answers requests from stdin, one JSON document per line, until it closes."""
    # Compilers print to stdout, which must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(document: dict[str, Any]) -> None:
        print(json.dumps(document), file=answers, flush=True)

    for line in sys.stdin:
        answer(json.loads(line), send)


if __name__ == "__main__":
    main()
