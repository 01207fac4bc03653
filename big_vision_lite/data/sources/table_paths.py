"""Paths of images in a table: read, looked for, and held out by their hash."""

import os
import posixpath
from collections.abc import Sequence
from typing import Any

from big_vision_lite.data.sources import table_labels
from big_vision_lite.data.sources.listing import stable_order
from big_vision_lite.data.sources.table_file import Columns
from big_vision_lite.data.sources.table_labels import Labels


def read_paths(columns: Columns, name: str) -> list[str]:
    """Returns the paths in a column; raises ValueError for cells that are none."""
    columns.check(
        name,
        lambda cell: not table_labels.is_empty(cell),
        "are empty",
        table_labels.FILL,
    )
    columns.check(
        name,
        _is_path,
        "are no path of a file",
        "write texts that name files below root",
    )
    return [
        cell if isinstance(cell, str) else str(cell) for cell in columns.cells[name]
    ]


def _is_path(cell: Any) -> bool:
    if not isinstance(cell, str | int) or isinstance(cell, bool):
        return False
    try:
        return b"\0" not in os.fsencode(str(cell))
    except UnicodeEncodeError:
        return False


def plain(paths: Sequence[str]) -> list[str]:
    """Returns paths without "./" and "a/../", by which two rows may name one file."""
    return [posixpath.normpath(path.replace(os.sep, "/")) for path in paths]


def check_repeated(columns: Columns, paths: Sequence[str], labels: Labels) -> None:
    """Raises ValueError for a `plain` path with two rows of unequal labels."""
    first: dict[str, int] = {}
    for row, path in enumerate(paths):
        other = first.setdefault(path, row)
        if other != row and labels.key(other) != labels.key(row):
            remedy = "keep the one that is right"
            if labels.classes is not None:
                remedy += ', or write all its classes into one row with kind="classes"'
            raise ValueError(
                f"{columns.path}: {path} has two labels, {columns.at([other, row])}; "
                f"{remedy}."
            )


def check_splits(columns: Columns, paths: Sequence[str], splits: Sequence[str]) -> None:
    """Raises ValueError for a `plain` path that is in two splits."""
    first: dict[str, int] = {}
    for row, path in enumerate(paths):
        other = first.setdefault(path, row)
        if splits[other] != splits[row]:
            raise ValueError(
                f"{columns.path}: {path} is in two splits, {splits[other]} and "
                f"{splits[row]}, {columns.at([other, row])}; keep it in one, or "
                "scores would be of images trained on."
            )


def check_file(where: str, given: str, root: str | None, folder: str) -> None:
    """Raises FileNotFoundError unless the path `given` names a file in `folder`."""
    path = os.path.join(folder, given)
    if os.path.isfile(path):
        return
    is_folder = os.path.isdir(path)
    what = f"{path} is a folder" if is_folder else f"there is no image {path}"
    raise FileNotFoundError(
        f"{where} has {given!r}, looked for in {folder} (root={root}), and {what}; "
        f"{_remedy(given, path)}."
    )


def _remedy(given: str, path: str) -> str:
    folder, name = os.path.split(path)
    if "://" in given:
        return "fetch the images, and write their paths into the table"
    if os.path.isfile(path.replace("\\", "/")):
        return 'write "/" between folders, not "\\"'
    if os.path.isdir(folder):
        alike = [f for f in os.listdir(folder) if os.path.splitext(f)[0] == name]
        if alike:
            return f"there is {alike[0]}: write the suffix into the column"
    return "give the folder that the paths begin in: root=FOLDER"


def hold_out(
    paths: Sequence[str],
    classes: Sequence[tuple[str, ...]] | None,
    share: float,
    seed: int,
) -> list[str]:
    """Returns "val" for a share of the `plain` paths (of each class), else "train".

    A class of one image keeps it for training; a larger one gives at least one.
    """
    groups: dict[Any, set[str]] = {}
    for row, path in enumerate(paths):
        group = None if classes is None else classes[row]
        groups.setdefault(group, set()).add(path)
    held: set[str] = set()
    for members in groups.values():
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.update(sorted(members, key=lambda p: stable_order(p, seed))[:count])
    return ["val" if path in held else "train" for path in paths]
