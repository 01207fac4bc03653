"""Reads the metadata of a prepared TFDS set and resolves its splits.

Reading dataset_info.json and features.json takes milliseconds, while importing
tensorflow_datasets takes a second and 60 MB. The layout and the grammar of splits are
TFDS's (https://www.tensorflow.org/datasets/splits); a test compares both.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from big_vision_lite.data.sources.tfds.features import children
from big_vision_lite.data.sources.tfds.records import (
    ArrayRecordFile,
    Records,
    TFRecordFile,
)
from big_vision_lite.messages import did_you_mean

RECORD_FILES = {"tfrecord": TFRecordFile, "array_record": ArrayRecordFile}
FILE_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
# Up to this many files are all checked when a set is opened.
FEW_FILES = 16

_PART = re.compile(r"(?P<split>[\w-]+)(\[(?P<slice>[\d\w%:.-]+)\])?")
_BOUND = re.compile(r"((?P<value>-?[\d_.]+)(?P<unit>%|shard)?)?")
_BAD_SPLIT = (
    "cannot read split={!r}; write a split or a slice of one, joined by '+': "
    "'train', 'train[:99%]', 'train[1000:2000]', 'train[:2shard]', 'train+test'."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """One split: its files, the number of records in each, and its size in bytes."""

    name: str
    shards: tuple[tuple[Path, int], ...]
    num_bytes: int

    @property
    def length(self) -> int:
        return sum(length for _, length in self.shards)

    def between(
        self, start: float | int | None, stop: float | int | None, unit: str | None
    ) -> "Range":
        """Returns the examples of a slice in `unit`: "%", "shard" or None for examples.

        Raises:
            ValueError: the slice goes beyond the split.
        """
        if unit == "%":
            if max(abs(start or 0), abs(stop or 0)) > 100:
                raise ValueError(
                    f"a slice of split {self.name!r} goes beyond 100 %; use a smaller "
                    f'one, like "{self.name}[:99%]".'
                )
            bounds = [
                x if x is None else round(x * self.length / 100.0)
                for x in (start, stop)
            ]
        elif unit == "shard":
            lengths = [length for _, length in self.shards]
            # TFDS: an end of 0 or less counts from the last shard.
            if stop is not None and stop <= 0:
                stop += len(lengths)
            bounds = [x if x is None else sum(lengths[: int(x)]) for x in (start, stop)]
        else:
            bounds = [x if x is None else int(x) for x in (start, stop)]
        first = 0 if bounds[0] is None else bounds[0]
        last = self.length if bounds[1] is None else bounds[1]
        if max(abs(first), abs(last)) > self.length:
            raise ValueError(
                f"a slice [{first}:{last}] of split {self.name!r} goes beyond its "
                f"{self.length} examples; use a smaller one, or percent: "
                f'"{self.name}[:10%]".'
            )
        first, last = (x + self.length if x < 0 else x for x in (first, last))
        return Range(split=self.name, start=first, stop=last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Examples `start` to `stop` of one split."""

    split: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedSet:
    """The metadata in the JSON files of one version folder."""

    folder: Path
    version: str
    file_format: str
    splits: Mapping[str, Split]
    features: Mapping[str, Any]

    def ranges(self, spec: str) -> list[Range]:
        """Returns the ranges of a split like `train[:99%]+test`, as TFDS reads it.

        Raises:
            ValueError: a split is unknown or malformed, or all ranges are empty.
        """
        parts = re.split(r"\s*\+\s*", "+".join(self.splits) if spec == "all" else spec)
        ranges = [r for r in map(self._range, parts) if r.start < r.stop]
        if not ranges:
            sizes = ", ".join(f"{s.name} {s.length}" for s in self.splits.values())
            raise ValueError(
                f"split={spec!r} of {self.folder} holds no example; the splits hold: "
                f"{sizes}."
            )
        return ranges

    def _range(self, part: str) -> Range:
        match = _PART.fullmatch(part)
        if not match:
            raise ValueError(_BAD_SPLIT.format(part))
        split = self.splits.get(match["split"])
        if split is None:
            raise ValueError(
                f"{self.folder} has no split {match['split']!r}; its splits: "
                f"{', '.join(self.splits)}.{did_you_mean(match['split'], self.splits)}"
            )
        if match["slice"] is None:
            return Range(split=split.name, start=0, stop=split.length)
        bounds = [_BOUND.fullmatch(bound) for bound in match["slice"].split(":")]
        units = [bound["unit"] for bound in bounds if bound and bound["unit"]]
        unit = units[0] if units else None
        if None in bounds or not any(b and b["value"] for b in bounds):
            raise ValueError(_BAD_SPLIT.format(part))
        # `train[3shard]` is one shard; one example is always written `train[3:4]`.
        if len(bounds) > 2 or (len(bounds) == 1 and unit != "shard"):
            raise ValueError(_BAD_SPLIT.format(part))
        number = float if unit == "%" else int
        try:
            ends = [number(b["value"]) if b and b["value"] else None for b in bounds]
        except ValueError as error:
            raise ValueError(_BAD_SPLIT.format(part)) from error
        if len(ends) == 1:
            ends.append(int(ends[0] or 0) + 1)
        return split.between(ends[0], ends[1], unit)

    def records(self, ranges: list[Range]) -> Records:
        """Returns the records of `ranges` as one sequence.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged; many files may only show it when read.
        """
        kind = RECORD_FILES[self.file_format]
        files = {
            path: kind(path, length)
            for split in {r.split for r in ranges}
            for path, length in self.splits[split].shards
        }
        parts = []
        for each in ranges:
            first = 0
            for path, length in self.splits[each.split].shards:
                start, stop = max(each.start, first), min(each.stop, first + length)
                parts.append((files[path], start - first, stop - start))
                first += length
        parts = [part for part in parts if part[2] > 0]
        used = {file.path: file for file, _, _ in parts}
        missing = [path.name for path in used if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(used)} record files are missing in "
                f"{self.folder}, the first is {missing[0]}; copy them, or prepare the "
                "set again."
            )
        too_small = any(self._too_small(self.splits[each.split]) for each in ranges)
        if len(used) <= FEW_FILES or too_small:
            for file in used.values():
                file.open()
        return Records(parts)

    def _too_small(self, split: Split) -> bool:
        """Returns whether a file must be truncated, by the total size alone: cheap."""
        if self.file_format != "tfrecord":  # ArrayRecord is compressed.
            return False
        sizes = (path.stat().st_size for path, _ in split.shards if path.is_file())
        return sum(sizes) < split.num_bytes


