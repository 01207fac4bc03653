"""Sets that TensorFlow Datasets prepared, read without TensorFlow."""

import dataclasses
import functools
from typing import Any, SupportsIndex

import numpy as np

from big_vision_lite.data.sources.arrays import Example, content_hash, fields_of
from big_vision_lite.data.sources.tfds import features as tfds_features
from big_vision_lite.data.sources.tfds import folder as tfds_folder
from big_vision_lite.data.sources.tfds import prepared_set, values
from big_vision_lite.data.sources.tfds.example import parse_example


@dataclasses.dataclass(kw_only=True)
class Tfds:
    """A prepared TFDS set, ArrayRecord or TFRecord, read without TensorFlow.

    `dataset` is TFDS's name, with `/config` and `:version` if wanted; `split` is in
    TFDS's grammar (`train[:99%]+test`); the set lies in `data_dir`, else in
    $TFDS_DATA_DIR, else in ~/tensorflow_datasets. Images stay encoded. A label that is
    a list of classes becomes a float32 multi-hot [C]; `label_key` None reads no label,
    `image_key` None no image. `keys` names further features, as "objects/bbox=>boxes"
    or by their own names: images stay encoded, text is str, single numbers are int or
    float, lists of numbers, classes and boxes are numpy arrays. The first use raises
    FileNotFoundError if the set is not prepared, ValueError for an unknown split or
    feature or a damaged file.
    """

    dataset: str
    split: str = "train"
    data_dir: str | None = None
    image_key: str | None = "image"
    label_key: str | None = "label"
    keys: tuple[str, ...] = ()

    def __post_init__(self):
        read = {"image": self.image_key, "label": self.label_key}
        taken = [name for name, key in read.items() if key is not None]
        if not values.renamed(self.keys, taken) and not taken:
            raise ValueError(
                "Tfds without image_key, label_key and keys reads nothing; name the "
                'features to read: keys=("caption",).'
            )

    @functools.cached_property
    def _set(self) -> prepared_set.PreparedSet:
        folder = tfds_folder.find(self.dataset, self.data_dir)
        return prepared_set.load(folder)

    @functools.cached_property
    def _label(self) -> tfds_features.LabelFeature | None:
        opened = self._set
        if self.image_key is not None:
            tfds_features.check_image(opened.features, self.image_key, opened.folder)
        if self.label_key is None:
            return None
        return tfds_features.label_feature(
            opened.features, self.label_key, opened.folder
        )

    @functools.cached_property
    def _values(self) -> dict[str, values.ValueFeature]:
        """Returns the features that `keys` names, by their name in the example."""
        opened = self._set
        return {
            name: values.value_feature(opened.features, key, opened.folder)
            for name, key in values.renamed(self.keys).items()
        }

    @functools.cached_property
    def _records(self) -> prepared_set.Records:
        return self._set.records(self._set.ranges(self.split))

    @property
    def class_names(self) -> tuple[str, ...]:
        return () if self._label is None else self._label.class_names

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns a hash of name, version, keys, classes, ranges and record counts."""
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
        if self.keys:
            keys = (*keys, self.keys)
        return content_hash(
            map(repr, (name, opened.version, keys, self.class_names, ranges, counts))
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Returns {"image": encoded bytes, "label": int or float32 [C]} and `keys`.

        Raises:
            ValueError: a value is missing or out of range; names the example.
        """
        index = range(len(self))[index]
        others = [feature.key for feature in self._values.values()]
        stored = {self.image_key, self.label_key, *others} - {None}
        features = parse_example(self._records[index], stored)
        example: Example = {}
        if self.image_key is not None:
            images = features.get(self.image_key, [])
            if len(images) != 1 or not isinstance(images[0], bytes):
                raise ValueError(
                    f"{self.name(index)} has no encoded image under {self.image_key!r}."
                )
            example["image"] = images[0]
        if self._label is not None:
            example["label"] = self._target(self._label, features, index)
        for name, feature in self._values.items():
            try:
                example[name] = feature.read(features.get(feature.key, []))
            except ValueError as error:
                raise ValueError(f"{self.name(index)} has {error}") from error
        return example

    def name(self, index: SupportsIndex) -> str:
        """Returns set, file, record and, if stored, file name of example `index`."""
        index = range(len(self))[index]
        file, record = self._records.locate(index)
        place = f"{self.dataset}: record {record} of {file.path.name}"
        if "file_name" not in self._set.features:
            return place
        try:
            stored = parse_example(file.read(record), ("file_name",))["file_name"][0]
        except (OSError, ValueError, LookupError):
            # A name is needed when a record cannot be read: that error matters more.
            return place
        return f"{place} ({stored.decode('utf-8', 'replace')})"

    def _target(
        self, label: tfds_features.LabelFeature, features: dict[str, Any], index: int
    ) -> int | np.ndarray:
        labels = features.get(label.key, [])
        count = len(self.class_names)
        wrong = [number for number in labels if not 0 <= number < count]
        if wrong or (len(labels) != 1 and not label.multiple):
            raise ValueError(
                f"{self.name(index)} has {label.key}={wrong or labels}; expected "
                f"{'classes' if label.multiple else 'one class'} of 0 to "
                f"{count - 1}. A hidden label is often -1: such a split cannot be used."
            )
        if not label.multiple:
            return labels[0]
        target = np.zeros(count, np.float32)
        target[labels] = 1
        return target

    def __getstate__(self) -> dict[str, Any]:
        return fields_of(self)
