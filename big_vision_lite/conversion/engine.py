"""Tables that tie the arrays of another library to ours, read in both directions.

Every entry made here rearranges the same numbers, so that a round trip gives the same
bits. The table of a model documents its format.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from big_vision_lite import trees
from big_vision_lite.conversion import dtypes

Arrays = list[np.ndarray]
Shape = tuple[int, ...]
# Ends every report on a file that does not fit its format.
HELP = (
    "Fetch or save the file again if it may be damaged or incomplete. If it is whole, "
    "its model has other parts than those read here: use the library that wrote it, or "
    "weights of the plain model."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """Ties the arrays named `theirs` to those named `ours`.

    `to_ours(arrays, shapes)` gets theirs and the shapes that ours must have,
    `to_theirs(arrays)` gets ours; each returns one array for each name.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[[Arrays, Sequence[Shape]], Arrays]
    to_theirs: Callable[[Arrays], Arrays]


def same(theirs: str, ours: str) -> Entry:
    """Ties two arrays of one shape: biases, scales, statistics."""
    return Entry(
        theirs=(theirs,),
        ours=(ours,),
        to_ours=lambda arrays, shapes: arrays,
        to_theirs=lambda arrays: arrays,
    )


def reshaped(theirs: str, ours: str, to_theirs: Callable[[Shape], Shape]) -> Entry:
    """Ties arrays of equal numbers in equal order; `to_theirs` maps our shape."""
    return Entry(
        theirs=(theirs,),
        ours=(ours,),
        to_ours=lambda arrays, shapes: [_as(arrays[0], shapes[0])],
        to_theirs=lambda arrays: [arrays[0].reshape(to_theirs(arrays[0].shape))],
    )


def transposed(theirs: str, ours: str, axes: Sequence[int]) -> Entry:
    """Ties theirs to ours = theirs.transpose(axes)."""
    back = np.argsort(axes)
    return Entry(
        theirs=(theirs,),
        ours=(ours,),
        to_ours=lambda arrays, shapes: [arrays[0].transpose(axes)],
        to_theirs=lambda arrays: [arrays[0].transpose(back)],
    )


def dense(theirs: str, ours: str) -> Entry:
    """Ties torch's weight [out, in] to a kernel [in, out]."""
    return transposed(theirs, ours, (1, 0))


def conv(theirs: str, ours: str) -> Entry:
    """Ties torch's weight [O, I / groups, h, w] to a kernel [h, w, I / groups, O]."""
    return transposed(theirs, ours, (2, 3, 1, 0))


def projections(theirs: str, *ours: str) -> Entry:
    """Ties a weight [parts * H * Dh, D] to kernels [D, H, Dh], one for each of `ours`.

    The parts (query, key, value) follow each other, and heads follow within a part.
    """

    def to_ours(arrays: Arrays, shapes: Sequence[Shape]) -> Arrays:
        parts = _split(_matrix(arrays[0]), len(ours))
        return [_as(p.T, s) for p, s in zip(parts, shapes, strict=True)]

    def to_theirs(arrays: Arrays) -> Arrays:
        rows = [kernel.reshape(kernel.shape[0], -1).T for kernel in arrays]
        return [np.concatenate(rows)]

    return Entry(theirs=(theirs,), ours=ours, to_ours=to_ours, to_theirs=to_theirs)


def projection_biases(theirs: str, *ours: str) -> Entry:
    """Ties a bias [parts * H * Dh] to biases [H, Dh], one for each of `ours`."""

    def to_ours(arrays: Arrays, shapes: Sequence[Shape]) -> Arrays:
        parts = _split(arrays[0], len(ours))
        return [_as(p, s) for p, s in zip(parts, shapes, strict=True)]

    def to_theirs(arrays: Arrays) -> Arrays:
        return [np.concatenate([bias.reshape(-1) for bias in arrays])]

    return Entry(theirs=(theirs,), ours=ours, to_ours=to_ours, to_theirs=to_theirs)


def output_projection(theirs: str, ours: str) -> Entry:
    """Ties a weight [D, H * Dh] to a kernel [H, Dh, D]."""
    return Entry(
        theirs=(theirs,),
        ours=(ours,),
        to_ours=lambda arrays, shapes: [_as(_matrix(arrays[0]).T, shapes[0])],
        to_theirs=lambda arrays: [arrays[0].reshape(-1, arrays[0].shape[-1]).T],
    )


