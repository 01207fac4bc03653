"""Makes batches ahead of their use, in threads or in worker processes with threads."""

import concurrent.futures
import itertools
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from big_vision_lite.data.batches import BatchMaker
from big_vision_lite.data.host_batch import HostBatch, Report
from big_vision_lite.runtime import cpu

# Past this many, threads of one process mostly wait for Python's lock.
MOST_THREADS = 8
SHARED_MEMORY = "/dev/shm"
# Called with the arrays of a finished batch, in the thread that finished it.
Finish = Callable[[dict[str, np.ndarray], Report], Any]


def resolve_threads(threads: int | None, processes: int = 0) -> int:
    """Returns the number of decoding threads a process: as given, or by the cores."""
    if threads is not None:
        return threads
    return max(1, min(MOST_THREADS, cpu.available() // max(1, processes)))


class ThreadWorkers:
    """Threads that share the rows of each batch among them.

    Each takes one part of the rows, so that a batch costs `threads` tasks and not one
    for every image. The last to end calls `finish`.
    """

    def __init__(
        self, maker: BatchMaker, rows: Sequence[int], threads: int, finish: Finish
    ):
        self._maker = maker
        self._finish = finish
        self._rows = rows
        self._parts = _split(rows, threads)
        self._open: set[HostBatch] = set()
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, "data")

    def submit(self, step: int) -> concurrent.futures.Future:
        """Starts the batch of a step; the future holds what `finish` returned."""
        batch = HostBatch(step, self._rows)
        task = _Task(batch, len(self._parts))
        self._open.add(batch)
        for part in self._parts:
            self._pool.submit(self._run, task, part)
        return task.future

    def close(self) -> None:
        """Ends each thread after its current image; unfinished batches are lost."""
        for batch in tuple(self._open):
            batch.cancelled = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, task: "_Task", rows: Sequence[int]) -> None:
        batch = task.batch
        try:
            self._maker.fill(batch, rows)
            if task.is_last() and not batch.cancelled:
                self._maker.complete(batch)
                result = self._finish(batch.arrays, batch.report)
                # From here on only the arrays on the devices are kept.
                self._open.discard(batch)
                task.future.set_result(result)
        except BaseException as error:
            self._open.discard(batch)
            task.fail(error)


class _Task:
    """A batch in the making: the last of its parts completes it, an error ends it."""

    def __init__(self, batch: HostBatch, parts: int):
        self.batch = batch
        self.future = concurrent.futures.Future()
        self._left = parts
        self._lock = threading.Lock()

    def is_last(self) -> bool:
        """Counts one part as filled; returns True for the last."""
        with self._lock:
            self._left -= 1
            return self._left == 0

    def fail(self, error: BaseException) -> None:
        """Ends the batch with an error, the first one if there are several."""
        with self._lock:
            self.batch.cancelled = True
            if not self.future.done():
                self.future.set_exception(error)


class ProcessWorkers:
    """Grain worker processes that make whole batches, each with its own threads.

    They are for hosts with more cores than one Python process keeps busy, and take
    about ten seconds to start. Batches pass through /dev/shm.
    """

    def __init__(
        self,
        maker: BatchMaker,
        rows: Sequence[int],
        threads: int,
        finish: Finish,
        *,
        processes: int,
        first_step: int,
    ):
        if not flags.FLAGS.is_parsed():
            # Grain reads its debug flags even in programs that parse none.
            flags.FLAGS.mark_as_parsed()
        steps = grain.MapDataset.range(first_step, 2**62)
        batches = steps.map(WholeBatches(maker, rows, threads)).to_iter_dataset(
            grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        )
        options = grain.MultiprocessingOptions(
            num_workers=processes, per_worker_buffer_size=1
        )
        self._iterator: Any = iter(batches.mp_prefetch(options))
        self._finish = finish
        # One thread takes the batches from the workers, so their order is kept.
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "data")

    def submit(self, step: int) -> concurrent.futures.Future:
        """Returns a future of what `finish` makes of the next batch, that of `step`."""
        return self._pool.submit(self._take, step)

    def close(self) -> None:
        """Ends each worker process after its current batch."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None

    def _take(self, step: int) -> Any:
        made = next(self._iterator)
        assert made["step"] == step, (made["step"], step)
        # Copied to free the shared memory: JAX, which may alias a host array, or the
        # user may keep the batch for long.
        arrays = {key: np.array(array) for key, array in made["arrays"].items()}
        return self._finish(arrays, made["report"])


class WholeBatches:
    """Makes the whole batch of one step, in a worker process."""

    def __init__(self, maker: BatchMaker, rows: Sequence[int], threads: int):
        self._maker = maker
        self._rows = rows
        self._threads = threads
        self._workers: ThreadWorkers | None = None

    def __call__(self, step: int) -> dict[str, Any]:
        if self._workers is None:
            parent = multiprocessing.parent_process()
            if parent is not None:
                threading.Thread(
                    target=_follow, args=(parent,), name="data-parent", daemon=True
                ).start()
            self._workers = ThreadWorkers(
                self._maker, self._rows, self._threads, _as_element
            )
        return self._workers.submit(int(step)).result() | {"step": int(step)}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_workers": None}


def _follow(parent: Any) -> None:
    """Ends this worker process when its parent is killed; Grain would keep it."""
    parent.join()
    os._exit(1)


def _as_element(arrays: dict[str, np.ndarray], report: Report) -> dict[str, Any]:
    """Returns what Grain takes to the main process.

    Raises:
        OSError: shared memory has no room for the batch.
    """
    needed = sum(array.nbytes for array in arrays.values())
    if os.path.isdir(SHARED_MEMORY):
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free < needed:
            # The kernel would end this process by SIGBUS if it wrote.
            raise OSError(
                f"worker processes pass batches through {SHARED_MEMORY}, which has "
                f"{free / 1e6:.0f} MB free; one batch needs {needed / 1e6:.0f} MB. "
                "Enlarge it (docker run --shm-size=8g) or use "
                "--config.data.processes=0."
            )
    return {"arrays": arrays, "report": report}


def _split(rows: Sequence[int], parts: int) -> list[Sequence[int]]:
    """Splits rows into at most `parts` contiguous parts of nearly equal length."""
    parts = max(1, min(parts, len(rows)))
    bounds = [len(rows) * part // parts for part in range(parts + 1)]
    return [rows[a:b] for a, b in itertools.pairwise(bounds)]
