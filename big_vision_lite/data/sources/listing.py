"""Lists a folder of images: splits, classes, files, and what is in the way."""

import collections
import dataclasses
import hashlib
import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
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


@dataclasses.dataclass
class Skipped:
    """What a folder holds beside its images: counts by kind."""

    counts: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )

    def __str__(self) -> str:
        kinds = [f"{count} {kind}" for kind, count in sorted(self.counts.items())]
        return ", ".join(kinds) or "nothing"


@dataclasses.dataclass(kw_only=True)
class Listing:
    """One split of an image folder, ready to read: `paths` are relative to `root`."""

    root: str
    class_names: tuple[str, ...]
    paths: list[str]
    labels: np.ndarray | None
    skipped: Skipped


def open_split(root: Path, split: str, classes: Sequence[str], seed: int) -> Listing:
    """Lists `split`; labels follow `classes`, else the sorted training classes.

    Raises FileNotFoundError when there is nothing, ValueError for one class, for
    classes that training does not have and for a seed that has nothing to choose; warns
    of classes that have no image.
    """
    split = SPLIT_FOLDERS.get(split.lower(), split.lower())
    skipped = Skipped()
    splits = find_splits(root)
    _check_seed(root, splits, seed)
    if splits:
        parts, trained = _from_split_folders(root, splits, split, skipped)
    else:
        parts, trained = _from_class_folders(root, split, seed, skipped)
    names = tuple(unicodedata.normalize("NFC", c) for c in classes) or tuple(trained)
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
    held = {name for files in parts for name in files}
    check_classes(split, sorted(held), names, str(root))
    label = {name: index for index, name in enumerate(names)}
    rows = [
        (path, label[name])
        for files in parts
        for name in sorted(files)
        for path in files[name]
    ]
    return Listing(
        root=str(root),
        class_names=names,
        paths=[path for path, _ in rows],
        labels=np.asarray([number for _, number in rows], np.int32),
        skipped=skipped,
    )


def open_unlabelled(root: Path, split: str, seed: int) -> Listing:
    """Lists every image of `split` at any depth; folders mean splits or nothing.

    Raises FileNotFoundError when there is nothing, ValueError for a seed that has
    nothing to choose.
    """
    split = SPLIT_FOLDERS.get(split.lower(), split.lower())
    skipped = Skipped()
    splits = find_splits(root, labelled=False)
    _check_seed(root, splits, seed)
    if splits:
        loose = sum(_is_image(entry) for entry in _scan(root))
        skipped.counts.update({"images outside a split folder": loose} if loose else {})
        folders = _wanted(root, splits, split)
        paths = [path for f in folders.values() for path in _below(f, root, skipped)]
    elif split == "test":
        raise FileNotFoundError(
            f"{root} has no split folders: its splits are train, val (a tenth) and "
            f"all. For a test split make folders {root}/train and {root}/test."
        )
    else:
        everything = {"": _below(root, root, skipped)}
        train, held = hold_out(everything, seed)
        chosen = {"train": train, "val": held, "all": everything}[split]
        paths = chosen.get("", [])
    if not paths:
        raise FileNotFoundError(
            f"{root} holds no images ({', '.join(SUFFIXES)}) for {split}; found there: "
            f"{skipped}."
        )
    return Listing(
        root=str(root), class_names=(), paths=paths, labels=None, skipped=skipped
    )


def _below(folder: Path, root: Path, skipped: Skipped) -> list[str]:
    """Returns all images below `folder`, as sorted paths relative to `root`."""
    prefix = len(os.path.join(root, ""))
    return sorted(path[prefix:] for path in _walk(folder, skipped))


def _check_seed(root: Path, splits: dict[str, Path], seed: int) -> None:
    if splits and seed:
        raise ValueError(
            f"split_seed={seed} chooses nothing: {root} has split folders "
            f"({some(splits)}). Leave it out."
        )


def check_classes(
    split: str, held: Sequence[str], names: Sequence[str], where: str
) -> None:
    """Raises ValueError if `held` has a class that is not in `names`; warns of gaps."""
    unknown = [name for name in held if name not in set(names)]
    if unknown:
        raise ValueError(
            f"{split} of {where} has {len(unknown)} classes unknown to training: "
            f"{some(unknown)}; rename or remove these folders, or train with them."
            f"{did_you_mean(unknown[0], names)}"
        )
    missing = [name for name in names if name not in set(held)]
    if missing:
        logger.warning(
            "%s of %s has %d of the %d train classes (missing: %s); indices follow "
            "train.",
            *(split, where, len(names) - len(missing), len(names), some(missing)),
        )


