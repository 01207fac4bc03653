"""Packs images into a prepared TFDS set: few large files, read at random.

  python tools/prepare_dataset.py folder DIR --out DATA_DIR --name my_set
  python tools/prepare_dataset.py glyphs --fonts FOLDER --out DATA_DIR
  python tools/prepare_dataset.py tfds oxford_iiit_pet --data_dir DATA_DIR
  python tools/prepare_dataset.py tags --table tags.csv --image file --min_count 100 \
      --synonyms synonyms.csv --out vocabulary.json

`folder` needs no TensorFlow; what it writes is read by `Tfds(dataset="my_set",
data_dir=DATA_DIR)` and by tensorflow_datasets. Splits and classes are those of
ImageFolder. It may be killed at any moment: the same command goes on, and the set gets
its name when it is whole. `glyphs` renders 62 Latin letters and digits, 32x32 gray,
light on dark, from every font below FOLDER, a family of fonts in one split only. `tfds`
downloads and prepares a set that TFDS knows; it needs `pip install -e ".[prepare]"` and
a network. `tags` packs nothing: it counts the tags of training images, in a table or in
a list of texts of a prepared set, and writes the vocabulary that `Tags` reads.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from big_vision_lite.data.ops.decode import UndecodableImage, decode
from big_vision_lite.data.sources import ImageFolder, folder_splits
from big_vision_lite.data.sources.arrays import content_hash
from big_vision_lite.data.sources.folder import describe
from big_vision_lite.data.sources.listing import stable_order
from big_vision_lite.data.sources.tfds import folder as tfds_folder
from big_vision_lite.data.sources.tfds.example import encode_example
from big_vision_lite.data.sources.tfds.prepared_set import FILE_TEMPLATE, shard_file
from big_vision_lite.data.sources.tfds.records import ArrayRecordFile
from big_vision_lite.messages import some

FEATURES = "tensorflow_datasets.core.features"
# Read and decoded side by side; bounds memory, too.
BATCH = 256
# Folder of what is needed to go on after a kill; gone when the set is whole.
PROGRESS = "progress"


@dataclasses.dataclass(kw_only=True)
class Shard:
    """One file to write: its name and the rows of the source that it takes."""

    path: Path
    split: str
    source: Any
    rows: list[int]

    def record(self, row: int) -> tuple[bytes, str]:
        """Returns one serialised image, or why it cannot be used."""
        example = self.source[row]
        name = os.fsencode(self.source.relative_path(row)).decode("utf-8", "replace")
        try:
            decode(example["image"])
        except UndecodableImage as error:
            return b"", f"{name}: {error.reason}"
        features = {
            "file_name": name.encode(),
            "image": example["image"],
            "label": example["label"],
        }
        if "tags" in example:
            features["tags"] = [word.encode() for word in example["tags"]]
        return encode_example(features), ""


@dataclasses.dataclass(kw_only=True)
class Report:
    """What a finished shard holds, kept until the whole set is finished."""

    records: int = 0
    bytes: int = 0
    digest: str = ""
    skipped: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(kw_only=True)
class About:
    """What the metadata say: class names, shape of the images (-1: any), origin.

    With `tags` every image has a list of words.
    """

    names: Sequence[str]
    shape: tuple[int, int, int]
    origin: str
    tags: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ImportError, OSError, ValueError) as error:
        print(f"Not prepared: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = arguments.add_subparsers(required=True)
    folder = commands.add_parser("folder", help="pack a folder of images")
    folder.add_argument("folder", help="as ImageFolder reads it")
    folder.add_argument("--out", required=True, help="folder of prepared sets")
    folder.add_argument("--name", required=True, help="of the set, like my_set")
    folder.add_argument("--version", default="1.0.0")
    folder.add_argument("--shard_mb", type=float, default=256, help="size of a file")
    folder.add_argument("--threads", type=int, default=8)
    folder.set_defaults(run=pack_folder)
    glyphs = commands.add_parser("glyphs", help="render fonts and pack their letters")
    glyphs.add_argument("--fonts", required=True, help="folder of .ttf and .otf files")
    glyphs.add_argument("--out", required=True, help="folder of prepared sets")
    glyphs.add_argument("--name", default="glyphs32_latin")
    glyphs.add_argument("--version", default="1.0.0")
    glyphs.add_argument("--shard_mb", type=float, default=256, help="size of a file")
    glyphs.add_argument("--threads", type=int, default=8)
    glyphs.set_defaults(run=pack_glyphs)
    tags = commands.add_parser("tags", help="count tags and write a vocabulary")
    what = tags.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", metavar="FILE", help="a table of paths and tags")
    what.add_argument("--tfds", metavar="NAME", help="a prepared TFDS set")
    tags.add_argument("--out", required=True, help="the vocabulary file, JSON")
    tags.add_argument("--image", default="image", help="of --table: column")
    tags.add_argument("--tags", default="tags", help="column, or list of texts")
    tags.add_argument("--separator", default="|", help="of --table")
    tags.add_argument("--root", help="of --table: where its paths begin")
    tags.add_argument("--split_column", help="of --table: counts train, without it all")
    tags.add_argument("--split", default="train", help="of --tfds")
    tags.add_argument("--data_dir", help="of --tfds; where the sets lie")
    tags.add_argument(
        "--synonyms", metavar="CSV", help="a table of the columns word,tag"
    )
    tags.add_argument(
        "--only_listed", action="store_true", help="drop words that --synonyms lacks"
    )
    tags.add_argument(
        "--min_count", type=int, default=1, help="images that a tag needs"
    )
    tags.set_defaults(run=count_tags)
    tfds = commands.add_parser("tfds", help="prepare a set that TFDS knows")
    tfds.add_argument("dataset", help="like oxford_iiit_pet or cifar10_1/v4")
    tfds.add_argument(
        "--data_dir", help="default: $TFDS_DATA_DIR, ~/tensorflow_datasets"
    )
    tfds.set_defaults(run=prepare_tfds)
    return arguments


def pack_folder(options: argparse.Namespace) -> int:
    """Packs a folder of images."""
    final = place_for(options)
    sources = folder_splits(options.folder)
    print("\n".join(describe(list(sources.values()))))
    names = next(iter(sources.values())).class_names
    refuse_names(names)
    stats = {split: file_stats(source) for split, source in sources.items()}
    times = [f"{s.st_size} {s.st_mtime_ns}" for rows in stats.values() for s in rows]
    sizes = {split: [s.st_size for s in rows] for split, rows in stats.items()}
    about = About(names=names, shape=(-1, -1, 3), origin="a folder of images")
    return pack(options, final, sources, sizes, times, about)


def pack_glyphs(options: argparse.Namespace) -> int:
    """Renders the fonts below a folder and packs their letters and digits."""
    import glyph_fonts  # beside this file, which runs as a script

    final = place_for(options)
    sources = glyph_fonts.open_splits(options.fonts)
    pixels = glyph_fonts.SIDE_PX**2
    sizes = {split: [pixels] * len(source) for split, source in sources.items()}
    shape = (glyph_fonts.SIDE_PX, glyph_fonts.SIDE_PX, 1)
    about = About(names=tuple(glyph_fonts.ALPHABET), shape=shape, origin="fonts")
    return pack(options, final, sources, sizes, [], about)


def count_tags(options: argparse.Namespace) -> int:
    """Counts the tags of training images and writes the vocabulary."""
    import tag_vocabulary  # beside this file, which runs as a script

    return tag_vocabulary.build(options)


def place_for(options: argparse.Namespace) -> Path:
    """Returns DATA_DIR/NAME/VERSION; raises if it cannot be a new set."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", options.name):
        raise ValueError(
            f"--name {options.name!r}: use small letters, digits and _, like my_set."
        )
    if not re.fullmatch(r"\d+\.\d+\.\d+", options.version):
        raise ValueError(f"--version {options.version!r}: use three numbers, 1.0.0.")
    final = Path(options.out).expanduser() / options.name / options.version
    if final.exists():
        raise FileExistsError(
            f"{final} is already prepared; choose another --name or --version, or "
            "remove it."
        )
    return final


