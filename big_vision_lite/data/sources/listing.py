"""Lists one split of a folder of images: its files, classes and labels."""

import dataclasses
import hashlib
import logging
import os
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from big_vision_lite.data.sources import contents
from big_vision_lite.data.sources.contents import Files, LeftOut, list_images
from big_vision_lite.data.sources.file_kinds import SUFFIXES
from big_vision_lite.data.sources.splits import SPLIT_FOLDERS, beside, find_splits
from big_vision_lite.messages import did_you_mean, some

# Without split folders, this part of each class is held out. The seed and a hash of the
# path choose it: the same files on every machine, in whatever order they are listed.
HELD_OUT_PART = 0.1


def hold_out(files: Files, seed: int) -> tuple[Files, Files]:
    """Returns the training and the held-out images of every class, split by a hash.

    A class of one image keeps it for training; a larger class gives at least one.
    """
    train, held = {}, {}
    for name, paths in files.items():
        count = 0 if len(paths) < 2 else max(1, round(HELD_OUT_PART * len(paths)))
        chosen = set(sorted(paths, key=lambda path: stable_order(path, seed))[:count])
        train[name] = [path for path in paths if path not in chosen]
        held[name] = [path for path in paths if path in chosen]
    return train, {name: paths for name, paths in held.items() if paths}


def stable_order(path: str, seed: int) -> bytes:
    """Returns a key that sorts paths pseudo-randomly, alike everywhere for one seed."""
    plain = unicodedata.normalize("NFC", path).replace(os.sep, "/")
    data = plain.encode("utf-8", "surrogateescape")
    key = b"big_vision_lite held-out split %d" % seed
    return hashlib.blake2b(data, digest_size=16, key=key).digest()


logger = logging.getLogger(__name__)
# A level of its own, because the command line silences libraries by the root logger.
logger.setLevel(logging.WARNING)


@dataclasses.dataclass(kw_only=True)
class Listing:
    """One split of an image folder; `paths` are relative to `root`, `labels` int32."""

    root: str
    class_names: tuple[str, ...]
    paths: list[str]
    labels: np.ndarray | None
    # What lies beside the images, by the folder that was listed.
    left_out: dict[Path, LeftOut]


def open_split(
    root: Path, split: str, classes: Sequence[str], seed: int, labelled: bool = True
) -> Listing:
    """Lists `split`; labels follow `classes`, else the training classes in order.

    Without labels, every image of the split at any depth. Raises FileNotFoundError when
    there is nothing, PermissionError for a folder that cannot be opened, ValueError for
    one class, for classes that training does not have and for a seed that has nothing
    to choose; warns of classes that have no image.
    """
    split = SPLIT_FOLDERS.get(split.lower(), split.lower())
    left_out: dict[Path, LeftOut] = {}
    splits = find_splits(root, labelled, classes)
    if splits:
        parts = _from_split_folders(root, splits, split, seed, labelled, left_out)
        trained = contents.class_folders(splits["train"]) if "train" in splits else []
    else:
        left_out[root] = LeftOut()
        files = list_images(root, left_out[root], labelled)
        contents.check_opened(left_out[root])
        _note_empty(root, files, left_out[root], labelled)
        parts = [_part_of(files, root, split, seed, labelled, left_out[root])]
        trained = contents.in_order(files)
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
        left_out=left_out,
    )


def _from_split_folders(
    root: Path,
    splits: dict[str, Path],
    split: str,
    seed: int,
    labelled: bool,
    left_out: dict[Path, LeftOut],
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
    left_out[root] = _beside(root, splits)
    found = []
    for path in wanted:
        left_out[path] = LeftOut()
        files = list_images(path, left_out[path], labelled, root)
        contents.check_opened(left_out[path])
        _note_empty(path, files, left_out[path], labelled)
        if not files:
            raise FileNotFoundError(_no_class(root, path, split, left_out[path]))
        found.append(files)
    return found


def _note_empty(place: Path, files: Files, left_out: LeftOut, labelled: bool) -> None:
    """Adds the folders of `place` that look like classes and hold no image."""
    for folder in contents.folders(place) if labelled else ():
        if unicodedata.normalize("NFC", folder.name) not in files:
            left_out.add(contents.EMPTY, folder.path)


def _beside(root: Path, splits: dict[str, Path]) -> LeftOut:
    """Returns what lies in `root` itself, beside its split folders."""
    found = LeftOut()
    for folder in beside(root, splits.values()):
        holds = contents.has_image(folder)
        found.add(contents.OTHER_FOLDER if holds else contents.EMPTY, folder.path)
    with os.scandir(root) as entries:
        for entry in entries:
            if contents.is_image(entry):
                found.add(contents.NO_SPLIT, entry.path)
            elif not contents.is_folder(entry) or contents.is_aside(entry.name):
                found.add(contents.kind_of(entry), entry.path)
    return found


def _no_class(root: Path, folder: Path, split: str, left_out: LeftOut) -> str:
    """Returns where the images of a split without class folders lie."""
    loose, example = left_out.others.get(contents.NO_CLASS, (0, ""))
    if not loose:
        return (
            f"{split} of {root} holds no images ({', '.join(SUFFIXES)}); found in "
            f"{folder}: {left_out}."
        )
    return (
        f"{split} of {root} has no class folder: its {loose:,} images lie in {folder} "
        f"itself, such as {contents.shown(example)}, so that nothing says their "
        "classes (ImageNet's validation set comes like that). "
        f"Give each class a folder: {folder}/CLASS/image.jpg; or move {folder} away "
        "to do without it."
    )


def _part_of(
    files: Files, root: Path, split: str, seed: int, labelled: bool, left_out: LeftOut
) -> Files:
    """Returns a split of a folder without split folders; a hash chooses its images."""
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
            f"there: {left_out}.{remedy}"
        )
    return chosen[split]


def _check_classes(
    root: Path, split: str, held: Collection[str], names: Sequence[str]
) -> None:
    """Raises ValueError for fewer than two or unknown classes; warns of empty ones."""
    if not names:
        raise ValueError(
            f"{root} has no folder train to take the classes from; name them in their "
            "order: classes=(...)."
        )
    if len(names) == 1:
        inside = root / names[0]
        deeper = ""
        if inside.is_dir() and (found := contents.class_folders(inside)):
            deeper = f" Or name the folder of the classes {some(found)}: {inside}"
        raise ValueError(
            f"{root} has one class ({names[0]}); two or more are needed, each a folder "
            f"of images: {root}/CLASS/image.jpg.{deeper}"
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
