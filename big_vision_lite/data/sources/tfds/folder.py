"""Finds a prepared TFDS set: DATA_DIR/NAME[/CONFIG]/VERSION."""

import os
import re
from pathlib import Path

from big_vision_lite.messages import did_you_mean, some

# Files that TFDS cannot download: the user must bring them.
BROUGHT_FILES = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}
# The prefix of sets rendered from fonts, which TFDS does not know.
GLYPHS = "glyphs32_"
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def data_root(data_dir: str | None) -> Path:
    """Returns `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Raises:
        ValueError: it is a URL, not a local path.
    """
    chosen = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if "://" in chosen:
        raise ValueError(
            f"data_dir={chosen!r} is not a local path; copy the set to a local disk, "
            "or mount the bucket and name that folder."
        )
    return Path(chosen).expanduser()


def find(name: str, data_dir: str | None) -> Path:
    """Returns the version folder of `name[/config][:version]`, the newest by default.

    Raises:
        FileNotFoundError: there is none; says what is there.
    """
    root = data_root(data_dir)
    plain, _, version = name.partition(":")
    folder = root / plain
    if not plain or not folder.is_dir():
        raise FileNotFoundError(_not_prepared(plain, root))
    versions = {
        path.name: path
        for path in folder.iterdir()
        if _VERSION.fullmatch(path.name) and (path / "dataset_info.json").is_file()
    }
    if version and version not in versions:
        raise FileNotFoundError(
            f"{plain} has no version {version!r} in {folder}; prepared there: "
            f"{', '.join(sorted(versions)) or 'none'}."
        )
    if not versions:
        configs = [f"{plain}/{config}" for config in _prepared_in(folder)]
        if configs:
            raise FileNotFoundError(
                f"{plain} in {root} has configs; name one of them: {some(configs)}."
            )
        raise FileNotFoundError(_not_prepared(plain, root))
    newest = max(versions, key=lambda v: tuple(map(int, v.split("."))))
    return versions[version or newest]


def _prepared_in(folder: Path) -> list[str]:
    """Returns the names of the sets below `folder`, with configs as `name/config`."""
    files = [*folder.glob("*/*/dataset_info.json")]
    files += folder.glob("*/*/*/dataset_info.json")
    return sorted({str(file.parent.parent.relative_to(folder)) for file in files})


def brought_files(name: str, root: Path) -> list[tuple[Path, bool]]:
    """Returns (path, exists) for each file that the user must bring for `name`."""
    manual = root / "downloads" / "manual"
    files = [manual / file for file in BROUGHT_FILES.get(name, ())]
    return [(file, file.is_file()) for file in files]


def _not_prepared(name: str, root: Path) -> str:
    message = f"{name} is not prepared in {root}: "
    found = _prepared_in(root)
    message += (
        f"sets there: {some(found)}" if root.is_dir() else "that folder does not exist"
    )
    brought = brought_files(name, root)
    if brought:
        states = (
            f"{p.name} ({'found' if there else 'missing'})" for p, there in brought
        )
        message += (
            f"; to prepare it, {brought[0][0].parent} needs {' and '.join(states)}"
        )
    command = f"tfds {name or 'NAME'} --data_dir {root}"
    if name.startswith(GLYPHS):
        command = f"glyphs --fonts FOLDER --out {root} --name {name}"
    return (
        f"{message}.{did_you_mean(name, found)} Prepare it: python "
        f"tools/prepare_dataset.py {command}; or name "
        "another place: data_dir=..., TFDS_DATA_DIR=..."
    )
