"""Iterators over global batches: in order, made a few ahead, errors passed on."""

import collections
import concurrent.futures
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from big_vision_lite.data.batch_maker import EvaluationBatches, TrainingBatches
from big_vision_lite.data.host_batch import HostBatch, Report
from big_vision_lite.data.unreadable import UnreadableImages
from big_vision_lite.data.workers import (
    ProcessWorkers,
    ThreadWorkers,
)
from big_vision_lite.types import Array

# Batches being made or waiting, beside the one in use.
AHEAD = 3


@runtime_checkable
class Placement(Protocol):
    """Turns this process's rows of a batch into global arrays."""

    rows: Sequence[int]

    def __call__(
        self, arrays: dict[str, np.ndarray], report: Report
    ) -> tuple[dict[str, Array], Report]: ...

    def spec(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        """Returns shape, dtype and sharding of a whole batch of such rows."""
        ...


class Batches:
    """The endless global batches of a run, and what making them cost.

    `threads` is how many decode on this host, in all worker processes, `unreadable`
    what was skipped.
    """

    def __init__(
        self,
        maker: TrainingBatches,
        put: Placement,
        unreadable: UnreadableImages,
        *,
        threads: int,
        processes: int = 0,
    ):
        self.unreadable = unreadable
        self.threads = threads * max(1, processes)
        self._threads = threads
        self._processes = processes
        self._put = put
        self._maker = maker
        self._report = Report()
        self._workers: ThreadWorkers | ProcessWorkers | None = None

    def starting_at(self, step: int) -> Iterator[dict[str, Array]]:
        """Returns the endless iterator of the batches of `step`, `step` + 1, ...

        Steps count from 1. An earlier iterator ends.
        """
        if step < 1:
            raise ValueError(f"step={step}; steps count from 1.")
        self.close()
        rows = self._put.rows
        if self._processes:
            workers = ProcessWorkers(
                self._maker,
                rows,
                self._threads,
                self._put,
                processes=self._processes,
                first_step=step,
            )
        else:
            workers = ThreadWorkers(self._maker, rows, self._threads, self._put)
        self._workers = workers
        return self._iterate(workers, step)

    def spec(self) -> dict[str, Any]:
        """Returns shape, dtype and sharding of every array of a global batch."""
        probe = HostBatch(1, range(1))
        self._maker.fill(probe, range(1))
        return self._put.spec(probe.arrays)

    def stages(self) -> dict[str, tuple[float, int]]:
        """Returns CPU seconds and images of each stage, of the images that were timed.

        Their ratio is the cost of an image; waiting for a disk does not count.
        """
        return dict(self._report.stages)

    def close(self) -> None:
        """Ends all threads and processes; `starting_at` may begin anew."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _iterate(
        self, workers: ThreadWorkers | ProcessWorkers, step: int
    ) -> Iterator[dict[str, Array]]:
        ahead: collections.deque[concurrent.futures.Future] = collections.deque()
        while True:
            while len(ahead) < AHEAD:
                ahead.append(workers.submit(step))
                step += 1
            arrays, report = ahead.popleft().result()
            self._report.add(Report(stages=report.stages))
            # When a batch is used, not when it is made: the same step stops a run.
            self.unreadable.add(report.unreadable)
            yield arrays


class EvaluationSet:
    """All examples of a source, once each, in its order; iterate as often as needed.

    Batches are full: rows past the end, and images that do not decode, are zeros with
    "valid" False. Every process sees the same number of batches. After a pass
    `unreadable` holds the names of this process's images that do not decode.
    """

    def __init__(
        self, maker: EvaluationBatches, put: Placement, num_batches: int, threads: int
    ):
        self.unreadable: tuple[str, ...] = ()
        self._maker = maker
        self._put = put
        self._num_batches = num_batches
        self._threads = threads

    def __len__(self) -> int:
        return self._num_batches

    def spec(self) -> dict[str, Any]:
        """Returns shape, dtype and sharding of every array of a batch."""
        probe = self._maker.example()
        return self._put.spec(probe.arrays | {"valid": probe.filled})

    def __iter__(self) -> Iterator[dict[str, Array]]:
        ahead: collections.deque[concurrent.futures.Future] = collections.deque()
        report = Report()
        workers = ThreadWorkers(self._maker, self._put.rows, self._threads, self._put)
        try:
            for index in range(len(self) + AHEAD):
                if index < len(self):
                    ahead.append(workers.submit(index))
                if index >= AHEAD:
                    arrays, made = ahead.popleft().result()
                    report.add(made)
                    yield arrays
        finally:
            workers.close()
        self.unreadable = tuple(bad.name for bad in report.unreadable)
