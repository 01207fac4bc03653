"""Audits a set of images before a run spends hours on it.

  python tools/check_dataset.py FOLDER
  python tools/check_dataset.py --tfds fashion_mnist --split train+test
  python tools/check_dataset.py --no_labels FOLDER
  python tools/check_dataset.py --table labels.csv --image file --label class

Reads and decodes every image once. Reports splits, classes and what is left out, as a
run does at its start; sizes, images that their EXIF turns, unreadable files, and the
same file in two splits or under two labels. Exit code 1 when something must be
repaired, 2 when the set cannot be opened.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from big_vision_lite.data.image_formats import format_of
from big_vision_lite.data.ops.decode import UndecodableImage, decode
from big_vision_lite.data.ops.pillow import orientation_of
from big_vision_lite.data.sources import LabelKind, Table, Tfds, folder, table
from big_vision_lite.data.sources.tfds import folder as tfds_folder
from big_vision_lite.data.sources.tfds import prepared_set
from big_vision_lite.messages import some

# Edges of the short side, in pixels, between the rows of the size table.
SIZE_EDGES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# Names printed of each kind of problem.
MOST_NAMES = 5
# Images handed to the threads at once: a million results would not be queued.
CHUNK = 1024


@dataclasses.dataclass(kw_only=True)
class Image:
    """What is kept of one image; `problem` is empty when it can be used."""

    height: int = 0
    width: int = 0
    digest: bytes = b""
    label: Any = None
    orientation: int = 1
    problem: str = ""


@dataclasses.dataclass(kw_only=True)
class Audit:
    """All images of one split, in the order of the source."""

    source: Any
    images: list[Image]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Returns the names of the classes, () without any: of numbers, of nothing."""
        numbers = getattr(self.source, "kind", None) == LabelKind.NUMBERS
        return () if numbers else tuple(self.source.class_names)

    def counts(self) -> np.ndarray:
        """Returns the number of usable images a class."""
        counts = np.zeros(len(self.class_names), np.int64)
        if not len(counts):
            return counts
        for image in self.images:
            if not image.problem and image.label is not None:
                classes = image.label > 0 if np.ndim(image.label) else image.label
                counts[classes] += 1
        return counts


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        sources = open_sources(options)
    except (OSError, ValueError) as error:
        print(f"Cannot open the set: {error}", file=sys.stderr)
        return 2
    audits: dict[str, Audit] = {}
    problems: list[str] = []
    nothing = []
    if not options.tfds:
        describe = table.describe if options.table else folder.describe
        print("\n".join(describe(opened(sources))))
    for split, source in sources.items():
        try:
            audits[split] = audit(source, options.threads)
        except FileNotFoundError as error:
            nothing.append(str(error))
            problems.append(f"{split}: {error}")
            continue
        except (OSError, ValueError) as error:
            problems.append(f"{split}: {error}")
            continue
        print_split(split, audits[split], options.all_classes)
        problems += unusable(split, audits[split])
    if len(nothing) == len(sources):  # both splits say it of a folder without images
        print(f"PROBLEM: {nothing[0]}")
        return 2
    problems += repeated(audits)
    for line in [line for item in audits.items() for line in uneven(*item)]:
        print(f"warning: {line}")
    for line in problems:
        print(f"PROBLEM: {line}")
    print(f"Problems: {len(problems) or 'none'}.")
    return 1 if problems else 0


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = arguments.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "folder", nargs="?", help="folder of images, as ImageFolder reads"
    )
    what.add_argument("--tfds", metavar="NAME", help="a prepared TFDS set")
    what.add_argument("--table", metavar="FILE", help="a table with paths of images")
    arguments.add_argument("--split", help="of --tfds; by default every split")
    arguments.add_argument("--data_dir", help="of --tfds; where the sets lie")
    arguments.add_argument("--image", default="image", help="of --table: column")
    arguments.add_argument(
        "--label", default="label", help="of --table: column or columns, by commas"
    )
    arguments.add_argument(
        "--kind",
        choices=list(LabelKind),
        default=LabelKind.CLASS,
        help="of --table: what the columns hold",
    )
    arguments.add_argument("--split_column", help="of --table: train, val, test")
    arguments.add_argument("--root", help="of --table: where its paths begin")
    arguments.add_argument("--separator", default=table.SEPARATOR, help="of --table")
    arguments.add_argument("--image_key", default="image")
    arguments.add_argument("--label_key", default="label")
    arguments.add_argument(
        "--no_labels", action="store_true", help="images only, at any depth of a folder"
    )
    arguments.add_argument("--threads", type=int, default=8)
    arguments.add_argument(
        "--all_classes", action="store_true", help="print the count of every class"
    )
    return arguments


