"""Finds the split folders of a set by their names; asks where names may be classes."""

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NoReturn

from big_vision_lite.data.sources import contents
from big_vision_lite.messages import some

Folder = os.DirEntry[str]
# Folder names that mean a split whatever lies beside them, and the split they mean.
SPLIT_FOLDERS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
ORDER = ("train", "val", "test")
# Words that mean one as a part of a name: Training, test_set, seg_train, TestImages.
_WORDS = {
    **SPLIT_FOLDERS,
    **dict.fromkeys(("training", "trn", "trainval"), "train"),
    **dict.fromkeys(("dev", "devel", "development", "eval", "evaluation"), "val"),
    **dict.fromkeys(("holdout", "heldout"), "val"),
    **dict.fromkeys(("testing", "tst"), "test"),
}
# Images without labels, as competitions give them.
_PREDICTION = {
    "pred",
    "predict",
    "prediction",
    "predictions",
    "unlabeled",
    "unlabelled",
}
# Words that say nothing more.
_FILLING = {
    *("set", "sets", "data", "dataset", "images", "image", "imgs", "img", "pics"),
    *("photos", "pictures", "split", "folder", "dir", "samples", "examples", "files"),
    *("jpg", "jpeg", "png", "final", "new", "full"),
}
_JOINED = re.compile(
    f"({'|'.join(sorted(_WORDS, key=len, reverse=True))})(?:{'|'.join(_FILLING)})"
)
_PART = re.compile(r"(?:k?fold|part|split|cv|subset|chunk|batch)[\W_]*\d+")


def find_splits(
    root: Path, labelled: bool = True, classes: Collection[str] = ()
) -> dict[str, Path]:
    """Returns the folder of each split of `root`; empty when its folders are classes.

    Split folders hold folders of classes, unless the images are not `labelled`.
    Folders that `classes` names are classes. Raises OSError for a wrong path,
    ValueError with both readings when both could be meant.
    """
    contents.check_folder(root)
    found = [folder for folder in contents.folders(root) if contents.has_image(folder)]
    named = _split_like(found)
    if classes and all(folder.name in classes for folder in named):
        if named or {folder.name for folder in found} <= set(classes):
            return {}
    if not named:
        if labelled:
            _check_parts(root, found)
        return {}
    apart = [folder for folder in found if folder not in named and _aside(folder)]
    others = [f.name for f in found if f not in named and f not in apart]
    nested = any(contents.folders(folder) for folder in named)
    # A class may be called "train", a vehicle: then it holds images itself.
    if others and not nested and [f.name.lower() for f in named] == ["train"]:
        return {}
    names = [folder.name for folder in named]
    if others:
        _ask(
            root,
            found,
            f"{root} mixes split folders ({some(names)}) with other folders of images "
            f"({some(others)})",
            f"move the others away, or into the split folders, such as mv "
            f"{root}/{others[0]} {root}/{names[0]}/",
        )
    if labelled and not nested:
        _ask(
            root,
            found,
            f"the images of {root} lie directly in {some(names)}",
            f"give each class a folder of its own: {root}/{names[0]}/CLASS/image.jpg",
        )
    splits = {_meaning(folder.name)[0]: folder for folder in named}
    if len(splits) < len(named):
        _ask(
            root,
            found,
            f"{root} has two folders for one split ({some(names)})",
            "keep one of them, and move the others away or into it",
        )
    return {n: Path(_innermost(splits[n]).path) for n in ORDER if n in splits}


def beside(root: Path, splits: Collection[Path]) -> list[Folder]:
    """Returns the folders of `root` that hold none of the `splits`."""
    taken = {path.relative_to(root).parts[0] for path in splits}
    return [folder for folder in contents.folders(root) if folder.name not in taken]


def _meaning(name: str) -> tuple[str, tuple[str, ...]]:
    """Returns the split that a folder's name means, or "", and its other words."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    splits, rest = set(), []
    for word in re.findall(r"[^\W\d_]+", apart.lower()):
        joined = _JOINED.fullmatch(word)
        split = _WORDS.get(joined[1] if joined else word)
        if split:
            splits.add(split)
        elif word not in _FILLING:
            rest.append(word)
    if splits == {"train", "val"}:  # train_val: what VOC and the pets train on
        splits = {"train"}
    return (splits.pop() if len(splits) == 1 else ""), tuple(rest)


def _aside(folder: Folder) -> bool:
    return bool(_PREDICTION & set(re.findall(r"[^\W\d_]+", folder.name.lower())))


def _split_like(found: Sequence[Folder]) -> list[Folder]:
    """Returns the folders whose names mean a split.

    Other words in a name count against it ("bullet train", "test_tube"), unless several
    splits share them: seg_train and seg_test.
    """
    shared: dict[tuple[str, ...], set[str]] = {}
    meanings = {folder.name: _meaning(folder.name) for folder in found}
    for split, rest in meanings.values():
        if split:
            shared.setdefault(rest, set()).add(split)
    return [
        folder
        for folder in found
        for split, rest in [meanings[folder.name]]
        if split and (not rest or len(shared[rest]) > 1)
    ]


def _check_parts(root: Path, found: Sequence[Folder]) -> None:
    """Raises ValueError for folds, splits inside classes, and a folder too far up."""
    if len(found) > 1 and all(_PART.fullmatch(f.name.lower()) for f in found):
        if all(contents.folders(folder) for folder in found):
            _ask(
                root,
                found,
                f"the folders of {root} are named like parts of one set "
                f"({some(f.name for f in found)})",
                f"name those to train on and the one to test: mv {root}/"
                f"{found[-1].name} {root}/test, and the classes of the others into "
                f"{root}/train",
            )
    inner = found and all(_only_splits(folder) for folder in found)
    if inner and len(found) > 1:
        names = [folder.name for folder in _split_like(contents.folders(found[0]))]
        _ask(
            root,
            found,
            f"the folders of {root} ({some(f.name for f in found)}) hold folders named "
            f"like splits ({some(names)})",
            f"put the splits above the classes: {root}/{names[0]}/{found[0].name}",
        )
    if inner:
        raise ValueError(
            f"the splits of {root} lie one folder deeper; name that folder: "
            f"{found[0].path}"
        )


def _only_splits(folder: Folder) -> bool:
    """Returns whether all folders in a class folder are split-like, of two or more."""
    inside = contents.folders(folder)
    return len(inside) > 1 and len(_split_like(inside)) == len(inside)


def _innermost(folder: Folder) -> Folder:
    """Returns seg_train/seg_train for seg_train: archives repeat a folder's name."""
    inside = contents.folders(folder)
    if len(inside) == 1 and inside[0].name.lower() == folder.name.lower():
        if contents.folders(inside[0]):
            return _innermost(inside[0])
    return folder


def _ask(root: Path, found: Sequence[Folder], what: str, remedy: str) -> NoReturn:
    names = [folder.name for folder in found]
    raise ValueError(
        f"{what}; that can be read in two ways.\n"
        f"  As splits: {remedy}.\n"
        f"  As classes ({some(names)}): say so: --config "
        f"configs/folder.py:dir={root},classes={','.join(names[:8])}"
        f"{',...' * (len(names) > 8)} (in Python ImageFolder(classes=(...)))."
    )
