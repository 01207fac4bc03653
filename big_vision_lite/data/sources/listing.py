"""Lists a folder of images: splits, classes, files, and what is in the way."""

import collections
import dataclasses
import decimal
import functools
import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from big_vision_lite.messages import did_you_mean, some

# Without split folders, this part of each class is held out, chosen by seed and a hash
# of the path: the same files on every machine, in whatever order they are listed.
HELD_OUT_PART = 0.1

# Relative paths of the images of each class, both sorted.
Files = dict[str, list[str]]


def hold_out(files: Files, seed: int) -> tuple[Files, Files]:
    """Splits every class into training and held-out images, disjoint, by a hash.

    A class of one image keeps it for training; of more, gives at least one.
    """
    train, held = {}, {}
    for name, paths in files.items():
        count = 0 if len(paths) < 2 else max(1, round(HELD_OUT_PART * len(paths)))
        chosen = set(sorted(paths, key=lambda path: stable_order(path, seed))[:count])
        train[name] = [path for path in paths if path not in chosen]
        held[name] = [path for path in paths if path in chosen]
    return train, {name: paths for name, paths in held.items() if paths}


def stable_order(path: str, seed: int) -> bytes:
    """A key that sorts paths at random, the same way everywhere for one seed."""
    plain = unicodedata.normalize("NFC", path).replace(os.sep, "/")
    data = plain.encode("utf-8", "surrogateescape")
    key = b"big_vision_lite held-out split %d" % seed
    return hashlib.blake2b(data, digest_size=16, key=key).digest()


logger = logging.getLogger(__name__)
# Its own level: the command line silences the libraries through the root logger.
logger.setLevel(logging.WARNING)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Folder names that mean a split, and the split they mean.
SPLIT_FOLDERS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


class Skipped(collections.Counter[str]):
    """The other files of an image folder: counts by kind."""

    def __str__(self) -> str:
        kinds = [f"{count} {kind}" for kind, count in sorted(self.items())]
        return ", ".join(kinds) or "nothing"


@dataclasses.dataclass(kw_only=True)
class Listing:
    """One split of an image folder, ready to read: `paths` are relative to `root`."""

    root: str
    class_names: tuple[str, ...]
    paths: list[str]
    labels: np.ndarray | None
    skipped: Skipped


def open_split(
    root: Path, split: str, classes: Sequence[str], seed: int, labelled: bool = True
) -> Listing:
    """Lists `split`; labels follow `classes`, else the training classes `in_order`.

    Without labels, every image of the split at any depth. Raises FileNotFoundError when
    there is nothing, ValueError for one class, for classes that training does not have
    and for a seed that has nothing to choose; warns of classes that have no image.
    """
    split = SPLIT_FOLDERS.get(split.lower(), split.lower())
    skipped = Skipped()
    splits = find_splits(root, labelled)
    if splits:
        parts = _from_split_folders(root, splits, split, seed, labelled, skipped)
        trained = class_folders(splits["train"]) if "train" in splits else []
    else:
        files = list_images(root, skipped, labelled)
        parts = [_part_of(files, root, split, seed, labelled, skipped)]
        trained = in_order(files)
    paths = [path for files in parts for name in sorted(files) for path in files[name]]
    if not labelled:
        names, labels = (), None
    else:
        names = tuple(unicodedata.normalize("NFC", name) for name in classes)
        names = names or tuple(trained)
        _check_classes(root, split, {name for files in parts for name in files}, names)
        counts = [(n, len(files[n])) for files in parts for n in sorted(files)]
        label = {name: index for index, name in enumerate(names)}
        numbers = np.array([label[name] for name, _ in counts], np.int32)
        labels = np.repeat(numbers, [count for _, count in counts])
    return Listing(
        root=str(root),
        class_names=names,
        paths=paths,
        labels=labels,
        skipped=skipped,
    )


def _from_split_folders(
    root: Path,
    splits: dict[str, Path],
    split: str,
    seed: int,
    labelled: bool,
    skipped: Skipped,
) -> list[Files]:
    if seed:
        raise ValueError(
            f"split_seed={seed} chooses nothing: {root} has split folders "
            f"({some(splits)}). Leave it out."
        )
    wanted = [path for name, path in splits.items() if split in (name, "all")]
    if not wanted:
        raise FileNotFoundError(
            f"{root} has no images of split {split!r}; it has {some(splits)}."
        )
    with os.scandir(root) as entries:
        loose = sum(map(_is_image, entries))
    skipped.update({"images outside a split folder": loose} if loose else {})
    return [list_images(path, skipped, labelled, root) for path in wanted]


def _part_of(
    files: Files, root: Path, split: str, seed: int, labelled: bool, skipped: Skipped
) -> Files:
    """Returns the split of a folder that has none of its own; a hash chooses."""
    train, held = hold_out(files, seed)
    chosen = {"train": train, "val": held, "all": files}
    if split not in chosen:
        each = " of each class" * labelled
        raise FileNotFoundError(
            f"{root} has no split folders: its splits are train and val (a "
            f"tenth{each}) and all. For a test split make folders {root}/train and "
            f"{root}/test."
        )
    if not files or not (labelled or chosen[split]):
        where, remedy = "", ""
        if labelled:
            where = " in class folders"
            remedy = f" Give each class a folder: {root}/CLASS/image.jpg."
        raise FileNotFoundError(
            f"{root} holds no images ({', '.join(SUFFIXES)}){where} for {split}; found "
            f"there: {skipped}.{remedy}"
        )
    return chosen[split]


