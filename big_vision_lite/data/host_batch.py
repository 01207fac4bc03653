"""The rows of one batch while threads fill them: every numeric key, stacked."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from big_vision_lite.data.unreadable import Unreadable
from big_vision_lite.types import Example

# Dtypes of arrays that travel to the device as they are; other integers become int32,
# other floats float32.
_KEPT = (np.uint8, np.uint16, np.int32, np.float32, np.bool_)
_INT32 = np.iinfo(np.int32)


@dataclasses.dataclass
class Report:
    """What happened while a batch was made, besides its arrays.

    `stages` maps the name of a stage to the CPU seconds it took for the images that
    were timed, and their number.
    """

    unreadable: list[Unreadable] = dataclasses.field(default_factory=list)
    stages: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)

    def add(self, other: "Report") -> None:
        """Adds what `other` found and timed."""
        self.unreadable += other.unreadable
        for name, (seconds, images) in other.stages.items():
            old_seconds, old_images = self.stages.get(name, (0.0, 0))
            self.stages[name] = (old_seconds + seconds, old_images + images)

    def sort(self) -> None:
        """Forgets in which order the threads ended."""
        self.unreadable.sort(key=lambda bad: bad.index)


@dataclasses.dataclass(frozen=True)
class Column:
    """Shape of one row and dtype of one key of a batch."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape)) or 'scalar'} {self.dtype}"


class HostBatch:
    """Rows `rows` of the batch of one step, in fresh arrays.

    Fresh because JAX on CPU may go on using the memory of an array it was given.
    The first finished example says which keys there are, and their shapes.
    """

    def __init__(self, step: int, rows: Sequence[int]):
        self.step = step
        self.rows = rows
        self.arrays: dict[str, np.ndarray] = {}
        self.filled = np.zeros(len(rows), bool)
        self.report = Report()
        self.cancelled = False
        self._places = {row: place for place, row in enumerate(rows)}
        self._keys: frozenset[str] = frozenset()
        self._slots: list[_Slot] = []
        self._lock = threading.Lock()

    def store(self, row: int, example: Example) -> None:
        """Copies one example into its row; raises ValueError if it does not fit."""
        if not self._slots:
            with self._lock:
                if not self._slots:
                    self._allocate(example)
        if example.keys() != self._keys:
            raise ValueError(
                f"the example has the keys {sorted(example)}, others of its batch "
                f"{sorted(self._keys)}; all examples of a source need the same keys."
            )
        index = self._places[row]
        for slot in self._slots:
            slot.put(index, example[slot.key])
        self.filled[index] = True

    def add(self, report: Report) -> None:
        """Adds the report of one thread's share of the rows."""
        with self._lock:
            self.report.add(report)

    def zeros_like(self, other: "HostBatch") -> None:
        """Makes zeros with the keys of `other`, for rows that hold no example."""
        for key, array in other.arrays.items():
            shape = (len(self.rows), *array.shape[1:])
            self.arrays[key] = np.zeros(shape, array.dtype)

    def _allocate(self, example: Example) -> None:
        columns = {key: _column(value) for key, value in example.items()}
        if not columns:
            raise ValueError(
                "the example has no key left after the last op; keep one, by "
                'Keep(keys=("image",)) for example.'
            )
        for key, column in columns.items():
            if column is None:
                raise ValueError(_not_numeric(key, example))
        slots = []
        for key, column in columns.items():
            assert column is not None, key
            # Zeros come from the system for nothing; rows without an example keep them.
            array = np.zeros((len(self.rows), *column.shape), column.dtype)
            self.arrays[key] = array
            slots.append(_Slot(key, array, example[key]))
        self._keys = frozenset(example)
        self._slots = slots


def _not_numeric(key: str, example: Example) -> str:
    """Says what to do about text, bytes and the like, which no device holds."""
    came = f'"{key}" is {type(example[key]).__name__} after the last op, not an array'
    if key in ("image", "mask"):
        return f"{came} of pixels. Put an op that decodes first, such as Decode()."
    others = tuple(k for k, value in example.items() if _column(value) is not None)
    return (
        f"{came} of numbers. Add an op that makes numbers of it, such as one that "
        f"tokenises text, or drop it: Keep(keys={others})."
    )


class _Slot:
    """One key of a batch: an array and what may be written into its rows."""

    def __init__(self, key: str, array: np.ndarray, first: Any):
        self.key = key
        self._array = array
        self._kind = _kind(first)
        self._check = _check_of(first, array.dtype)

    def put(self, index: int, value: Any) -> None:
        check = self._check
        if _kind(value) != self._kind:
            self._check_fits(value)
            check = _check_of(value, self._array.dtype)
        if check is not None:
            check(self.key, value)
        self._array[index] = value

    def _check_fits(self, value: Any) -> None:
        came = _column(value)
        expected = Column(self._array.shape[1:], self._array.dtype)
        if came == expected:
            return
        hint = "all examples of a source need the same shape and dtype."
        if came and _differ_in_rows(came, expected):
            hint = f'give all as many rows: Pad(key="{self.key}", length=...).'
        if self.key == "image":
            hint = (
                "end the ops with one that fixes the size, such as CentralCrop or "
                "DecodeInceptionCrop, and give all images the same channels."
            )
        raise ValueError(
            f'"{self.key}" is {came or type(value).__name__} after the ops, others of '
            f"its batch are {expected}; {hint}"
        )


def _differ_in_rows(one: Column, other: Column) -> bool:
    same = one.dtype == other.dtype and len(one.shape) == len(other.shape) > 0
    return same and one.shape[1:] == other.shape[1:]


def _kind(value: Any) -> tuple[tuple[int, ...], Any]:
    """Returns what is compared for every example: shape and dtype, or the type."""
    if isinstance(value, np.ndarray | np.generic):
        return value.shape, value.dtype
    return (), type(value)


def _column(value: Any) -> Column | None:
    """Returns the column of a numeric value, None for text, bytes and the like."""
    if not isinstance(value, np.ndarray | np.generic | bool | int | float):
        return None
    array = np.asarray(value)
    if array.dtype.kind not in "buif":
        return None
    # A label in uint8 is a number like any other label, not a pixel.
    small = array.ndim == 0 and array.dtype.kind == "u"
    if array.dtype in _KEPT and not small:
        return Column(array.shape, array.dtype)
    dtype = np.float32 if array.dtype.kind == "f" else np.int32
    return Column(array.shape, np.dtype(dtype))


def _check_of(value: Any, dtype: np.dtype) -> Callable[[str, Any], None] | None:
    if dtype.kind == "f":
        return _check_finite
    if isinstance(value, np.ndarray):
        return None if value.dtype == dtype else _check_int32_array
    return None if dtype == np.bool_ else _check_int32


def _check_int32(key: str, value: Any) -> None:
    """Refuses what int32 cannot hold, where numpy would wrap around."""
    if not _INT32.min <= value <= _INT32.max:
        raise ValueError(
            f'"{key}" is {value}, outside int32 ({_INT32.min} to {_INT32.max}); drop '
            "this key in the source or in an op."
        )


def _check_int32_array(key: str, value: np.ndarray) -> None:
    if value.size:
        _check_int32(key, value.min())
        _check_int32(key, value.max())


def _check_finite(key: str, value: Any) -> None:
    if not np.isfinite(value).all():
        raise ValueError(
            f'"{key}" holds NaN or infinity; repair this example or remove it.'
        )
