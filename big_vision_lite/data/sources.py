"""Labelled images by random access: prepared TFDS sets, image folders, digits, arrays.

A source is cheap until it is first used, then opened once; a pickle holds its fields
only, so that worker processes open their own. `source[i]` is {"image", "label"}.
"""

import dataclasses
import functools
import gzip
import importlib.util
import os
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from big_vision_lite.data import image_folder, prepared_set, tfds_features, tfds_folder
from big_vision_lite.data.content_hash import content_hash
from big_vision_lite.data.in_memory import InMemory as InMemory
from big_vision_lite.data.records import with_retries
from big_vision_lite.data.tf_example import parse_example
from big_vision_lite.wording import did_you_mean, some

# The Example of types.py, which would import jax: worker processes go without.
Example = dict[str, Any]

# The digits file is ordered by writer.
DIGITS_SPLITS = {"train": slice(0, 1438), "test": slice(1438, 1797)}


@dataclasses.dataclass(kw_only=True)
class Tfds:
    """A prepared TFDS set, ArrayRecord or TFRecord, read without TensorFlow.

    `dataset` is TFDS's name, with `/config` and `:version` if wanted; `split` any of
    TFDS's (`train[:99%]+test`); the set lies in `data_dir`, else in $TFDS_DATA_DIR,
    else in ~/tensorflow_datasets. Images stay encoded. A label that is a list of
    classes becomes a float32 multi-hot [C]. Raises FileNotFoundError when the set is
    not prepared, ValueError for an unknown split or feature or a damaged file.
    """

    dataset: str
    split: str = "train"
    data_dir: str | None = None
    image_key: str = "image"
    label_key: str = "label"

    @functools.cached_property
    def _set(self) -> prepared_set.PreparedSet:
        folder = tfds_folder.find(self.dataset, self.data_dir)
        return prepared_set.load(folder)

    @functools.cached_property
    def _label(self) -> tfds_features.LabelFeature:
        opened = self._set
        tfds_features.check_image(opened.features, self.image_key, opened.folder)
        return tfds_features.label_feature(
            opened.features, self.label_key, opened.folder
        )

    @functools.cached_property
    def _records(self) -> prepared_set.Records:
        return self._set.records(self._set.ranges(self.split))

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._label.class_names

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of name, version, classes, ranges and record counts, not of images."""
        opened = self._set
        ranges = opened.ranges(self.split)
        counts = [
            [
                opened.splits[r.split].num_bytes,
                [n for _, n in opened.splits[r.split].shards],
            ]
            for r in ranges
        ]
        name = self.dataset.partition(":")[0]
        keys = (self.image_key, self.label_key)
        return content_hash(
            map(repr, (name, opened.version, keys, self.class_names, ranges, counts))
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Returns {"image": encoded bytes, "label": int or float32 [C]}."""
        index = range(len(self))[index]
        keys = (self.image_key, self.label_key)
        features = parse_example(self._records[index], keys)
        images = features.get(self.image_key, [])
        if len(images) != 1 or not isinstance(images[0], bytes):
            raise ValueError(
                f"{self.name(index)} has no encoded image under {self.image_key!r}."
            )
        return {"image": images[0], "label": self._target(features, index)}

    def name(self, index: SupportsIndex) -> str:
        """Says set, file and record of example `index`, and its file name if stored."""
        index = range(len(self))[index]
        file, record = self._records.locate(index)
        place = f"{self.dataset}: record {record} of {file.path.name}"
        if "file_name" not in self._set.features:
            return place
        try:
            stored = parse_example(file.read(record), ("file_name",))["file_name"][0]
        except (OSError, ValueError, LookupError):
            # A name is asked for when a record cannot be read: that error comes first.
            return place
        return f"{place} ({stored.decode('utf-8', 'replace')})"

    def _target(self, features: dict[str, Any], index: int) -> int | np.ndarray:
        labels = features.get(self.label_key, [])
        count = len(self.class_names)
        wrong = [label for label in labels if not 0 <= label < count]
        if wrong or (len(labels) != 1 and not self._label.multiple):
            raise ValueError(
                f"{self.name(index)} has {self.label_key}={wrong or labels}; expected "
                f"{'classes' if self._label.multiple else 'one class'} of 0 to "
                f"{count - 1}. A hidden label is often -1: such a split cannot be used."
            )
        if not self._label.multiple:
            return labels[0]
        target = np.zeros(count, np.float32)
        target[labels] = 1
        return target

    def __getstate__(self) -> dict[str, Any]:
        return _fields_of(self)


