"""Images whose labels stand in a table: one class, several, or numbers."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from big_vision_lite.data.sources import (
    contents,
    table_file,
    table_labels,
    table_paths,
)
from big_vision_lite.data.sources.arrays import Example, content_hash, fields_of
from big_vision_lite.data.sources.folder import counted, summary, unequal
from big_vision_lite.data.sources.table_file import Columns
from big_vision_lite.data.sources.table_labels import LabelKind, Labels
from big_vision_lite.data.sources.tfds.records import with_retries
from big_vision_lite.messages import did_you_mean, some
from big_vision_lite.runtime import files

SPLITS = ("train", "val", "test")
# Other words for them in a column of splits.
SPLIT_WORDS = {
    **dict.fromkeys(("training", "trn"), "train"),
    **dict.fromkeys(("valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("testing", "tst"), "test"),
}
SEPARATOR = "|"
HELD_OUT = 0.1


@dataclasses.dataclass(kw_only=True)
class _Split:
    """The images of one split, in the order of the table."""

    class_names: tuple[str, ...]
    paths: list[str]
    # Of each image its label, its labels or its values.
    labels: Any


@dataclasses.dataclass(kw_only=True)
class Table:
    """Images by the paths in column `image` of a table, labelled by columns `label`.

    `path` is CSV, TSV, JSON lines or Parquet, told by its suffix; paths of images are
    relative to `root`, None for the folder of the table. `kind` says what the label
    columns hold (see `LabelKind`); an example is {"image", "label"}, of numbers
    {"image", "target": float32 [T]}, and `class_names` are then the column names, of
    tags {"image", "tags": tuple of words}, and there are no `class_names`.

    `split_column` names the split of every row (train, val, test or other words), of
    which `split` is one, or "all". Without it the share `held_out` of the images (of
    each class), chosen by `split_seed` and a hash of the path, is "val", the rest
    "train". Classes are those of the training images, sorted (as numbers where all are
    numbers), unless `classes` pins names and order. The table is read at the first
    use, which raises FileNotFoundError for a missing table or images, ValueError for
    what a table must not hold.
    """

    path: str
    image: str
    label: tuple[str, ...] | str
    kind: LabelKind = LabelKind.CLASS
    root: str | None = None
    split: str = "train"
    split_column: str | None = None
    held_out: float = HELD_OUT
    split_seed: int = 0
    separator: str = SEPARATOR
    classes: tuple[str, ...] = ()

    def __post_init__(self):
        files.check_name(self.path)
        files.check_name(self.root or "")
        if isinstance(self.label, str):
            self.label = (self.label,)
        self._check_columns()
        self._check_split()
        if self.classes and self.kind not in (LabelKind.CLASS, LabelKind.CLASSES):
            whose = "whose names are the label columns"
            if self.kind == LabelKind.TAGS:
                whose = "whose names stand in the vocabulary of Tags"
            raise ValueError(
                f"classes={some(self.classes)} mean nothing with kind={self.kind}, "
                f"{whose}; leave classes out."
            )
        twice = [c for c in self.classes if self.classes.count(c) > 1]
        if twice:
            raise ValueError(f"classes names {twice[0]!r} twice; name each once.")
        if not self.separator or (
            self.separator != SEPARATOR
            and self.kind not in (LabelKind.CLASSES, LabelKind.TAGS)
        ):
            raise ValueError(
                f"separator={self.separator!r} with kind={self.kind}: it is the text "
                'between several classes in one cell, for kind="classes" alone (and '
                'kind="tags").'
            )

    def _check_columns(self) -> None:
        if not self.label or "" in (*self.label, self.image):
            raise ValueError(
                f"image={self.image!r}, label={self.label}: name the columns of the "
                'paths and of the labels, for example image="file", label=("class",).'
            )
        named = [self.image, *self.label]
        named += [self.split_column] if self.split_column is not None else []
        twice = [name for name in named if named.count(name) > 1]
        if twice:
            raise ValueError(
                f"column {twice[0]!r} is named twice among image={self.image!r}, "
                f"label={self.label} and split_column={self.split_column!r}; each "
                "needs its own."
            )
        several = (LabelKind.FLAGS, LabelKind.NUMBERS)
        if len(self.label) > 1 and self.kind not in several:
            raise ValueError(
                f"label names {len(self.label)} columns ({some(self.label)}), and "
                f"kind={self.kind} is one column; several columns of 0 and 1 are "
                "kind=flags, of numbers kind=numbers."
            )

    def _check_split(self) -> None:
        if self.split_column is not None:
            if (self.held_out, self.split_seed) != (HELD_OUT, 0):
                raise ValueError(
                    f"held_out={self.held_out} and split_seed={self.split_seed} choose "
                    f"nothing: split_column={self.split_column!r} names the splits. "
                    "Leave them out."
                )
            return
        if self.split not in ("train", "val", "all"):
            raise ValueError(
                f"split={self.split!r} of a table without split_column is none of "
                "train, val, all; name the column that holds the splits: "
                f'split_column="split".{did_you_mean(self.split, ("train", "val"))}'
            )
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"held_out={self.held_out} is not a share between 0 and 1; use 0.1, or "
                'split="all" for all images.'
            )
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(
                f"split_seed={self.split_seed} is outside 0 to {2**32 - 1}; use 0."
            )

    @functools.cached_property
    def _opened(self) -> _Split:
        names = [self.image, *self.label]
        names += [self.split_column] if self.split_column is not None else []
        columns = table_file.read_columns(Path(self.path).expanduser(), names)
        paths = table_paths.read_paths(columns, self.image)
        labels = table_labels.read_labels(
            columns, self.label, self.kind, self.separator, self.classes
        )
        plain = table_paths.plain(paths)
        table_paths.check_repeated(columns, plain, labels)
        splits = self._splits(columns, plain, labels)
        rows = self._rows(columns, splits, self.split)
        # A wrong root has none of them.
        for row in rows[[0, len(rows) // 2, -1]].tolist():
            where = f'{self.path}: column "{self.image}"'
            table_paths.check_file(where, paths[row], self.root, self._root)
        class_names = self._class_names(columns, labels, splits)
        encoded: Any
        if labels.classes is None:
            assert labels.values is not None, "there are classes or values"
            encoded = labels.values[rows]
        else:
            what = f"{self.split} of {self.path}"
            held = [labels.classes[row] for row in rows]
            encoded = held
            if self.kind != LabelKind.TAGS:
                encoded = table_labels.numbered(held, class_names, what)
            if self.kind == LabelKind.CLASS:
                encoded = np.array(encoded, np.int32)[:, 0]
        chosen = [paths[row] for row in rows]
        return _Split(class_names=class_names, paths=chosen, labels=encoded)

    def _splits(
        self, columns: Columns, plain: Sequence[str], labels: Labels
    ) -> list[str]:
        """Returns the split of every row."""
        if self.split_column is None:
            return table_paths.hold_out(
                plain,
                labels.classes if self.kind == LabelKind.CLASS else None,
                self.held_out,
                self.split_seed,
            )
        columns.check(
            self.split_column,
            lambda cell: not table_labels.is_empty(cell),
            "are empty",
            table_labels.FILL,
        )
        words = [_split_word(cell) for cell in columns.cells[self.split_column]]
        table_paths.check_splits(columns, plain, words)
        return words

    def _rows(self, columns: Columns, splits: Sequence[str], split: str) -> np.ndarray:
        wanted = _split_word(split)
        rows = [r for r, word in enumerate(splits) if wanted in (word, "all")]
        if not rows:
            there = list(dict.fromkeys(splits))
            found = ", ".join(f"{word} ({splits.count(word)})" for word in there[:8])
            raise ValueError(
                f"{columns.path} has no rows of split {split!r}; it has {found}."
                f"{did_you_mean(wanted, there)}"
            )
        return np.array(rows)

    def _class_names(
        self, columns: Columns, labels: Labels, splits: Sequence[str]
    ) -> tuple[str, ...]:
        if labels.classes is None or self.kind == LabelKind.TAGS:
            return labels.names
        if self.classes:
            names = table_labels.pinned(self.classes)
        else:
            names = self._training_classes(columns, labels.classes, splits)
        if len(names) < 2:
            raise ValueError(
                f'{columns.path}: column "{self.label[0]}" has one class '
                f"({some(names)}) in training; two or more are needed."
            )
        return names

    def _training_classes(
        self,
        columns: Columns,
        held: Sequence[tuple[str, ...]],
        splits: Sequence[str],
    ) -> tuple[str, ...]:
        # Chance alone must not hide a class that only held-out images have.
        by_chance = self.split_column is None
        if not by_chance and "train" not in splits:
            raise ValueError(
                f"{columns.path} has no rows of split 'train' to take the classes "
                f"from, only {some(dict.fromkeys(splits))}; pin them in their order: "
                "classes=(...)."
            )
        return table_labels.in_order(
            name
            for word, names in zip(splits, held, strict=True)
            for name in names
            if by_chance or word == "train"
        )

    @property
    def _root(self) -> str:
        if self.root is None:
            return str(Path(self.path).expanduser().parent)
        return os.path.expanduser(self.root)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the names of classes, or of columns of numbers; () of tags."""
        return self._opened.class_names

    @property
    def targets(self) -> np.ndarray:
        """Returns the numbers of all images, float32 [N, T]; of kind=numbers alone."""
        values = self._opened.labels
        assert self.kind == LabelKind.NUMBERS and isinstance(values, np.ndarray)
        return values

    @property
    def words(self) -> list[tuple[str, ...]]:
        """Returns the words of all images; of kind=tags alone."""
        assert self.kind == LabelKind.TAGS, "other kinds have classes or numbers"
        return self._opened.labels

    def class_counts(self) -> np.ndarray:
        """Returns the number of images of each class."""
        labels, size = self._opened.labels, len(self.class_names)
        assert self.class_names and self.kind != LabelKind.NUMBERS, "no classes"
        if isinstance(labels, np.ndarray) and labels.ndim == 2:
            return labels.sum(axis=0).astype(np.int64)
        flat = np.concatenate([np.atleast_1d(x) for x in labels]).astype(np.int64)
        return np.bincount(flat, minlength=size)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns a hash of names, paths and labels of the split, not of the images."""
        opened = self._opened
        labels = opened.labels
        if not isinstance(labels, np.ndarray):
            labels = repr(labels)
        return content_hash((*opened.class_names, "", *opened.paths, labels))

    def __len__(self) -> int:
        return len(self._opened.paths)

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Returns the bytes of an image file and its label, labels or numbers."""
        opened = self._opened
        path = os.path.join(self._root, opened.paths[index])
        data = with_retries(lambda: contents.read_file(path), path)
        label = opened.labels[index.__index__()]
        if self.kind == LabelKind.NUMBERS:
            return {"image": data, "target": np.array(label)}
        if self.kind == LabelKind.CLASS:
            return {"image": data, "label": int(label)}
        if self.kind == LabelKind.TAGS:
            return {"image": data, "tags": label}
        if isinstance(label, tuple):
            flags = np.zeros(len(opened.class_names), np.float32)
            flags[list(label)] = 1
            return {"image": data, "label": flags}
        return {"image": data, "label": np.array(label)}

    def name(self, index: SupportsIndex) -> str:
        """Returns the path of an image, for messages and lists: always UTF-8."""
        return contents.written(os.path.join(self._root, self._opened.paths[index]))

    def __getstate__(self) -> dict[str, Any]:
        return fields_of(self)


