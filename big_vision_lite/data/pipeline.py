"""Turns a source into global batches on the devices, in order, a few ahead of use.

The batch of step n is a function of (seed, n): see `batches`.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from big_vision_lite.data.batches import (
    ATTEMPTS,
    EvaluationBatches,
    TrainingBatches,
    replacement,
)
from big_vision_lite.data.host_batch import HostBatch, Report
from big_vision_lite.data.unreadable import UnreadableImages
from big_vision_lite.data.workers import ProcessWorkers, ThreadWorkers, resolve_threads
from big_vision_lite.runtime import layout
from big_vision_lite.types import Array, DeviceOp, Op, Source

# The most batches that are begun and not yet handed out.
AHEAD = 3


class Batches:
    """Makes the endless global batches of a run, and measures what they cost.

    `threads` is the number of decoding threads in all worker processes of this host;
    `unreadable` counts the images that were skipped.
    """

    def __init__(
        self,
        maker: TrainingBatches,
        put: "_Placement",
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

        Steps count from 1. An earlier iterator must not be used any more.

        Raises:
            ValueError: `step` is below 1.
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
        """Returns {stage: (CPU seconds, images)} of the images that were timed.

        Their ratio is the cost of an image; waiting for a disk does not count.
        """
        return dict(self._report.stages)

    def close(self) -> None:
        """Ends all threads and processes; `starting_at` starts new ones."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _iterate(
        self, workers: ThreadWorkers | ProcessWorkers, step: int
    ) -> Iterator[dict[str, Array]]:
        for arrays, report in _made_ahead(workers, itertools.count(step)):
            self._report.add(Report(stages=report.stages))
            # Counted when a batch is used, not when it is made, so that too many stop
            # every run at the same step.
            self.unreadable.add(report.unreadable)
            yield arrays


