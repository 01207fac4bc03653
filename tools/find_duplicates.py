"""Finds images of the evaluation sets that are among the training images, or nearly.

  python tools/find_duplicates.py --config configs/folder.py:dir=DIR --out same.csv
  python -m big_vision_lite.train --config configs/folder.py:dir=DIR \
      --workdir runs/mine --config.evaluators.val.duplicates=same.csv

Takes the sets of a recipe: its training images, and all images of its evaluators but
those that these train on. Each is compared by its bytes, and by a thumbnail of 16x16
gray values less their mean, over their norm: the likeness of two images is the product
of these, 1 for one picture of another size, brightness or contrast. Of copies in JPEG
of quality 75, 99.9 % are above the default of 0.995 (1,500 emoji of 64 px; the same of
clothes of 28 px). Crops, mirrored and turned copies are not seen; a flat image is
alike by its bytes only. Look at what it finds: two plain shirts are alike, too.

Writes the nearest training image of every image above --likeness, and prints how many
there are. With the file, Classification counts these images wrong:
lower_bound_accuracy, as in arXiv:1805.00932.
"""

import argparse
import csv
import dataclasses
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from big_vision_lite.config import TrainConfig
from big_vision_lite.data.ops.decode import UndecodableImage, decode
from big_vision_lite.data.sources import Resampled
from big_vision_lite.evaluators.duplicates import COLUMNS
from big_vision_lite.recipes import command_line, serialize
from big_vision_lite.types import Source

SIDE_PX = 16
# Images compared at once.
CHUNK = 2048
# A standard deviation of fewer gray values than this is a flat image.
FLAT = 1.0
# Rows printed of each set.
SHOWN = 3


@dataclasses.dataclass(kw_only=True)
class Images:
    """Thumbnails float32 [N, 256] and hashes of the images of a source, in its order.

    An unreadable image, counted by `unreadable`, has zeros and no hash.
    """

    source: Source
    thumbnails: np.ndarray
    digests: list[bytes]
    unreadable: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options, rest = parser().parse_known_args(argv)
    try:
        if not 0 < options.likeness <= 1:
            raise ValueError(f"--likeness {options.likeness}: use 0.995, at most 1.")
        command = command_line.parse(["find_duplicates", *rest], lambda flags: None)
        find(command.config, Path(options.out), options.likeness)
    except (OSError, ValueError) as error:
        print(f"Not compared: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--out", required=True, help="the file to write, CSV")
    arguments.add_argument("--likeness", type=float, default=0.995, help="0 to 1")
    return arguments