def open_sources(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the sources of a folder, a prepared set or a table by split."""
    if options.tfds:
        return dict(open_set(options))
    if options.folder:
        return dict(folder.folder_splits(options.folder, labels=not options.no_labels))
    whole = Table(
        path=options.table,
        image=options.image,
        label=tuple(name.strip() for name in options.label.split(",")),
        kind=LabelKind(options.kind),
        root=options.root,
        split_column=options.split_column,
        separator=options.separator,
    )
    return dict(table.table_splits(whole))


def opened(sources: dict[str, Any]) -> list[Any]:
    """Returns the sources that can be listed; the audit says why others cannot."""
    found = []
    for source in sources.values():
        with contextlib.suppress(OSError, ValueError):
            len(source)
            found.append(source)
    return found


def open_set(options: argparse.Namespace) -> dict[str, Tfds]:
    """Returns a source for each split asked for, by default for each there is."""
    prepared = prepared_set.load(tfds_folder.find(options.tfds, options.data_dir))
    splits = [options.split] if options.split else list(prepared.splits)
    for split in splits:
        prepared.ranges(split)
    return {
        split: Tfds(
            dataset=options.tfds,
            split=split,
            data_dir=options.data_dir,
            image_key=options.image_key,
            label_key=None if options.no_labels else options.label_key,
        )
        for split in splits
    }


def audit(source: Any, threads: int) -> Audit:
    """Reads and decodes every image of `source`, once, in `threads` threads."""
    images: list[Image] = []
    started = shown = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(source), CHUNK):
            indices = range(first, min(first + CHUNK, len(source)))
            images += pool.map(lambda index: look_at(source, index), indices)
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                rate = len(images) / (shown - started)
                print(
                    f"  {len(images)} of {len(source)}, {rate:.0f}/s", file=sys.stderr
                )
    return Audit(source=source, images=images)


def look_at(source: Any, index: int) -> Image:
    """Decodes one image as a run does; a problem of this image is kept, not raised."""
    try:
        example = source[index]
    except (OSError, ValueError) as error:
        return Image(problem=str(error))
    label, data = example.get("label", example.get("target")), example["image"]
    digest = hashlib.blake2b(data, digest_size=16).digest()
    try:
        height, width, _ = decode(data).shape
    except UndecodableImage as error:
        return Image(digest=digest, label=label, problem=error.reason)
    turn = orientation_of(data, format_of(data))
    return Image(
        height=height, width=width, digest=digest, label=label, orientation=turn
    )


def print_split(split: str, found: Audit, all_classes: bool) -> None:
    """Prints counts, classes and sizes of one split."""
    names, counts = found.class_names, found.counts()
    classes = f", {len(names)} classes" if names else ""
    print(f"{split}: {len(found.images)} images{classes}")
    order = np.argsort(-counts, kind="stable")
    if not all_classes and len(names) > 10:
        order = np.concatenate([order[:5], [-1], order[-5:]])
    for number in order:
        row = "..." if number < 0 else f"{names[number]}: {counts[number]}"
        print(f"  {row}")
    usable = [image for image in found.images if not image.problem]
    if not usable:
        return
    turned = sum(image.orientation != 1 for image in usable)
    if turned:
        print(
            f"  EXIF turns {turned} images ({turned / len(usable):.1%}): they are read "
            'as stored, unless Decode and DecodeInceptionCrop say orientation="apply"'
        )
    sides = np.asarray([(image.height, image.width) for image in usable])
    low, middle, high = sides.min(0), np.median(sides, 0).astype(int), sides.max(0)
    print(
        f"  height x width: smallest sides {low[0]}x{low[1]}, median "
        f"{middle[0]}x{middle[1]}, largest {high[0]}x{high[1]}"
    )
    rows = np.bincount(np.digitize(sides.min(1), SIZE_EDGES))
    for row, count in enumerate(rows):
        if count:
            first = SIZE_EDGES[row - 1] if row else 1
            last = SIZE_EDGES[row] - 1 if row < len(SIZE_EDGES) else "more"
            print(f"  short side {first} to {last} px: {count}")


def unusable(split: str, found: Audit) -> list[str]:
    """Names the images that cannot be read or decoded."""
    bad = [index for index, image in enumerate(found.images) if image.problem]
    if not bad:
        return []
    rows = [
        f"{found.source.name(index)}: {found.images[index].problem}"
        for index in bad[:MOST_NAMES]
    ]
    share = len(bad) / len(found.images)
    return [
        f"{split}: {len(bad)} unreadable images ({share:.3%}):" + "".join(lines(rows))
    ]


def repeated(audits: dict[str, Audit]) -> list[str]:
    """Names images that are the same file in two splits, or under two labels."""
    seen: dict[bytes, tuple[str, int]] = {}
    across: dict[tuple[str, str], list[str]] = {}
    contradictions, within = [], 0
    for split, found in audits.items():
        for index, image in enumerate(found.images):
            if image.problem:
                continue
            first_split, first = seen.setdefault(image.digest, (split, index))
            if (first_split, first) == (split, index):
                continue
            other = audits[first_split]
            row = f"{found.source.name(index)} = {other.source.name(first)}"
            if not np.array_equal(image.label, other.images[first].label):
                contradictions.append(row)
            if first_split == split:
                within += 1
            else:
                across.setdefault((first_split, split), []).append(row)
    if within:
        print(f"note: {within} images repeat another one of their split")
    problems = [
        f"{len(rows)} images of {split} are also in {first}: scores on {split} are not "
        "held out:" + "".join(lines(rows[:MOST_NAMES]))
        for (first, split), rows in across.items()
    ]
    if contradictions:
        problems.append(
            f"{len(contradictions)} images have two labels:"
            + "".join(lines(contradictions[:MOST_NAMES]))
        )
    return problems


def uneven(split: str, found: Audit) -> list[str]:
    """Warns of classes without an image and of very different numbers of images."""
    names, counts = found.class_names, found.counts()
    empty = [names[number] for number in np.flatnonzero(counts == 0)]
    warnings = []
    if empty:
        warnings.append(f"{split} has no image of {len(empty)} classes: {some(empty)}")
    held = counts[counts > 0]
    if held.size and held.max() > folder.UNEQUAL_ABOVE * held.min():
        warnings.append(
            f"{split} is uneven: {names[counts.argmax()]} has {held.max()} images, the "
            f"smallest class {held.min()}; read balanced_accuracy beside the accuracy"
        )
    return warnings


def lines(rows: Sequence[str]) -> list[str]:
    return [f"\n    {row}" for row in rows]


if __name__ == "__main__":
    sys.exit(main())
