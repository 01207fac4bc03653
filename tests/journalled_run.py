"""Runs `python -m big_vision_lite.train` and notes every row that trains.

    python journalled_run.py JOURNAL [MOMENT] -- [flags of train]

Each process appends "step name row digest" of its own rows to JOURNAL.<process>.
MOMENT: term:N a SIGTERM to itself before step N; kill:N a SIGKILL; raise:N a mistake.
"""

import hashlib
import os
import pathlib
import runpy
import signal
import sys

import jax
import numpy as np

from big_vision_lite.runtime import processes
from big_vision_lite.runtime.cpu import SteadyStep

compiled_step = SteadyStep.__call__


def strike(moment: str, step: int) -> None:
    what, _, number = moment.partition(":")
    if not number or int(number) != step:
        return
    if what == "raise":
        raise OSError("the disk of this host is gone")
    kind = {"term": signal.SIGTERM, "kill": signal.SIGKILL}[what]
    os.kill(os.getpid(), kind)


def journalled(journal: pathlib.Path, moment: str):
    def train_step(self, state, batch):
        step = int(state.step) + 1
        strike(moment, step)
        path = journal.with_suffix(f".{jax.process_index()}")
        with path.open("a") as file:
            for name in sorted(batch):
                for row, digest in digests(batch[name]):
                    file.write(f"{step} {name} {row} {digest}\n")
        return compiled_step(self, state, batch)

    return train_step


def digests(array: jax.Array):
    """Yields (row of the global batch, digest) of the rows this process holds."""
    for shard in array.addressable_shards:
        first = shard.index[0].start or 0
        for offset, row in enumerate(np.asarray(shard.data)):
            content = np.ascontiguousarray(row).tobytes()
            yield first + offset, hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    split = sys.argv.index("--")
    where, moment, *_ = [*sys.argv[1:split], "none"]
    # These steps are too few for seconds: the processes ask each other after each.
    processes.SECONDS_BETWEEN = 0.0
    SteadyStep.__call__ = journalled(pathlib.Path(where), moment)
    sys.argv = ["train", *sys.argv[split + 1 :]]
    # As `python -m` does it, with the module's own last lines.
    runpy.run_module("big_vision_lite.train", run_name="__main__", alter_sys=True)