class EvaluationSet:
    """Iterates over all examples of a source, once each, in its order, at every pass.

    Batches are full: rows past the end, and images that do not decode, are zeros with
    "valid" False. Every process sees the same number of batches. After a full pass
    `unreadable` holds the names of this process's images that do not decode.
    """

    def __init__(
        self,
        maker: EvaluationBatches,
        put: "_Placement",
        num_batches: int,
        threads: int,
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
        report = Report()
        workers = ThreadWorkers(self._maker, self._put.rows, self._threads, self._put)
        try:
            for arrays, made in _made_ahead(workers, range(len(self))):
                report.add(made)
                yield arrays
        finally:
            workers.close()
        self.unreadable = tuple(bad.name for bad in report.unreadable)


def _made_ahead(
    workers: ThreadWorkers | ProcessWorkers, steps: Iterable[int]
) -> Iterator[tuple[dict[str, Array], Report]]:
    """Yields the batches of `steps` in order, while the workers make the next ones."""
    ahead: collections.deque[concurrent.futures.Future] = collections.deque()
    for step in steps:
        ahead.append(workers.submit(step))
        if len(ahead) == AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


@dataclasses.dataclass(kw_only=True)
class Stream:
    """The source of the training examples and what is done with them.

    `ops` run on the host for each example, `device_ops` on the global batch inside the
    train step. `threads` decode in this process, or in each of `processes` worker
    processes; None chooses by the cores. Neither changes any batch. Raises ValueError
    for a field that cannot be used.
    """

    source: Source
    batch_size: int
    ops: tuple[Op, ...] = ()
    device_ops: tuple[DeviceOp, ...] = ()
    threads: int | None = None
    processes: int = 0

    def __post_init__(self):
        # Asks the class, because asking the object would open a lazy source.
        for method in ("__getitem__", "__len__", "name"):
            if not hasattr(type(self.source), method):
                raise ValueError(
                    f"data.source is a {type(self.source).__name__} without {method}; "
                    "give a source such as Digits(), Tfds(...) or ImageFolder(...)."
                )
        for field in ("ops", "device_ops"):
            for op in getattr(self, field):
                if not callable(op) or isinstance(op, type):
                    raise ValueError(
                        f"data.{field} holds {op!r}, not an op; give objects such as "
                        "FlipLeftRight(), with the parentheses."
                    )
        if self.batch_size < 1:
            raise ValueError(
                f"data.batch_size={self.batch_size} is not a number of images; use 1 "
                "or more, for example --config.data.batch_size=128."
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(
                f"data.threads={self.threads} cannot decode; use 1 or more, or none "
                "to choose by the cores."
            )
        if self.processes < 0:
            raise ValueError(
                f"data.processes={self.processes} is not a number of processes; use 0 "
                "for threads of this process only."
            )


@contextlib.contextmanager
def open_batches(
    stream: Stream,
    seed: int,
    mesh: jax.sharding.Mesh,
    bad_images_path: epath.Path | None = None,
) -> Iterator[Batches]:
    """Opens the training batches of a run; no thread or process outlives the context.

    Unreadable images are listed in `bad_images_path`, usually WORKDIR/bad_files.txt;
    each process writes a file of its own beside it (see `UnreadableImages`).

    Raises:
        ValueError: the batch is larger than the set, or does not divide over the mesh.
    """
    total = len(stream.source)
    if stream.batch_size > total:
        raise ValueError(
            f"data.batch_size={stream.batch_size} is larger than the data set, "
            f"{total} images. Use --config.data.batch_size={_power_of_two(total)}, or "
            "a larger split."
        )
    batches = Batches(
        TrainingBatches(stream.source, stream.ops, seed, stream.batch_size),
        _Placement(mesh, stream.batch_size, "--config.data.batch_size"),
        UnreadableImages(total, bad_images_path, jax.process_index()),
        threads=resolve_threads(stream.threads, stream.processes),
        processes=stream.processes,
    )
    try:
        yield batches
    finally:
        batches.close()


def eval_batches(
    source: Source,
    ops: tuple[Op, ...],
    batch_size: int,
    mesh: jax.sharding.Mesh,
    threads: int | None = None,
    attempts: int = 100,
) -> EvaluationSet:
    """Returns the batches of an evaluation; "valid" [B] is False for padded rows.

    One of the first `attempts` images must decode, so that their shape is known.

    Raises:
        ValueError: the source is empty, or the batch does not divide over the mesh.
    """
    total = len(source)
    if not total:
        raise ValueError("the evaluation set is empty; give a split with images.")
    return EvaluationSet(
        EvaluationBatches(source, ops, batch_size, attempts),
        _Placement(mesh, batch_size, "batch_size"),
        num_batches=math.ceil(total / batch_size),
        threads=resolve_threads(threads),
    )


def seed_of_step(seed: int, step: int) -> int:
    """Returns the seed, below 2**32, of batches that serve one step of a run alone."""
    # No attempt to replace an image has this number.
    return replacement(seed, step, ATTEMPTS, 2**32)


def spec_of(
    rows: Mapping[str, np.ndarray], batch_size: int, sharding: jax.sharding.Sharding
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape, dtype and sharding of a global batch of rows like these."""
    return {
        key: jax.ShapeDtypeStruct(
            (batch_size, *array.shape[1:]), array.dtype, sharding=sharding
        )
        for key, array in rows.items()
    }


def rows_of_devices(
    sharding: jax.sharding.Sharding, batch_size: int, devices: Collection[Any]
) -> list[int]:
    """Returns the rows of a batch that `devices` hold, each once, in order.

    There may be gaps, because neighbours in the mesh may belong to different hosts.
    """
    places = sharding.devices_indices_map((batch_size,)).items()
    held = {
        row
        for device, (rows,) in places
        if device in devices
        for row in range(*rows.indices(batch_size))
    }
    return sorted(held)


class _Placement:
    """Turns this process's rows of a batch into global arrays, rows over the mesh."""

    def __init__(self, mesh: jax.sharding.Mesh, batch_size: int, option: str):
        layout.check_batch_size(batch_size, mesh, option=option)
        self._batch_size = batch_size
        self._sharding = layout.batch_sharding(mesh)
        self.rows: Sequence[int] = rows_of_devices(
            self._sharding, batch_size, self._sharding.addressable_devices
        )
        self._places = {row: place for place, row in enumerate(self.rows)}

    def spec(self, rows: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shape, dtype and sharding of a global batch of rows like these."""
        return spec_of(rows, self._batch_size, self._sharding)

    def __call__(
        self, arrays: dict[str, np.ndarray], report: Report
    ) -> tuple[dict[str, Array], Report]:
        placed = {key: self._global(array) for key, array in arrays.items()}
        return placed, report

    def _global(self, array: np.ndarray) -> Array:
        def of_device(index: Any) -> np.ndarray:
            # A device's rows are contiguous in the batch, and all of them are here.
            start, stop, _ = index[0].indices(self._batch_size)
            first = self._places[start]
            return array[first : first + stop - start]

        shape = (self._batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, of_device)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size.bit_length() - 1)