def pack(
    options: argparse.Namespace,
    final: Path,
    sources: dict[str, Any],
    sizes: dict[str, list[int]],
    times: Sequence[str],
    about: About,
) -> int:
    """Writes a set from a source a split; goes on where a killed call has stopped.

    `sizes` are those of the images, in proportion; `times` tell changed images apart
    where the fingerprints of the sources do not.
    """
    names = about.names
    staging = final.with_name(f"{options.version}.incomplete")
    (staging / PROGRESS).mkdir(parents=True, exist_ok=True)
    with only_process(staging / PROGRESS / "lock"):
        start_or_go_on(staging, identity(options, sources, times))
        plan = [
            shard
            for split, source in sources.items()
            for shard in plan_shards(options, split, source, sizes[split], staging)
        ]
        reports = [finish_shard(shard, options.threads) for shard in plan]
        write_metadata(staging, options, about, plan, reports)
        sync(staging)
        # From here on the set is whole: a kill leaves at most the folder of progress.
        staging.rename(final)
        sync(final.parent)
        shutil.rmtree(final / PROGRESS)
    print_report(final, names, plan, reports)
    return 0


def refuse_names(names: Sequence[str]) -> None:
    """Raises ValueError for names that a file of one name a line cannot hold."""
    wrong = [name for name in names if name != name.strip() or "\n" in name]
    if wrong:
        raise ValueError(f"class folders begin or end with a space: {some(wrong)!r}.")