def _check_classes(
    root: Path, split: str, held: Collection[str], names: Sequence[str]
) -> None:
    """Raises ValueError for classes that cannot be; warns of those without images."""
    if not names:
        raise ValueError(
            f"{root} has no folder train to take the classes from; name them in their "
            "order: classes=(...)."
        )
    if len(names) == 1:
        raise ValueError(
            f"{root} has one class ({names[0]}); two or more are needed, each a folder "
            f"of images: {root}/CLASS/image.jpg."
        )
    unknown = sorted(set(held) - set(names))
    if unknown:
        raise ValueError(
            f"{split} of {root} has {len(unknown)} classes unknown to training: "
            f"{some(unknown)}; rename or remove these folders, or train with them."
            f"{did_you_mean(unknown[0], names)}"
        )
    missing = [name for name in names if name not in held]
    if missing:
        logger.warning(
            "%s of %s has %d of the %d train classes (missing: %s); indices follow "
            "train.",
            *(split, root, len(names) - len(missing), len(names), some(missing)),
        )


def find_splits(root: Path, labelled: bool = True) -> dict[str, Path]:
    """Returns the folder of each split of `root`; empty when its folders are classes.

    Split folders hold folders of classes, unless the images are not `labelled`. Raises
    FileNotFoundError for a wrong path, ValueError when both could be meant.
    """
    check_folder(root)
    folders = [folder for folder in _folders(root) if _has_image(folder)]
    named = [folder for folder in folders if _is_split(folder)]
    others = [folder.name for folder in folders if not _is_split(folder)]
    nested = any(_folders(folder.path) for folder in named)
    # A class may be called "train", too: then it holds images itself, not classes.
    if not named or (others and not nested):
        return {}
    names = some(folder.name for folder in named)
    if others:
        raise ValueError(
            f"{root} mixes split folders ({names}) with other folders of images "
            f"({some(others)}): move the others away, or into the split folders."
        )
    if labelled and not nested:
        raise ValueError(
            f"the images of {root} lie directly in {names}; give each class a folder "
            f"of its own: {named[0].path}/CLASS/image.jpg."
        )
    splits = {SPLIT_FOLDERS[f.name.lower()]: Path(f.path) for f in named}
    if len(splits) < len(named):
        raise ValueError(f"{root} has two folders for one split ({names}); keep one.")
    return {name: splits[name] for name in ("train", "val", "test") if name in splits}


def check_folder(root: Path) -> None:
    """Raises FileNotFoundError or NotADirectoryError that say what is there instead."""
    if root.is_dir():
        return
    if root.exists():
        raise NotADirectoryError(
            f"{root} is a file, not a folder of images; unpack it, and name the folder."
        )
    parent = next(p for p in root.absolute().parents if p.is_dir())
    wrong = root.absolute().relative_to(parent).parts[0]
    there = sorted(folder.name for folder in _folders(parent))
    raise FileNotFoundError(
        f"there is no folder {root}: {parent} has no {wrong!r}; folders there: "
        f"{some(there)}.{did_you_mean(wrong, there)}"
    )


def class_folders(root: Path) -> list[str]:
    """Names the class folders of `root` that hold at least one image, in order."""
    return in_order({class_name(f.name) for f in _folders(root) if _has_image(f)})


def in_order(names: Collection[str]) -> list[str]:
    """Sorts the names of classes as text, or as numbers where all of them are."""
    if all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in names):
        return sorted(names, key=lambda name: (decimal.Decimal(name), name))
    return sorted(names)


def list_images(
    folder: Path, skipped: Skipped, labelled: bool = True, root: Path | None = None
) -> Files:
    """Returns the images of each class folder, as paths relative to `root` or `folder`.

    Those that are not `labelled` are all of the class "".
    """
    start = len(os.path.join(folder, ""))
    prefix = len(os.path.join(root or folder, ""))
    files: Files = collections.defaultdict(list)
    for path in walk(folder, skipped):
        end = path.find(os.sep, start)
        if labelled and end < 0:
            skipped["images outside a class folder"] += 1
        else:
            name = class_name(path[start:end]) if labelled else ""
            files[name].append(path[prefix:])
    return {name: sorted(files[name]) for name in sorted(files)}


@functools.lru_cache
def class_name(folder: str) -> str:
    """Returns the folder's name; one spelling of accents, as file systems differ."""
    try:
        folder.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the class folder {os.fsencode(folder)!r} has a name that is not "
            "UTF-8; rename it."
        ) from error
    return unicodedata.normalize("NFC", folder)


def walk(
    folder: str | os.PathLike[str],
    skipped: Skipped,
    above: tuple[tuple[int, int], ...] = (),
) -> Iterator[str]:
    """Yields the images below `folder`; links are followed, loops of them are not."""
    info = os.stat(folder)
    if (info.st_dev, info.st_ino) in above:
        skipped["links to a folder above"] += 1
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _hidden(entry):
                skipped["hidden"] += 1
            elif entry.is_dir():
                yield from walk(entry, skipped, (*above, (info.st_dev, info.st_ino)))
            elif _is_image(entry):
                yield entry.path
            else:
                skipped[_kind(entry)] += 1


def _folders(root: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(root) as entries:
        folders = [entry for entry in entries if entry.is_dir() and not _hidden(entry)]
    return sorted(folders, key=lambda entry: entry.name)


def _has_image(folder: os.DirEntry[str]) -> bool:
    return next(walk(folder, Skipped()), None) is not None


def _is_split(folder: os.DirEntry[str]) -> bool:
    return folder.name.lower() in SPLIT_FOLDERS


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(SUFFIXES) and entry.is_file()


def _hidden(entry: os.DirEntry[str]) -> bool:
    # What macOS and some archives leave beside the files.
    return entry.name.startswith(".") or entry.name == "__MACOSX"


def _kind(entry: os.DirEntry[str]) -> str:
    if not entry.is_file():
        return "broken links"
    return os.path.splitext(entry.name)[1].lower() or "files without a suffix"