def _from_split_folders(
    root: Path, splits: dict[str, Path], split: str, skipped: Skipped
) -> tuple[list[Files], list[str]]:
    parts = []
    for folder in _wanted(root, splits, split).values():
        files = list_images(folder, skipped)
        for name, paths in files.items():
            files[name] = [os.path.join(folder.name, path) for path in paths]
        parts.append(files)
    trained = class_folders(splits["train"]) if "train" in splits else []
    return parts, trained


def _wanted(root: Path, splits: dict[str, Path], split: str) -> dict[str, Path]:
    wanted = {name: path for name, path in splits.items() if split in (name, "all")}
    if not wanted:
        raise FileNotFoundError(
            f"{root} has no images of split {split!r}; it has {some(splits)}."
        )
    return wanted


def _from_class_folders(
    root: Path, split: str, seed: int, skipped: Skipped
) -> tuple[list[Files], list[str]]:
    files = list_images(root, skipped)
    if not files:
        raise FileNotFoundError(
            f"{root} holds no images ({', '.join(SUFFIXES)}) in class folders; found "
            f"there: {skipped}. Give each class a folder: {root}/CLASS/image.jpg."
        )
    if split == "test":
        raise FileNotFoundError(
            f"{root} has class folders, no split folders: its splits are train and val "
            "(a tenth of each class) and all. For a test split make folders "
            f"{root}/train and {root}/test."
        )
    train, held = hold_out(files, seed)
    return [{"train": train, "val": held, "all": files}[split]], list(files)


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
    """Names the class folders of `root` that hold at least one image, sorted."""
    return sorted({class_name(f) for f in _folders(root) if _has_image(f)})


def list_images(root: Path, skipped: Skipped) -> Files:
    """Returns the images of each class folder of `root`, as paths relative to it."""
    files: Files = {}
    prefix = len(os.path.join(root, ""))
    for entry in _scan(root):
        if _hidden(entry):
            skipped.counts["hidden"] += 1
        elif not entry.is_dir():
            where = (
                "images outside a class folder" if _is_image(entry) else _kind(entry)
            )
            skipped.counts[where] += 1
        else:
            images = [path[prefix:] for path in _walk(entry, skipped)]
            if images:
                files.setdefault(class_name(entry), []).extend(images)
    return {name: sorted(files[name]) for name in sorted(files)}


def class_name(folder: os.DirEntry[str]) -> str:
    """Returns the folder's name; one spelling of accents, as file systems differ."""
    try:
        folder.name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the class folder {os.fsencode(folder.path)!r} has a name that is not "
            "UTF-8; rename it."
        ) from error
    return unicodedata.normalize("NFC", folder.name)


def _scan(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _folders(root: str | Path) -> list[os.DirEntry[str]]:
    return [e for e in _scan(root) if e.is_dir() and not _hidden(e)]


def _walk(
    folder: os.PathLike[str], skipped: Skipped, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[str]:
    """Yields the images below `folder`; links are followed, loops of them are not."""
    info = os.stat(folder)
    if (info.st_dev, info.st_ino) in above:
        skipped.counts["links to a folder above"] += 1
        return
    for entry in _scan(folder):
        if _hidden(entry):
            skipped.counts["hidden"] += 1
        elif entry.is_dir():
            yield from _walk(entry, skipped, (*above, (info.st_dev, info.st_ino)))
        elif _is_image(entry) and entry.is_file():
            yield entry.path
        else:
            skipped.counts[_kind(entry)] += 1


def _has_image(folder: os.DirEntry[str]) -> bool:
    with os.scandir(folder.path) as entries:
        if any(_is_image(e) and e.is_file() and not _hidden(e) for e in entries):
            return True
    return next(_walk(folder, Skipped()), None) is not None


def _is_split(folder: os.DirEntry[str]) -> bool:
    return folder.name.lower() in SPLIT_FOLDERS


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(SUFFIXES)


def _hidden(entry: os.DirEntry[str]) -> bool:
    # What macOS and some archives leave beside the files.
    return entry.name.startswith(".") or entry.name == "__MACOSX"


def _kind(entry: os.DirEntry[str]) -> str:
    if not entry.is_file():
        return "broken links"
    return os.path.splitext(entry.name)[1].lower() or "files without a suffix"
