"""A folder of images, a folder a class; or just images."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, SupportsIndex

from big_vision_lite.data.sources import listing
from big_vision_lite.data.sources.arrays import Example, content_hash, fields_of
from big_vision_lite.data.sources.tfds.records import with_retries
from big_vision_lite.messages import did_you_mean, some


@dataclasses.dataclass(kw_only=True)
class ImageFolder:
    """Images in `path/CLASS/**`, or in `path/{train,val,test}/CLASS/**`.

    JPEG, PNG, WebP and BMP by suffix; other files are skipped and counted. Without
    split folders a tenth of each class, chosen by `split_seed` and a hash of the path,
    is "val", the rest "train"; "all" is everything. Classes are those of the training
    split, sorted (as numbers where all are), unless `classes` pins names and order.
    `labels` False takes all images at any depth below `path`, or below
    `path/{train,val,test}`, and gives no labels: a tenth of them is "val" where there
    are no split folders. Raises FileNotFoundError for a wrong path or an empty split,
    ValueError for one class and for classes unknown to training.
    """

    path: str
    split: str = "train"
    classes: tuple[str, ...] = ()
    split_seed: int = 0
    labels: bool = True

    def __post_init__(self):
        if self.split.lower() not in (*listing.SPLIT_FOLDERS, "all"):
            raise ValueError(
                f"split={self.split!r} of an image folder is none of train, val, test, "
                f"all.{did_you_mean(self.split, listing.SPLIT_FOLDERS)}"
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

    @functools.cached_property
    def _listing(self) -> listing.Listing:
        root = Path(self.path).expanduser()
        return listing.open_split(
            root, self.split, self.classes, self.split_seed, self.labels
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._listing.class_names

    @property
    def skipped(self) -> str:
        """Returns the files besides images in the listed folders: counts by kind."""
        return str(self._listing.skipped)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of class names and of the split's paths, not of the images."""
        return content_hash((*self.class_names, "", *self._listing.paths))

    def __len__(self) -> int:
        return len(self._listing.paths)

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Returns {"image": the file's bytes, "label": int}, or without the label."""
        path = os.path.join(self._listing.root, self.relative_path(index))
        data = with_retries(lambda: _read(path), path)
        if self._listing.labels is None:
            return {"image": data}
        return {"image": data, "label": int(self._listing.labels[index])}

    def relative_path(self, index: SupportsIndex) -> str:
        """Returns the path of example `index` below `path`."""
        return self._listing.paths[index]

    def name(self, index: SupportsIndex) -> str:
        """Returns the path of example `index` for messages and lists: always UTF-8."""
        path = os.path.join(self.path, self.relative_path(index))
        return os.fsencode(path).decode("utf-8", "replace")

    def __getstate__(self) -> dict[str, Any]:
        return fields_of(self)


def folder_splits(
    path: str, split_seed: int = 0, labels: bool = True
) -> dict[str, ImageFolder]:
    """Returns a source for each split folder of `path`, else for train and val."""
    named = listing.find_splits(Path(path).expanduser(), labels) or ("train", "val")
    return {
        split: ImageFolder(path=path, split=split, split_seed=split_seed, labels=labels)
        for split in named
    }


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def open_folder(path: str, split_seed: int = 0) -> dict[str, ImageFolder]:
    """Returns the splits of an image folder by name, all with the classes of "train".

    Beside "train" those are "val" and "test" as far as there are folders of these
    names, or a held-out tenth as "val", chosen by the seed. The names of the classes
    are written into the sources, so that config.json says what every label means.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or no two classes.
    """
    splits = folder_splits(path, split_seed)
    train = splits.get("train") or ImageFolder(path=path, split="train")
    for source in splits.values():
        source.classes = train.class_names
    return splits
