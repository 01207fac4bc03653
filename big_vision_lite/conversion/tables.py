"""Tables that map the names of our modules to those of another library.

A row ties a module, "stage_{s}/unit_{u}/conv{i}": "layer{s}.{u-1}.conv{i}". Names and
layouts of its leaves follow from our own parameters and the library's dialect.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from big_vision_lite.conversion import engine
from big_vision_lite.conversion.engine import Arrays, Entry, Shape
from big_vision_lite.trees import STATISTICS

# Makes the entry of one array of theirs: Layout(theirs, ours, shapes of ours).
Layout = Callable[[str, Sequence[str], Sequence[Shape]], Entry]


@dataclasses.dataclass(frozen=True, kw_only=True)
class To:
    """The target of a row whose layout differs from the dialect's."""

    theirs: str
    layout: Layout


# {ours: theirs}, in the order of the computation. A name is that of a module, or the
# full name of a parameter. "{u}" is a number without leading zeros; theirs may count
# from another number ("{u-1}") and with zeros ("{u:02d}"). "{leaf}" is the place of the
# leaf's name where theirs is not "module.weight". A tuple of our modules lies in one
# array of theirs, and so do all blocks where theirs has no number for them.
Rows = Mapping[Any, str | To]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """The names and layouts that a library gives to the leaves of a module.

    `leaves` are {ours: theirs}, `norms` the same for modules with a scale. `counter`
    names a number of batches beside running statistics, which nothing here reads.
    """

    separator: str
    leaves: Mapping[str, str]
    norms: Mapping[str, str]
    layout: Layout
    counter: str | None = None

    @property
    def ignored(self) -> tuple[str, ...]:
        return () if self.counter is None else (rf".*\.{self.counter}",)

    def counters(self, theirs: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns 0 for every counter; only a norm without momentum reads them."""
        if self.counter is None:
            return {}
        variance = f".{self.norms['variance']}"
        return {
            f"{name.removesuffix(variance)}.{self.counter}": np.zeros((), np.int64)
            for name in theirs
            if name.endswith(variance)
        }


def entries(
    rows: Rows, dialect: Dialect, leaves: Mapping[str, Shape], format_name: str
) -> list[Entry]:
    """Returns entries for all `leaves` {name: shape} of ours, by rows and blocks.

    A leaf without a row is a mistake in the table of `format_name`.
    """
    compiled = _compiled(rows, dialect)
    tied: dict[str, list[_Leaf]] = {}
    for name in leaves:
        leaf = _find(compiled, dialect, leaves, name)
        assert leaf is not None, f"{format_name} has no row for {name}"
        tied.setdefault(leaf.theirs, []).append(leaf)
    groups = [sorted(group, key=lambda leaf: leaf.place) for group in tied.values()]
    groups.sort(key=lambda group: group[0].place)
    return [
        group[0].layout(
            group[0].theirs,
            [leaf.ours for leaf in group],
            [leaves[leaf.ours] for leaf in group],
        )
        for group in groups
    ]


def under(root: str, rows: Rows, ours: str = "") -> Rows:
    """Returns rows whose names begin with `root` there and with `ours` here."""
    return {
        tuple(ours + name for name in key)
        if isinstance(key, tuple)
        else ours + key: dataclasses.replace(to, theirs=root + to.theirs)
        if isinstance(to, To)
        else root + to
        for key, to in rows.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Leaf:
    ours: str
    theirs: str
    layout: Layout
    place: tuple[int, tuple[int, ...], int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """A row for one module; `place` sorts: block, row, part of a tuple."""

    pattern: re.Pattern[str]
    theirs: str
    layout: Layout
    place: tuple[int, int, int]


def _compiled(rows: Rows, dialect: Dialect) -> list[_Row]:
    blocks: dict[str, int] = {}
    found = []
    for index, (key, to) in enumerate(rows.items()):
        modules = key if isinstance(key, tuple) else (key,)
        to = to if isinstance(to, To) else To(theirs=to, layout=dialect.layout)
        # All rows of block 0 come before those of block 1.
        before, number, _ = modules[0].partition("{")
        block = blocks.setdefault(before, index) if number else index
        numbers = set(re.findall(r"{(\w+)}", modules[0]))
        counted = numbers <= set(re.findall(r"{(\w+)", to.theirs))
        for part, module in enumerate(modules):
            pattern = re.sub(r"\\{(\w+)\\}", r"0*(?P<\1>\\d+)", re.escape(module))
            row = _Row(
                pattern=re.compile(pattern),
                theirs=to.theirs,
                layout=to.layout if counted else _stacked,
                place=(block, index, part),
            )
            found.append(row)
    return found


def _find(
    rows: Sequence[_Row], dialect: Dialect, leaves: Mapping[str, Shape], name: str
) -> _Leaf | None:
    module, _, leaf = name.removeprefix(STATISTICS).rpartition("/")
    words = dialect.norms if f"{module}/scale" in leaves else dialect.leaves
    for row in rows:
        whole = row.pattern.fullmatch(name)
        if not (found := whole or row.pattern.fullmatch(module)):
            continue
        theirs = row.theirs
        if not whole and "{leaf}" not in theirs:
            theirs += f"{dialect.separator}{{leaf}}"
        theirs = theirs.replace("{leaf}", words.get(leaf, leaf))
        block, index, part = row.place
        return _Leaf(
            ours=name,
            theirs=_filled(theirs, found.groupdict()),
            layout=row.layout,
            place=(block, tuple(map(int, found.groups())), index, part),
        )
    return None


def _filled(template: str, numbers: Mapping[str, str]) -> str:
    return re.sub(
        r"\{(\w+)([+-]\d+)?(?::(\w+))?\}",
        lambda found: format(
            int(numbers[found[1]]) + int(found[2] or 0), found[3] or ""
        ),
        template,
    )


def _stacked(theirs: str, ours: Sequence[str], shapes: Sequence[Shape]) -> Entry:
    """Ties an array of theirs to those of all blocks, stacked along its first axis."""

    def to_ours(arrays: Arrays, shapes: Sequence[Shape]) -> Arrays:
        if len(arrays[0]) != len(shapes):
            raise ValueError(f"{arrays[0].shape} holds not {len(shapes)} blocks")
        return list(arrays[0])

    return Entry(
        theirs=(theirs,),
        ours=tuple(ours),
        to_ours=to_ours,
        to_theirs=lambda arrays: [np.stack(arrays)],
    )


def torch_layout(theirs: str, ours: Sequence[str], shapes: Sequence[Shape]) -> Entry:
    """Returns the entry for torch: kernels are transposed, attention heads joined."""
    leaf, axes = ours[0].rpartition("/")[2], len(shapes[0])
    if leaf == "bias" and axes == 2:
        return engine.projection_biases(theirs, *ours)
    if leaf != "kernel":
        return engine.same(theirs, ours[0])
    if axes == 3 and ours[0].endswith("/out/kernel"):
        return engine.output_projection(theirs, ours[0])
    if axes == 3:
        return engine.projections(theirs, *ours)
    return engine.transposed(theirs, ours[0], (2, 3, 1, 0) if axes == 4 else (1, 0))


def archive_layout(theirs: str, ours: Sequence[str], shapes: Sequence[Shape]) -> Entry:
    """Returns the entry for an npz archive, whose arrays have our layout."""
    return engine.same(theirs, ours[0])


TORCH = Dialect(
    separator=".",
    leaves={"kernel": "weight", "bias": "bias"},
    norms={
        "scale": "weight",
        "bias": "bias",
        "mean": "running_mean",
        "variance": "running_var",
    },
    layout=torch_layout,
    counter="num_batches_tracked",
)
ARCHIVE = Dialect(
    separator="/",
    leaves={"kernel": "kernel", "bias": "bias"},
    norms={"scale": "scale", "bias": "bias"},
    layout=archive_layout,
)
