"""Trains a small recipe and kills itself with SIGKILL at the moment it is told to.

    python killable_run.py WORKDIR JOURNAL MOMENT [flags of train]

MOMENT: none; step:N before update N; after:N:MS any time, MS milliseconds after update
N began; save:N while checkpoint N is half written; manifest:N when N is written but not
yet complete; evaluate:N between the save of N and its evaluation; term:N a SIGTERM
during step N. Every batch that trains is noted in
JOURNAL with its digest, so that a run in pieces can be compared with one in one piece.
"""

import hashlib
import os
import pathlib
import signal
import sys
import threading

import jax
import numpy as np

from big_vision_lite import train
from big_vision_lite.recipes import command_line
from big_vision_lite.runs import checkpoint, evaluations, step_folder
from big_vision_lite.runtime.cpu import SteadyStep

RECIPE = str(pathlib.Path(__file__).parent / "recipes" / "digits_tiny.py")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, journal: pathlib.Path) -> None:
    """Puts the kill where `moment` says, and the journal around every step."""
    what, number, delay = (*moment.split(":"), "", "")[:3]
    at = int(number or 0)
    compiled_step = SteadyStep.__call__

    def journalled(self, state, batch):
        now = int(state.step) + 1
        if (what, at) == ("step", now):
            kill()
        if (what, at) == ("after", now):
            threading.Timer(int(delay) / 1000, kill).start()
        if (what, at) == ("term", now):
            os.kill(os.getpid(), signal.SIGTERM)
        digest = hashlib.sha256()
        for name in sorted(batch):
            digest.update(np.ascontiguousarray(jax.device_get(batch[name])))
        with journal.open("a") as file:
            file.write(f"{now} {digest.hexdigest()}\n")
        return compiled_step(self, state, batch)

    SteadyStep.__call__ = journalled
    if what == "save":
        save_async = step_folder.ocp.save_async

        def half_written(folder, state):
            pending = save_async(folder, state)
            if folder.name == number:
                while not any(
                    p.name.startswith(number) for p in folder.parent.iterdir()
                ):
                    pass
                kill()
            return pending

        step_folder.ocp.save_async = half_written
    if what == "manifest":
        write_manifest = checkpoint.integrity.write_manifest

        def not_quite(folder, manifest):
            if folder.name == number:
                kill()
            write_manifest(folder, manifest)

        checkpoint.integrity.write_manifest = not_quite
    if what == "evaluate":
        run_due = evaluations.Evaluations.run_due

        def between(self, now, state):
            if now == at:
                kill_when_saved(now)
            run_due(self, now, state)

        evaluations.Evaluations.run_due = between


def kill_when_saved(now: int) -> None:
    """Waits for the manifest of step `now`, so that the save is over, then kills."""
    manifest = pathlib.Path(sys.argv[1]) / "checkpoints" / str(now) / "manifest.json"
    while not manifest.exists():
        pass
    kill()


if __name__ == "__main__":
    workdir, journal, moment, *flags = sys.argv[1:]
    arm(moment, pathlib.Path(journal))
    command = ["train", "--config", RECIPE, "--workdir", workdir, *flags]
    sys.exit(command_line.run(train.main, command))