def table_splits(table: Table) -> dict[str, Table]:
    """Returns the splits of a table by name, all with the classes of "train".

    These are "train", and of "val" and "test" those that have rows. The class names
    are written into the sources, so that config.json says what every label means.

    Raises:
        FileNotFoundError, ValueError: as a `Table` at its first use.
    """
    train = dataclasses.replace(table, split="train")
    pinned = ()
    if table.kind in (LabelKind.CLASS, LabelKind.CLASSES):
        pinned = train.class_names
    there = {"train", "val"}
    if table.split_column is not None:
        path = Path(table.path).expanduser()
        columns = table_file.read_columns(path, [table.split_column])
        there = set(map(_split_word, columns.cells[table.split_column]))
    return {
        split: dataclasses.replace(table, split=split, classes=pinned)
        for split in SPLITS
        if split in there or split == "train"
    }


def describe(tables: Sequence[Table]) -> list[str]:
    """Returns the paragraph on tables: their splits, with the counts of classes.

    Of numbers it gives the smallest and the largest. Raises as the sources do.
    """
    lines, places = [], []
    for table in tables:
        place = f"table        {os.path.abspath(os.path.expanduser(table.path))}"
        if place not in places:
            places.append(place)
            lines.append(place)
        line = f"  {table.split:<10} {_counts(table)}"
        if table.split_column is None and table.split != "all":
            line += f" (by a hash, split_seed={table.split_seed})"
        if line not in lines:
            lines.append(line)
        classes = table.kind not in (LabelKind.NUMBERS, LabelKind.TAGS)
        if classes and table.split in ("train", "all"):
            advice = unequal(table.class_names, table.class_counts())
            lines += [line for line in advice if line not in lines]
    return lines


def _counts(table: Table) -> str:
    names, size = table.class_names, len(table)
    if table.kind == LabelKind.TAGS:
        words = set().union(*table.words)
        return f"{counted(size, 'image')}, {counted(len(words), 'word')}"
    if table.kind != LabelKind.NUMBERS:
        return summary(size, names, table.class_counts())
    low, high = table.targets.min(axis=0), table.targets.max(axis=0)
    ranges = some(
        f"{name} {x:g} to {y:g}" for name, x, y in zip(names, low, high, strict=True)
    )
    return f"{counted(size, 'image')}: {ranges}"


def _split_word(cell: Any) -> str:
    word = str(cell).strip().lower()
    return SPLIT_WORDS.get(word, word)
