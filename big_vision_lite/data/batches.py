"""Makes the rows of a batch on the host: reads, decodes, augments, replaces.

A row is a function of the seed and its position alone, so any number of threads,
processes and hosts makes the same batch.
"""

import hashlib
import time
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, runtime_checkable

import grain
import numpy as np

from big_vision_lite.data.host_batch import HostBatch, Report
from big_vision_lite.data.ops import UndecodableImage
from big_vision_lite.data.unreadable import Unreadable
from big_vision_lite.types import Example, Op, Source

# Sets evaluation apart from training in the first word of the Philox key; a seed
# has 32 bits.
EVALUATION = 1 << 63


class Order:
    """The endless stream of example indices, reshuffled in every epoch.

    Position p is in epoch p // size; each epoch is one permutation.
    """

    def __init__(self, size: int, seed: int):
        if not 0 <= seed < 2**32:
            raise ValueError(
                f"seed={seed} is outside 0 to {2**32 - 1}; use --config.seed=0."
            )
        indices = grain.MapDataset.range(size)
        # Any: Grain's own type allows for the holes of filtered streams.
        self._stream: Any = indices.seed(seed).shuffle().repeat()

    def indices(self, positions: Sequence[int]) -> list[int]:
        """Returns the index of the example at each position.

        Ask for many at once: between one image and the next a position costs three
        times as much, because Grain's code has left the cache of the core.
        """
        return [int(self._stream[position]) for position in positions]


def replacement(seed: int, position: int, attempt: int, size: int) -> int:
    """Returns the index that replaces an unreadable example, the same on any host."""
    words = np.array([seed, position, attempt], "<u8").tobytes()
    digest = hashlib.blake2b(words, digest_size=8).digest()
    return int.from_bytes(digest, "little") % size


