"""The folders of images of a run: said at its start, recorded, recognised later."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from big_vision_lite.config import TrainConfig
from big_vision_lite.data.sources import ImageFolder
from big_vision_lite.data.sources.folder import describe
from big_vision_lite.recipes import serialize
from big_vision_lite.runtime import files

# Fields of sources that name a place on the disk.
PLACES = ("path", "data_dir")


def folders_of(config: TrainConfig) -> dict[str, ImageFolder]:
    """Returns the image folders of training and of what evaluates, by their place."""
    evaluators = {n: e for n, e in config.evaluators.items() if e.every_steps}
    found = {"data.source": config.data.source, "evaluators": evaluators}
    return dict(_inside(found, ""))


def _inside(component: Any, where: str) -> Iterator[tuple[str, ImageFolder]]:
    if isinstance(component, ImageFolder):
        yield where, component
    elif isinstance(component, Mapping):
        for name, value in component.items():
            yield from _inside(value, f"{where}.{name}" if where else name)
    elif isinstance(component, tuple | list):
        for index, value in enumerate(component):
            yield from _inside(value, f"{where}[{index}]")
    elif hasattr(component, "__dataclass_fields__"):
        for field in serialize.fields(component):
            yield from _inside(getattr(component, field.name), f"{where}.{field.name}")


def paragraph(config: TrainConfig) -> list[str]:
    """Returns what lies in the run's folders; raises as their sources do."""
    return describe(list(folders_of(config).values()))


def refuse_workdir_inside(config: TrainConfig, workdir: epath.Path) -> None:
    """Raises ValueError for a run folder in a folder of images: a class by its place.

    Its pictures (first_batch.png) would be trained on.
    """
    if files.is_remote(workdir):
        return
    place = files.absolute(workdir)
    for where, folder in folders_of(config).items():
        root = files.absolute(folder.path)
        if place == root or root in place.parents:
            raise ValueError(
                f"--workdir={workdir} lies in the folder of images {root} ({where}): "
                "what a run writes would become a class of them. Use one outside, such "
                f"as --workdir={root.parent / 'runs' / place.name}"
            )


def fingerprints(config: TrainConfig) -> dict[str, str]:
    """Returns the fingerprint of every folder; manifests record them."""
    return {where: each.fingerprint for where, each in folders_of(config).items()}


def check_unchanged(config: TrainConfig, manifest: Mapping[str, Any]) -> None:
    """Raises ValueError where a folder to evaluate on is not the one of the run."""
    known = manifest.get("folders", {})
    for where, folder in folders_of(config).items():
        if where == "data.source" or where not in known:
            continue
        if folder.fingerprint != known[where]:
            raise ValueError(
                f"{where}: {folder.root.absolute()} holds other images than the folder "
                f"that the run was evaluated on: {len(folder):,} with the fingerprint "
                f"{folder.fingerprint}, then {known[where]}. Give the run its folder "
                "back; or score these images on purpose, under a name of their own: "
                f"--config configs/folder.py:dir={folder.root.absolute()}"
            )


def make_absolute(config: dict[str, Any]) -> dict[str, str]:
    """Makes relative paths of data in an encoded configuration absolute, in place.

    Returns {place: what was typed} of those that it changed.
    """
    typed: dict[str, str] = {}
    _make_absolute(config["data"]["source"], "data.source", typed)
    _make_absolute(config["evaluators"], "evaluators", typed)
    return typed


def _make_absolute(encoded: Any, where: str, typed: dict[str, str]) -> None:
    if isinstance(encoded, list):
        for index, value in enumerate(encoded):
            _make_absolute(value, f"{where}[{index}]", typed)
    elif isinstance(encoded, dict):
        for name, value in encoded.items():
            place = f"{where}.{name}"
            if name not in PLACES or not isinstance(value, str) or not value:
                _make_absolute(value, place, typed)
            elif not files.is_remote(epath.Path(value)):
                # Links stay as they were typed: they may be meant to move.
                absolute = os.path.abspath(os.path.expanduser(value))
                if absolute != value:
                    typed[place], encoded[name] = value, absolute
