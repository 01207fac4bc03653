"""Images in class folders, or in any folders without labels."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from big_vision_lite.data.sources import contents, listing, splits
from big_vision_lite.data.sources.arrays import Example, content_hash, fields_of
from big_vision_lite.data.sources.tfds.records import with_retries
from big_vision_lite.messages import did_you_mean, some
from big_vision_lite.runtime import files

# Above this ratio of the largest class to the smallest the accuracy says little.
UNEQUAL_ABOVE = 20


@dataclasses.dataclass(kw_only=True)
class ImageFolder:
    """Images in `path/CLASS/**`, or in `path/{train,val,test}/CLASS/**`.

    Images by suffix (`file_kinds.SUFFIXES`); what else is there is left out, and
    `describe` says it. Names such as Training or test_set mean splits, too. Without
    split folders a tenth of each class, chosen by `split_seed` and a hash of the path,
    is "val", the rest "train"; "all" is everything. Classes are those of the training
    split, sorted (as numbers where all are), unless `classes` gives names and order.
    `labels` False takes all images at any depth below `path`, or below
    `path/{train,val,test}`, and gives no labels: a tenth of them is "val" where there
    are no split folders. The first use raises FileNotFoundError for a wrong path or an
    empty split, ValueError for a single class and for classes unknown to training.
    """

    path: str
    split: str = "train"
    classes: tuple[str, ...] = ()
    split_seed: int = 0
    labels: bool = True

    def __post_init__(self):
        files.check_name(self.path)
        if self.split.lower() not in (*splits.SPLIT_FOLDERS, "all"):
            raise ValueError(
                f"split={self.split!r} of an image folder is none of train, val, test, "
                f"all.{did_you_mean(self.split, splits.SPLIT_FOLDERS)}"
            )
        if self.classes and not self.labels:
            raise ValueError(
                f"classes={some(self.classes)} mean nothing with labels=False; leave "
                "one of the two out."
            )
        if len(set(self.classes)) < len(self.classes):
            twice = sorted({c for c in self.classes if self.classes.count(c) > 1})
            raise ValueError(f"classes names {some(twice)} twice; name each once.")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(
                f"split_seed={self.split_seed} is outside 0 to {2**32 - 1}; use 0."
            )

    @property
    def root(self) -> Path:
        """Returns the folder, with ~ expanded."""
        return Path(self.path).expanduser()

    @functools.cached_property
    def _listing(self) -> listing.Listing:
        return listing.open_split(
            self.root, self.split, self.classes, self.split_seed, self.labels
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._listing.class_names

    @property
    def left_out(self) -> dict[Path, contents.LeftOut]:
        """Returns what each listed folder holds beside the images."""
        return self._listing.left_out

    def class_counts(self) -> np.ndarray:
        """Returns the number of images of each class."""
        labels = self._listing.labels
        assert labels is not None, "asked of a folder with labels only"
        return np.bincount(labels, minlength=len(self.class_names))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns a hash of class names and the split's paths, not of the images."""
        return content_hash((*self.class_names, "", *self._listing.paths))

    def __len__(self) -> int:
        return len(self._listing.paths)

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Returns {"image": the file's bytes, "label": int}, or the image alone."""
        path = os.path.join(self._listing.root, self.relative_path(index))
        data = with_retries(lambda: contents.read_file(path), path)
        if self._listing.labels is None:
            return {"image": data}
        return {"image": data, "label": int(self._listing.labels[index])}

    def relative_path(self, index: SupportsIndex) -> str:
        """Returns the path of example `index` below `path`."""
        return self._listing.paths[index]

    def name(self, index: SupportsIndex) -> str:
        """Returns the path of example `index` for messages and lists: always UTF-8."""
        return contents.written(os.path.join(self.path, self.relative_path(index)))

    def __getstate__(self) -> dict[str, Any]:
        return fields_of(self)


def folder_splits(
    path: str, split_seed: int = 0, labels: bool = True, classes: Sequence[str] = ()
) -> dict[str, ImageFolder]:
    """Returns a source for each split folder of `path`, else for train and val."""
    root = Path(path).expanduser()
    named = splits.find_splits(root, labels, classes) or ("train", "val")
    return {
        split: ImageFolder(
            path=path,
            split=split,
            split_seed=split_seed,
            labels=labels,
            classes=tuple(classes),
        )
        for split in named
    }


def open_folder(
    path: str, split_seed: int = 0, classes: str = ""
) -> dict[str, ImageFolder]:
    """Returns the splits of an image folder by name, all with the classes of "train".

    Beside "train" those are "val" and "test" as far as there are folders of these
    names, or a held-out tenth as "val", chosen by the seed. The names of the classes
    are written into the sources, so that config.json says what every label means;
    `classes` pins them, joined by commas.

    Raises:
        OSError, ValueError: there is no such folder, or no two classes.
    """
    pinned = tuple(name for name in classes.split(",") if name)
    found = folder_splits(path, split_seed, classes=pinned)
    train = found.get("train") or ImageFolder(path=path, split="train", classes=pinned)
    for source in found.values():
        source.classes = train.class_names
    return found


def describe(sources: Sequence[ImageFolder]) -> list[str]:
    """Returns the paragraph on folders: splits, classes and counts, what is left out.

    A run, its dry run and tools/check_dataset.py print it. Raises as the sources do.
    """
    lines = []
    for root in dict.fromkeys(source.root for source in sources):
        found: dict[str, ImageFolder] = {}
        for source in sources:
            if source.root == root:
                found.setdefault(source.split, source)
        lines += _describe(root, list(found.values()))
    return lines


def _describe(root: Path, sources: Sequence[ImageFolder]) -> list[str]:
    first = sources[0]
    there = splits.find_splits(root, first.labels, first.classes)
    lines = [f"images       {contents.written(os.path.abspath(root))}"]
    for source in sources:
        split = splits.SPLIT_FOLDERS.get(source.split.lower(), source.split.lower())
        place = there.get(split)
        where = ""
        if place is not None and place != root / split:
            where = f" (folder {contents.written(os.path.relpath(place, root))})"
        elif not there and split != "all":
            where = f" (by a hash, split_seed={source.split_seed})"
        lines.append(f"  {split:<10} {_counts(source)}{where}")
    if first.labels:
        lines += unequal(first.class_names, first.class_counts())
    used = {splits.SPLIT_FOLDERS.get(s.split.lower(), s.split) for s in sources}
    unused = [f"{n} (folder {p.relative_to(root)})" for n, p in there.items()]
    unused = [text for text in unused if text.split()[0] not in used]
    if unused and "all" not in used:
        lines.append(f"  not used   {', '.join(unused)}")
    # Splits of one folder without split folders have listed the same.
    left_out = contents.merged(
        {place: part for s in sources for place, part in s.left_out.items()}.values()
    )
    lines += [f"  left out   {line}" for line in left_out.lines(str(root))]
    return lines


def _counts(source: ImageFolder) -> str:
    if not source.labels:
        return counted(len(source), "image")
    return summary(len(source), source.class_names, source.class_counts())


def summary(size: int, names: Sequence[str], counts: np.ndarray) -> str:
    """Returns a line on a labelled set: images, classes, the smallest, the largest."""
    least, most = int(counts.argmin()), int(counts.argmax())
    return (
        f"{counted(size, 'image')} of {len(names)} classes: smallest {names[least]} "
        f"({counts[least]:,}), largest {names[most]} ({counts[most]:,})"
    )


def unequal(names: Sequence[str], counts: np.ndarray) -> list[str]:
    """Returns a line of advice if the largest class has over 20 times the smallest."""
    there = np.flatnonzero(counts)
    least, most = int(there[counts[there].argmin()]), int(counts.argmax())
    ratio = counts[most] / counts[least]
    if ratio <= UNEQUAL_ABOVE:
        return []
    return [
        f"  unequal    {names[most]} has {ratio:,.0f} times as many images as "
        f"{names[least]}: read balanced_accuracy beside accuracy; in training, "
        "class_weights=balanced of configs/folder.py and table.py weighs all alike"
    ]


def counted(count: int, noun: str) -> str:
    """Returns "1 image", "2,000 images"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