def file_stats(source: ImageFolder) -> list[os.stat_result]:
    root = Path(source.path).expanduser()
    return [os.stat(root / source.relative_path(i)) for i in range(len(source))]


def identity(
    options: argparse.Namespace,
    sources: dict[str, Any],
    times: Sequence[str],
) -> str:
    """Returns a hash of all that decides what the shards hold."""
    parts = [f"{options.name} {options.version} {options.shard_mb}"]
    for split, source in sources.items():
        parts += [split, source.fingerprint]
    return content_hash([*parts, *times])


def start_or_go_on(staging: Path, wanted: str) -> None:
    """Keeps what an earlier call has finished, unless the folder has changed since."""
    path = staging / PROGRESS / "identity"
    if path.exists() and path.read_text() == wanted:
        return
    left = [p for p in staging.iterdir() if p.name != PROGRESS]
    left += [p for p in (staging / PROGRESS).glob("*.json")]
    if left:
        print("images or options have changed since the last call: starting anew")
    for old in left:
        old.unlink()
    write(path, wanted)


def plan_shards(
    options: argparse.Namespace,
    split: str,
    source: Any,
    sizes: Sequence[int],
    staging: Path,
) -> list[Shard]:
    """Cuts a split into shards of about equal size, its images in hashed order.

    So that a slice like train[:10%] holds all classes.
    """
    order = sorted(
        range(len(source)), key=lambda i: stable_order(source.relative_path(i), 0)
    )
    ends = np.cumsum([sizes[index] for index in order])
    count = min(len(order), max(1, round(ends[-1] / (options.shard_mb * 1e6))))
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count)
    rows = [part.tolist() for part in np.split(np.asarray(order), cuts)]
    return [
        Shard(
            path=staging
            / shard_file(FILE_TEMPLATE, options.name, split, "array_record", i, count),
            split=split,
            source=source,
            rows=rows[i],
        )
        for i in range(count)
    ]


def finish_shard(shard: Shard, threads: int) -> Report:
    """Returns the report of a shard; writes it unless it is there and unchanged."""
    path = shard.path.parent / PROGRESS / f"{shard.path.name}.json"
    if path.exists():
        report = Report(**json.loads(path.read_text(encoding="utf-8")))
        if shard.path.exists() and digest(shard.path) == report.digest:
            print(f"{shard.path.name}: kept, {report.records} images")
            return report
        print(f"{shard.path.name}: damaged since it was written; written again")
    part = shard.path.with_name(f"{shard.path.name}.part")
    report = write_shard(shard, part, threads)
    sync(part)
    part.rename(shard.path)
    # After the rename, and itself by a rename: a report means a finished shard.
    write(path, json.dumps(dataclasses.asdict(report)))
    print(f"{shard.path.name}: {report.records} images, {len(report.skipped)} skipped")
    return report


def write_shard(shard: Shard, path: Path, threads: int) -> Report:
    """Writes the readable images of a shard; raises OSError when the disk is full."""
    from array_record.python import array_record_module

    # Images are compressed already.
    options = "group_size:1,uncompressed"
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    report = Report()
    try:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for first in range(0, len(shard.rows), BATCH):
                rows = shard.rows[first : first + BATCH]
                for record, reason in pool.map(shard.record, rows):
                    if reason:
                        report.skipped.append(reason)
                    else:
                        writer.write(record)
                        report.records += 1
                        report.bytes += len(record)
        writer.close()
        ArrayRecordFile(path, report.records).open()
    except (RuntimeError, ValueError) as error:
        raise OSError(f"cannot write {path}: {error}; is the disk full?") from error
    report.digest = digest(path)
    return report