def load(folder: Path) -> PreparedSet:
    """Reads the JSON files of a version folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the file format is not read here, or a JSON file is damaged.
    """
    info = _json(folder / "dataset_info.json")
    file_format = info.get("fileFormat") or "tfrecord"
    if file_format not in RECORD_FILES:
        raise ValueError(
            f"{folder} stores {file_format!r} files; read are "
            f"{', '.join(RECORD_FILES)}: prepare it again as array_record."
        )
    splits = {}
    for entry in info.get("splits", ()):
        lengths = [int(length) for length in entry.get("shardLengths", ())]
        template = entry.get("filepathTemplate") or FILE_TEMPLATE
        name, count = entry["name"], len(lengths)
        names = [
            shard_file(template, info["name"], name, file_format, index, count)
            for index in range(count)
        ]
        splits[name] = Split(
            name=name,
            shards=tuple((folder / f, n) for f, n in zip(names, lengths, strict=True)),
            num_bytes=int(entry.get("numBytes", 0)),
        )
    features = children(_json(folder / "features.json"))
    if not features:
        raise ValueError(
            f"{folder}/features.json does not describe a dict of features."
        )
    return PreparedSet(
        folder=folder,
        version=info.get("version", folder.name),
        file_format=file_format,
        splits=splits,
        features=features,
    )


def shard_file(
    template: str, name: str, split: str, file_format: str, index: int, count: int
) -> str:
    """Returns the name of shard `index` of `count`, as TFDS numbers them."""
    width = max(5, len(str(count)))
    number, total = f"{index:0{width}d}", f"{count:0{width}d}"
    return template.format(
        DATASET=name,
        SPLIT=split,
        FILEFORMAT=file_format,
        SHARD_INDEX=number,
        NUM_SHARDS=total,
        SHARD_X_OF_Y=f"{number}-of-{total}",
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is missing; the set was made by a very old TFDS or copied only in "
            "part: copy it, or prepare the set again."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path} is not JSON ({error}); prepare the set again."
        ) from error