def read(
    entries: Iterable[Entry],
    theirs: Mapping[str, np.ndarray],
    shapes: Mapping[str, Shape],
    *,
    what: str,
    ignored: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Returns our arrays {name: float32}, one for every name in `shapes`.

    `what` names the file in messages; `ignored` are patterns of their names that no
    model needs (counters of batches, for example).

    Raises:
        ValueError: names are missing or left over, a shape differs, or a value is NaN
            or infinite; lists the first 30 by name with "+" and "-".
    """
    entries = list(entries)
    tied = {name for entry in entries for name in entry.theirs}
    lines = [f"  + {name}  only in the model" for name in sorted(tied - theirs.keys())]
    lines += [
        f"  - {name} {trees.describe(theirs[name])}  only in the file"
        for name in sorted(theirs.keys() - tied)
        if not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    ours: dict[str, np.ndarray] = {}
    for entry in entries:
        if not all(name in theirs for name in entry.theirs):
            continue
        reasons = {name: dtypes.why_no_weights(theirs[name]) for name in entry.theirs}
        if any(reasons.values()):
            lines += [f"  - {name}  {why}" for name, why in reasons.items() if why]
            continue
        arrays = [theirs[name] for name in entry.theirs]
        lines += [
            f"  - {name}  holds NaN or infinity"
            for name, array in zip(entry.theirs, arrays, strict=True)
            if not np.isfinite(array).all()
        ]
        wanted = [tuple(shapes[name]) for name in entry.ours]
        try:
            if any(array.ndim == 0 for array in arrays) and () not in wanted:
                raise ValueError("is a single number, the model has arrays")
            found = entry.to_ours(arrays, wanted)
        except ValueError as error:
            found = []
            lines.append(f"  - {', '.join(entry.theirs)}  {error}")
        for name, array, shape in zip(entry.ours, found, wanted, strict=False):
            if array.shape != shape:
                lines.append(
                    f"  - {', '.join(entry.theirs)}  gives {name} {array.shape}, the "
                    f"model has {shape}"
                )
            # Not `ascontiguousarray`, which makes a row of a single number.
            ours[name] = np.asarray(array, order="C")
    if lines:
        raise ValueError(report(what, lines))
    missing = sorted(shapes.keys() - ours.keys())
    assert not missing, f"the table of {what} forgets {missing}"
    return {name: ours[name] for name in shapes}


def report(what: str, lines: Sequence[str]) -> str:
    """Returns the message on weights that do not fit: the first 30 lines, and help.

    `what` names the file.
    """
    more = f"\n  ... and {len(lines) - 30} more" if len(lines) > 30 else ""
    return (
        f"{what} and the model differ:\n" + "\n".join(lines[:30]) + more + f"\n{HELP}"
    )


def write(
    entries: Iterable[Entry], ours: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns their {name: array} from ours, all of which the entries must cover."""
    theirs: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for entry in entries:
        arrays = entry.to_theirs([np.asarray(ours[name]) for name in entry.ours])
        for name, array in zip(entry.theirs, arrays, strict=True):
            theirs[name] = np.ascontiguousarray(array)
        used |= set(entry.ours)
    assert used == ours.keys(), f"the table forgets {sorted(ours.keys() - used)}"
    return theirs


def _matrix(array: np.ndarray) -> np.ndarray:
    """Returns a matrix as it is; a flat array would be reshaped into other rows.

    Raises:
        ValueError: it does not have 2 axes.
    """
    if array.ndim != 2:
        raise ValueError(f"{array.shape} must have 2 axes")
    return array


def _as(array: np.ndarray, shape: Shape) -> np.ndarray:
    if array.size != np.prod(shape):
        raise ValueError(f"{array.shape} cannot be {tuple(shape)}")
    return array.reshape(shape)


def _split(array: np.ndarray, parts: int) -> Arrays:
    if array.shape[0] % parts:
        raise ValueError(f"{array.shape} does not divide into {parts} parts")
    return np.split(array, parts)