class ExampleGenerator:
    """One numpy generator that is reset to `Philox(key=[seed, position])`.

    This is much cheaper than a new generator for each image. It serves one thread, and
    an op must not keep it after its call.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._bits = np.random.Philox(key=[seed, 0])
        self._generator = np.random.Generator(self._bits)
        self._start = self._bits.state

    def at(self, position: int) -> np.random.Generator:
        """Returns the generator at the start of the random stream of `position`."""
        self._start["state"]["key"] = np.array([self._seed, position], np.uint64)
        self._bits.state = self._start
        return self._generator


# With a thousandth of the images unreadable, chance does not give 8 in a row.
ATTEMPTS = 8
# One image in 8 is timed: reading the CPU clock costs as much as a tiny op.
TIMED_EVERY = 8


@runtime_checkable
class BatchMaker(Protocol):
    """Fills the rows of host batches; called from many threads, pickled to workers."""

    def fill(self, batch: HostBatch, rows: Sequence[int]) -> None:
        """Fills `rows` of the batch, or returns early once it is cancelled.

        Raises:
            ValueError: an example does not fit, or the set does not decode at all.
            OSError: a file cannot be read.
        """
        ...

    def complete(self, batch: HostBatch) -> None:
        """Adds what needs the whole batch, after all its rows are filled."""
        ...


class TrainingBatches:
    """Makes batch n of positions (n-1)·B to n·B-1 of the shuffled endless stream.

    Another image replaces an unreadable one, which the report names.
    """

    def __init__(self, source: Source, ops: tuple[Op, ...], seed: int, batch_size: int):
        self._source = source
        self._ops = ops
        self._size = len(source)
        self._order = Order(self._size, seed)
        self._seed = seed
        self._batch_size = batch_size

    def fill(self, batch: HostBatch, rows: Sequence[int]) -> None:
        examples = _Examples(self._source, self._ops, self._seed, batch)
        first = (batch.step - 1) * self._batch_size
        positions = [first + row for row in rows]
        chosen = self._order.indices(positions)
        for row, position, index in zip(rows, positions, chosen, strict=True):
            if batch.cancelled:
                return
            if not examples.make(row, index, position):
                self._replace(examples, row, position)
        examples.hand_in()

    def complete(self, batch: HostBatch) -> None:
        batch.report.sort()

    def _replace(self, examples: "_Examples", row: int, position: int) -> None:
        for attempt in range(1, ATTEMPTS):
            index = replacement(self._seed, position, attempt, self._size)
            if examples.make(row, index, position):
                return
        _refuse(examples.unreadable[-ATTEMPTS:])


class EvaluationBatches:
    """Makes batch b of examples b·B to (b+1)·B-1 of the source, then zeros.

    "valid" says which rows hold an example that decoded.
    """

    def __init__(
        self,
        source: Source,
        ops: tuple[Op, ...],
        batch_size: int,
        attempts: int,
    ):
        self._source = source
        self._ops = ops
        self._size = len(source)
        self._batch_size = batch_size
        self._attempts = attempts
        self._example: HostBatch | None = None

    def fill(self, batch: HostBatch, rows: Sequence[int]) -> None:
        examples = _Examples(self._source, self._ops, EVALUATION, batch)
        first = batch.step * self._batch_size
        for row in rows:
            if batch.cancelled or first + row >= self._size:
                break
            examples.make(row, first + row, first + row)
        examples.hand_in()

    def complete(self, batch: HostBatch) -> None:
        if not batch.arrays:
            batch.zeros_like(self.example())
        batch.arrays["valid"] = batch.filled
        batch.report.sort()

    def example(self) -> HostBatch:
        """Returns a batch of one example, the first that decodes, for its shapes.

        Raises:
            ValueError: none of the first `attempts` decodes.
        """
        if self._example is not None:
            return self._example
        batch = HostBatch(step=0, rows=range(1))
        examples = _Examples(self._source, self._ops, EVALUATION, batch)
        for index in range(min(self._size, self._attempts)):
            if examples.make(0, index, index):
                self._example = batch
                return batch
        _refuse(examples.unreadable)


class _Examples:
    """Makes one thread's share of a batch, and records errors and times."""

    def __init__(
        self, source: Source, ops: tuple[Op, ...], seed: int, batch: HostBatch
    ):
        self.unreadable: list[Unreadable] = []
        self._source = source
        self._ops = ops
        self._batch = batch
        self._generator = ExampleGenerator(seed)
        self._num_classes = len(source.class_names)
        self._seconds = np.zeros(len(ops) + 1)
        self._timed = 0

    def make(self, row: int, index: int, position: int) -> bool:
        """Makes example `index` in its row; records it and returns False if unreadable.

        Raises:
            ValueError, OSError: the data or the disk is at fault; names the example.
        """
        rng = self._generator.at(position)
        try:
            self._batch.store(row, self._make(index, rng, row % TIMED_EVERY == 0))
        except UndecodableImage as error:
            name = self._source.name(index)
            self.unreadable.append(Unreadable(index, name, str(error)))
            return False
        except (ValueError, OSError) as error:
            # A mistake in the data or a fault of the disk: one line, with the name.
            kind = OSError if isinstance(error, OSError) else ValueError
            name = self._source.name(index)
            if name in str(error):
                raise
            raise kind(f"{name}: {error}") from error
        except Exception as error:
            error.add_note(f"while example {self._source.name(index)} was made")
            raise
        return True

    def hand_in(self) -> None:
        """Adds what was recorded to the report of the batch."""
        names = ("read", *(type(op).__name__ for op in self._ops))
        report = Report(unreadable=self.unreadable)
        for name, seconds in zip(names, self._seconds.tolist(), strict=True):
            report.add(Report(stages={name: (seconds, self._timed)}))
        self._batch.add(report)

    def _make(self, index: int, rng: np.random.Generator, timed: bool) -> Example:
        now = time.thread_time if timed else float
        clock = [now()]
        example = self._read(index)
        clock.append(now())
        for op in self._ops:
            example = op(example, rng)
            clock.append(now())
        if timed:
            self._seconds += np.diff(clock)
            self._timed += 1
        return example

    def _read(self, index: int) -> Example:
        example = self._source[index]
        label = example.get("label")
        if not self._num_classes:
            return example
        if isinstance(label, int | np.integer):
            if not 0 <= label < self._num_classes:
                self._refuse_label(f"label {label}")
        elif isinstance(label, np.ndarray) and label.dtype.kind in "iu":
            # A few tags, padded with -1.
            if label.ndim != 1 or label.min() < -1 or label.max() >= self._num_classes:
                self._refuse_label(f"the tags {label.tolist()}")
        elif isinstance(label, np.ndarray) and label.shape != (self._num_classes,):
            self._refuse_label(f"a label of shape {label.shape}")
        return example

    def _refuse_label(self, came: str) -> NoReturn:
        raise ValueError(
            f"{came}, but the source has {self._num_classes} classes: labels 0 to "
            f"{self._num_classes - 1}. Audit it with python tools/check_dataset.py."
        )


def _refuse(unreadable: list[Unreadable]) -> NoReturn:
    names = "".join(f"\n  {bad.name}: {bad.reason}" for bad in unreadable[:ATTEMPTS])
    raise ValueError(
        f"{len(unreadable)} images drawn in a row do not decode:{names}\n"
        "Audit the set with python tools/check_dataset.py."
    )