@dataclasses.dataclass(kw_only=True)
class ImageFolder:
    """Images in `path/CLASS/**`, or in `path/{train,val,test}/CLASS/**`.

    JPEG, PNG, WebP and BMP by suffix; other files are skipped and counted. Without
    split folders a tenth of each class, chosen by `split_seed` and a hash of the path,
    is "val", the rest "train"; "all" is everything. Classes are those of the training
    split, sorted, unless `classes` pins names and order. Raises FileNotFoundError for a
    wrong path or an empty split, ValueError for one class and for classes unknown to
    training.
    """

    path: str
    split: str = "train"
    classes: tuple[str, ...] = ()
    split_seed: int = 0

    def __post_init__(self):
        if self.split.lower() not in (*image_folder.SPLIT_FOLDERS, "all"):
            raise ValueError(
                f"split={self.split!r} of an image folder is none of train, val, test, "
                f"all.{did_you_mean(self.split, image_folder.SPLIT_FOLDERS)}"
            )
        if len(set(self.classes)) < len(self.classes):
            twice = sorted({c for c in self.classes if self.classes.count(c) > 1})
            raise ValueError(f"classes names {some(twice)} twice; name each once.")
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(
                f"split_seed={self.split_seed} is outside 0 to {2**32 - 1}; use 0."
            )

    @functools.cached_property
    def _listing(self) -> image_folder.Listing:
        root = Path(self.path).expanduser()
        return image_folder.open_split(root, self.split, self.classes, self.split_seed)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._listing.class_names

    @property
    def skipped(self) -> str:
        """Says what the listed folders hold beside images: counts by kind."""
        return str(self._listing.skipped)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of class names and of the split's paths, not of the images."""
        return content_hash((*self.class_names, "", *self._listing.paths))

    def __len__(self) -> int:
        return len(self._listing.paths)

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Returns {"image": the file's bytes, "label": int}."""
        path = os.path.join(self._listing.root, self.relative_path(index))
        data = with_retries(lambda: _read(path), path)
        return {"image": data, "label": int(self._listing.labels[index])}

    def relative_path(self, index: SupportsIndex) -> str:
        """Returns the path of example `index` below `path`."""
        return self._listing.paths[index]

    def name(self, index: SupportsIndex) -> str:
        """Returns the path of example `index` for messages and lists: always UTF-8."""
        path = os.path.join(self.path, self.relative_path(index))
        return os.fsencode(path).decode("utf-8", "replace")

    def __getstate__(self) -> dict[str, Any]:
        return _fields_of(self)


def folder_splits(path: str, split_seed: int = 0) -> dict[str, ImageFolder]:
    """Returns a source for each split folder of `path`, else for train and val."""
    named = image_folder.find_splits(Path(path).expanduser()) or ("train", "val")
    return {
        split: ImageFolder(path=path, split=split, split_seed=split_seed)
        for split in named
    }


@dataclasses.dataclass(kw_only=True)
class Digits:
    """Handwritten digits, uint8 [8, 8, 1], ten classes; part of scikit-learn.

    UCI optdigits, Kaynak 1995. The file is ordered by writer: `split` "train" is its
    first 1,438 images, "test" the last 359, mostly of other writers.
    """

    split: str = "train"

    def __post_init__(self):
        if self.split not in DIGITS_SPLITS:
            raise ValueError(
                f"split={self.split!r} of the digits is none of "
                f"{', '.join(DIGITS_SPLITS)}.{did_you_mean(self.split, DIGITS_SPLITS)}"
            )

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        table = _digits_table()[DIGITS_SPLITS[self.split]]
        # Stored as 0..16.
        images = np.round(table[:, :64] * (255 / 16)).astype(np.uint8)
        return images.reshape(-1, 8, 8, 1), table[:, 64].astype(np.int32)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple("0123456789")

    @functools.cached_property
    def fingerprint(self) -> str:
        images, labels = self._arrays
        return content_hash((images.tobytes(), labels.tobytes()))

    def __len__(self) -> int:
        return len(self._arrays[1])

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Returns {"image": uint8 [8, 8, 1], "label": int}."""
        images, labels = self._arrays
        return {"image": images[index].copy(), "label": int(labels[index])}

    def name(self, index: SupportsIndex) -> str:
        """Says which digit of which split."""
        return f"digits {self.split}: image {range(len(self))[index]}"

    def __getstate__(self) -> dict[str, Any]:
        return _fields_of(self)


def _digits_table() -> np.ndarray:
    # From the file: importing sklearn.datasets takes 3 s and 100 MB.
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "the digits are a file of scikit-learn, which is not installed; "
            "install it: pip install scikit-learn"
        )
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path) as file:
        return np.loadtxt(file, delimiter=",", dtype=np.uint8)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _fields_of(config: Any) -> dict[str, Any]:
    """The state of a pickle: no open file, no lock, no list of a million paths."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