def find(config: TrainConfig, out: Path, likeness: float) -> None:
    """Compares the sets of a recipe, writes `out` and prints a line a set."""
    train = config.data.source
    # Repeated images are looked at once.
    train = train.source if isinstance(train, Resampled) else train
    sets = dict(evaluated(config.evaluators, "evaluators"))
    if not sets:
        raise ValueError("the recipe's evaluators have no images to compare.")
    found = {place: read(source, range(len(source))) for place, source in sets.items()}
    nearest = {place: Nearest(images) for place, images in found.items()}
    unreadable = 0
    for first in range(0, len(train), CHUNK):
        part = read(train, range(first, min(first + CHUNK, len(train))))
        unreadable += part.unreadable
        for each in nearest.values():
            each.compare(part, first)
    rows = []
    for place, each in nearest.items():
        mine = each.rows(train, likeness)
        print("\n".join(report(place, each, mine, len(train))))
        rows += [(place, *row) for row in mine] or [(place, "", "", "")]
    unreadable += sum(images.unreadable for images in found.values())
    if unreadable:
        print(f"{unreadable} images do not decode and are compared with none.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    print(f"Wrote {out}")


def evaluated(component: Any, where: str) -> Iterator[tuple[str, Source]]:
    """Yields the sources that evaluators score on, by their place in the recipe."""
    kind = type(component)
    if all(hasattr(kind, name) for name in ("__getitem__", "__len__", "name")):
        yield where, component
    elif isinstance(component, Mapping):
        for name, value in component.items():
            yield from evaluated(value, f"{where}.{name}")
    elif isinstance(component, tuple):
        for index, value in enumerate(component):
            yield from evaluated(value, f"{where}[{index}]")
    elif dataclasses.is_dataclass(component):
        for field in serialize.fields(component):
            # Images that an evaluator fits something on are not scored.
            if field.name != "train":
                value = getattr(component, field.name)
                yield from evaluated(value, f"{where}.{field.name}")


def read(source: Source, rows: Sequence[int]) -> Images:
    """Reads and decodes images, each once."""
    thumbnails = np.zeros((len(rows), SIDE_PX**2), np.float32)
    digests, unreadable = [], 0
    for place, row in enumerate(rows):
        data = source[row]["image"]
        try:
            thumbnails[place] = thumbnail(decode(data, channels=1))
        except UndecodableImage:
            unreadable += 1
            digests.append(b"")
            continue
        same = (
            data
            if isinstance(data, bytes)
            else repr(data.shape).encode() + (np.ascontiguousarray(data).tobytes())
        )
        digests.append(hashlib.blake2b(same, digest_size=16).digest())
    return Images(
        source=source, thumbnails=thumbnails, digests=digests, unreadable=unreadable
    )


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Returns [256] of mean 0 and norm 1 for uint8 [H, W, 1]; zeros if it is flat."""
    gray = image[..., 0].astype(np.float32)
    # By averaging; a side that is shorter is repeated first.
    repeats = [-(-SIDE_PX // side) for side in gray.shape]
    gray = np.repeat(np.repeat(gray, repeats[0], axis=0), repeats[1], axis=1)
    small = cv2.resize(gray, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA).ravel()
    small -= small.mean()
    norm = np.linalg.norm(small)
    return small / norm if norm > FLAT * SIDE_PX else np.zeros_like(small)


class Nearest:
    """The nearest training image of every image of an evaluation set, so far."""

    def __init__(self, images: Images):
        self.images = images
        self.likeness = np.full(len(images.digests), -1.0, np.float32)
        self.same = np.zeros(len(images.digests), bool)
        self._index = np.zeros(len(images.digests), np.int64)
        self._places: dict[bytes, list[int]] = {}
        for place, digest in enumerate(images.digests):
            if digest:
                self._places.setdefault(digest, []).append(place)

    def compare(self, part: Images, first: int) -> None:
        """Compares with training images `first`, `first` + 1, ..."""
        for start in range(0, len(self.likeness), CHUNK):
            rows = slice(start, start + CHUNK)
            products = self.images.thumbnails[rows] @ part.thumbnails.T
            best = products.argmax(axis=1)
            highest = np.take_along_axis(products, best[:, None], axis=1)[:, 0]
            better = (highest > self.likeness[rows]) & ~self.same[rows]
            self.likeness[rows][better] = highest[better]
            self._index[rows][better] = first + best[better]
        for place, digest in enumerate(part.digests):
            for own in self._places.get(digest, ()):
                if not self.same[own]:
                    self.same[own], self._index[own] = True, first + place
                    self.likeness[own] = 1.0

    def rows(self, train: Source, likeness: float) -> list[tuple[str, str, str]]:
        """Returns (image, training image, likeness) of what is alike, likest first."""
        order = np.argsort(-self.likeness, kind="stable")
        chosen = [i for i in order.tolist() if self.likeness[i] >= likeness]
        source = self.images.source
        return [
            (source.name(i), train.name(int(self._index[i])), f"{self.likeness[i]:.4f}")
            for i in chosen
        ]


def report(
    place: str, found: Nearest, rows: Sequence[Sequence[str]], total: int
) -> list[str]:
    """Returns the lines on one evaluation set."""
    count = len(found.likeness)
    lines = [
        f"{place}: {len(rows):,} of {count:,} images ({len(rows) / count:.2%}) have a "
        f"near duplicate among {total:,} training images, {int(found.same.sum()):,} of "
        "them the same file"
    ]
    return lines + [f"  {a} = {b} ({c})" for a, b, c in rows[:SHOWN]]


if __name__ == "__main__":
    sys.exit(main())
