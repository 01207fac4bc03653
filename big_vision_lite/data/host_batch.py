"""Holds the rows of one batch while threads fill them: every numeric key, stacked."""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from big_vision_lite.data.unreadable import Unreadable
from big_vision_lite.types import Example

Numbers = np.ndarray | np.generic
# Dtypes of arrays that go to the device as they are; other integers become int32, other
# floats float32.
_KEPT = {np.dtype(name) for name in ("uint8", "uint16", "int32", "float32", "bool")}
_SMALLEST, _LARGEST = -(2**31), 2**31 - 1  # of int32


@dataclasses.dataclass
class Report:
    """The unreadable images and the CPU times of making a batch.

    `stages` maps the name of a stage to the CPU seconds it took for the images that
    were timed, and their number.
    """

    unreadable: list[Unreadable] = dataclasses.field(default_factory=list)
    stages: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)

    def add(self, other: "Report") -> None:
        """Adds the images and times of `other`."""
        self.unreadable += other.unreadable
        for name, (seconds, images) in other.stages.items():
            old_seconds, old_images = self.stages.get(name, (0.0, 0))
            self.stages[name] = (old_seconds + seconds, old_images + images)

    def sort(self) -> None:
        """Sorts by index, so that the report does not depend on the threads."""
        self.unreadable.sort(key=lambda bad: bad.index)


class HostBatch:
    """Holds `rows` of the batch of one step in newly allocated arrays.

    They are never reused: JAX on CPU may go on using the memory of an array it was
    given. The first finished example fixes the keys, shapes and dtypes.
    """

    def __init__(self, step: int, rows: Sequence[int]):
        self.step = step
        self.rows = rows
        self.arrays: dict[str, np.ndarray] = {}
        self.filled = np.zeros(len(rows), bool)
        self.report = Report()
        self.cancelled = False
        self._places = {row: place for place, row in enumerate(rows)}
        self._lock = threading.Lock()

    def store(self, row: int, example: Example) -> None:
        """Copies one example into its row; raises ValueError if it does not fit."""
        values = {key: _numbers(key, example) for key in example}
        with self._lock:
            if not self.arrays:
                self._allocate(values)
        if values.keys() != self.arrays.keys():
            raise ValueError(
                f"the example has the keys {sorted(values)}, others of its batch "
                f"{sorted(self.arrays)}; all examples of a source need the same keys."
            )
        place = self._places[row]
        for key, value in values.items():
            array = self.arrays[key]
            if value.dtype != array.dtype or value.shape != array.shape[1:]:
                raise ValueError(_misfit(key, value, array[0]))
            array[place] = value
        self.filled[place] = True

    def add(self, report: Report) -> None:
        """Adds the report of one thread's share of the rows."""
        with self._lock:
            self.report.add(report)

    def zeros_like(self, other: "HostBatch") -> None:
        """Makes zeros with the keys of `other`, for rows that hold no example."""
        self._allocate({key: array[0] for key, array in other.arrays.items()})

    def _allocate(self, values: dict[str, Numbers]) -> None:
        if not values:
            raise ValueError(
                "the example has no key left after the last op; keep one, by "
                'Keep(keys=("image",)) for example.'
            )
        # The system gives zeros at no cost; rows without an example keep them.
        self.arrays = {
            key: np.zeros((len(self.rows), *value.shape), value.dtype)
            for key, value in values.items()
        }


def _numbers(key: str, example: Example) -> Numbers:
    """Returns the value of a key in a dtype of `_KEPT`; ValueError if it cannot."""
    value = example[key]
    if type(value) is int and _SMALLEST <= value <= _LARGEST:
        return np.int32(value)  # A label: an array would cost 5 us.
    if not _is_numeric(value):
        raise ValueError(_not_numeric(key, example))
    array = np.asarray(value)
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ValueError(
                f'"{key}" holds NaN or infinity; repair this example or remove it.'
            )
        return array.astype(np.float32, copy=False)
    # A label in uint8 is a number like any other label, not a pixel.
    if array.dtype in _KEPT and (array.ndim or array.dtype.kind != "u"):
        return array
    # numpy would wrap around.
    for extreme in (array.min(), array.max()) if array.size else ():
        if not _SMALLEST <= extreme <= _LARGEST:
            raise ValueError(
                f'"{key}" is {extreme}, outside int32 ({_SMALLEST} to {_LARGEST}); '
                "drop this key in the source or in an op."
            )
    return array.astype(np.int32)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "buif"
    return isinstance(value, bool | int | float)


def _not_numeric(key: str, example: Example) -> str:
    """Returns the message on a value that is not numeric, with a remedy."""
    came = f'"{key}" is {type(example[key]).__name__} after the last op, not an array'
    if key in ("image", "mask"):
        return f"{came} of pixels. Put an op that decodes first, such as Decode()."
    others = tuple(k for k, value in example.items() if _is_numeric(value))
    return (
        f"{came} of numbers. Add an op that makes numbers of it, such as one that "
        f"tokenises text, or drop it: Keep(keys={others})."
    )


def _misfit(key: str, came: Numbers, other: Numbers) -> str:
    hint = "all examples of a source need the same shape and dtype."
    if came.dtype == other.dtype and 0 < came.ndim == other.ndim:
        if came.shape[1:] == other.shape[1:]:
            hint = f'give all as many rows: Pad(key="{key}", length=...).'
    if key == "image":
        hint = (
            "end the ops with one that fixes the size, such as CentralCrop or "
            "DecodeInceptionCrop, and give all images the same channels."
        )
    kinds = (
        f"{'x'.join(map(str, rows.shape)) or 'scalar'} {rows.dtype}"
        for rows in (came, other)
    )
    return (
        f'"{key}" is {" after the ops, others of its batch are ".join(kinds)}; {hint}'
    )
