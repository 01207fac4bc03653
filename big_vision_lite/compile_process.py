"""Compiles in a process of its own, in which JAX sees the compilers and no device.

A compiler that is told of a machine that is not there may end the process or write what
nobody asked for: here that is one message, or nothing.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, Any

from big_vision_lite import serialize
from big_vision_lite.config import TrainConfig
from big_vision_lite.estimate import Estimate
from big_vision_lite.runtime import plugins, targets

# What the compilers would say of a machine without a cloud, drivers and devices.
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
# Lines of a dead process's last words that are shown.
LAST_LINES = 8


class CompileProcess:
    """Compiles what it is asked to, one after the other; a context, which ends it."""

    def __init__(self, allowed_modules: Sequence[str] = (), cpu_devices: int = 1):
        self._modules = list(allowed_modules)
        self._cpu_devices = cpu_devices
        self._process: subprocess.Popen[str] | None = None
        self._words: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def __enter__(self) -> "CompileProcess":
        return self

    def __exit__(self, *unused: Any) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()
        self._words.close()

    def estimate(
        self,
        config: TrainConfig,
        target: str,
        num_steps: int | None,
        *,
        quick: bool = False,
    ) -> Estimate:
        """Returns what the recipe's step is on a target; see `estimate.on_target`.

        Raises:
            ValueError: the recipe does not fit the target, its compiler is missing, or
                it failed; with its last words.
        """
        request = {
            "config": serialize.to_json(config),
            "modules": self._modules,
            "target": target,
            "num_steps": num_steps,
            "quick": quick,
        }
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        if not answer:
            raise ValueError(self._last_words(target))
        found = json.loads(answer)
        if "error" in found:
            raise ValueError(found["error"])
        return Estimate(**found["estimate"])

    def _start(self) -> subprocess.Popen[str]:
        environment = dict(os.environ) | QUIET
        environment[plugins.WANTED] = "1"
        environment["JAX_PLATFORMS"] = "cpu"
        environment["JAX_NUM_CPU_DEVICES"] = str(self._cpu_devices)
        # The same package, wherever this process found it, and the user's modules.
        paths = [str(pathlib.Path(__file__).parents[1]), *filter(None, sys.path)]
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "big_vision_lite.compile_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env=environment,
        )
        return self._process

    def _last_words(self, target: str) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._process = None
        self._words.seek(0)
        lines = [line for line in self._words.read().splitlines() if line.strip()]
        said = "\n  ".join(lines[-LAST_LINES:]) or "nothing"
        killed = " (killed: the machine may be short of memory)" if code == -9 else ""
        return (
            f"The compiler for {target} ended with code {code}{killed}. Its last words:"
            f"\n  {said}\nTry another target, or --config.model of a smaller depth."
        )


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles what a request describes; a user's mistake is part of the answer."""
    import dataclasses

    from big_vision_lite import estimate

    try:
        config = serialize.from_json(request["config"], request["modules"])
        target = targets.parse(request["target"])
        found = estimate.on_target(
            config, target, request["num_steps"], quick=request["quick"]
        )
    except ValueError as error:
        return {"error": str(error)}
    return {"estimate": dataclasses.asdict(found)}


def main() -> None:
    """Answers requests, one JSON document a line, until there are no more."""
    # Compilers print; what they print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