def write_metadata(
    staging: Path,
    options: argparse.Namespace,
    about: About,
    plan: Sequence[Shard],
    reports: Sequence[Report],
) -> None:
    """Writes the JSON files of a TFDS set; raises ValueError for an empty split."""
    splits = []
    for split in dict.fromkeys(shard.split for shard in plan):
        held = [r for s, r in zip(plan, reports, strict=True) if s.split == split]
        if not sum(report.records for report in held):
            bad = [row for report in held for row in report.skipped]
            raise ValueError(f"no image of split {split} can be read: {some(bad, 3)}")
        splits.append(
            {
                "name": split,
                "filepathTemplate": FILE_TEMPLATE,
                "numBytes": str(sum(report.bytes for report in held)),
                "shardLengths": [str(report.records) for report in held],
            }
        )
    info = {
        "name": options.name,
        "version": options.version,
        "description": f"Made from {about.origin} by tools/prepare_dataset.py.",
        "releaseNotes": {options.version: f"made from {about.origin}"},
        "fileFormat": "array_record",
        "splits": splits,
        "supervisedKeys": {
            "tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}
        },
    }
    dimensions = [str(length) for length in about.shape]
    image = {"dtype": "uint8", "shape": {"dimensions": dimensions}}
    features = {
        "file_name": feature("text_feature.Text", text={}),
        "image": feature("image_feature.Image", image=image),
        "label": feature(
            "class_label_feature.ClassLabel",
            classLabel={"numClasses": str(len(about.names))},
        ),
    }
    if about.tags:
        word = feature("text_feature.Text", text={})
        features["tags"] = feature(
            "sequence_feature.Sequence", sequence={"feature": word}
        )
    whole = feature("features_dict.FeaturesDict", featuresDict={"features": features})
    skipped = [row for report in reports for row in report.skipped]
    write(staging / "label.labels.txt", "".join(f"{name}\n" for name in about.names))
    write(staging / "features.json", json.dumps(whole, indent=2))
    write(staging / "dataset_info.json", json.dumps(info, indent=2))
    write(staging / "skipped.txt", "".join(f"{row}\n" for row in skipped))


def feature(name: str, **content: Any) -> dict[str, Any]:
    return {"pythonClassName": f"{FEATURES}.{name}", **content}


def print_report(
    final: Path,
    names: Sequence[str],
    plan: Sequence[Shard],
    reports: Sequence[Report],
) -> None:
    counts: dict[str, int] = {}
    for shard, report in zip(plan, reports, strict=True):
        counts[shard.split] = counts.get(shard.split, 0) + report.records
    skipped = [row for report in reports for row in report.skipped]
    print(f"Prepared {final}")
    print("  " + ", ".join(f"{split} {count}" for split, count in counts.items()))
    print(f"  {len(names)} classes: {some(names)}; all in label.labels.txt")
    if skipped:
        print(f"  {len(skipped)} unreadable images left out, all in skipped.txt:")
        for row in skipped[:10]:
            print(f"    {row}")
    name, data_dir = final.parent.name, str(final.parent.parent)
    print(f"Use it: Tfds(dataset={name!r}, split='train', data_dir={data_dir!r})")


def prepare_tfds(options: argparse.Namespace) -> int:
    """Downloads and prepares a TFDS set as ArrayRecord; TFDS itself keeps it whole."""
    root = tfds_folder.data_root(options.data_dir)
    missing = [
        str(path)
        for path, there in tfds_folder.brought_files(options.dataset, root)
        if not there
    ]
    if missing:
        raise FileNotFoundError(
            f"{options.dataset} cannot be downloaded by a program; put these files "
            f"where TFDS looks for them: {some(missing)}."
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise ModuleNotFoundError(
            "preparing a TFDS set needs TensorFlow (reading it does not); install it: "
            'pip install -e ".[prepare]"'
        )
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(
            options.dataset, data_dir=root, file_format="array_record"
        )
        builder.download_and_prepare()
    except tfds.core.registered.DatasetNotFoundError as error:
        raise ValueError(f"TFDS knows no set {options.dataset!r}: {error}") from error
    # AssertionError: TFDS's way to say that files must be brought by hand.
    except (AssertionError, tfds.download.DownloadError, OSError) as error:
        raise OSError(f"TFDS could not prepare {options.dataset}: {error}") from error
    splits = {name: split.num_examples for name, split in builder.info.splits.items()}
    print(f"Prepared {builder.data_path}: {splits}")
    return 0


@contextlib.contextmanager
def only_process(path: Path) -> Iterator[None]:
    """Holds a lock that ends with the process, however that ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                f"another process is preparing {path.parent.parent}; wait for it."
            ) from error
        yield


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def write(path: Path, text: str) -> None:
    """Writes a file that is either whole or not there, also after a power cut."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    sync(part)
    part.rename(path)


def sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


if __name__ == "__main__":
    sys.exit(main())
