"""Folders and tables of images of a run: said at its start, recorded, recognised."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from big_vision_lite.config import TrainConfig
from big_vision_lite.data.sources import (
    ImageFolder,
    Resampled,
    Table,
    Tags,
    folder,
    resampled,
    table,
    tags,
)
from big_vision_lite.recipes import serialize
from big_vision_lite.runtime import files

# Fields of sources that name a place on the disk.
PLACES = ("path", "data_dir", "root", "vocabulary", "duplicates")


def folders_of(config: TrainConfig) -> dict[str, ImageFolder]:
    """Returns the image folders of training and of what evaluates, by their place."""
    return {n: s for n, s in sets_of(config).items() if isinstance(s, ImageFolder)}


def sets_of(config: TrainConfig) -> dict[str, ImageFolder | Table]:
    """Returns the folders and tables of training and of what evaluates, by place."""
    return dict(_found(config, ImageFolder | Table))


def _found(config: TrainConfig, kinds: Any) -> Iterator[tuple[str, Any]]:
    """Yields the sources of these kinds in training and evaluation, by place."""
    evaluators = {n: e for n, e in config.evaluators.items() if e.every_steps}
    found = {"data.source": config.data.source, "evaluators": evaluators}
    return _inside(found, "", kinds)


def _inside(component: Any, where: str, kinds: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(component, kinds):
        yield where, component
    elif isinstance(component, Mapping):
        for name, value in component.items():
            yield from _inside(value, f"{where}.{name}" if where else name, kinds)
    elif isinstance(component, tuple | list):
        for index, value in enumerate(component):
            yield from _inside(value, f"{where}[{index}]", kinds)
    elif hasattr(component, "__dataclass_fields__"):
        for field in serialize.fields(component):
            inner, place = getattr(component, field.name), f"{where}.{field.name}"
            yield from _inside(inner, place, kinds)


def paragraph(config: TrainConfig) -> list[str]:
    """Returns what lies in the run's folders and tables; raises as their sources do."""
    found = list(sets_of(config).values())
    folders = [each for each in found if isinstance(each, ImageFolder)]
    tables = [each for each in found if isinstance(each, Table)]
    tagged = [each for _, each in _found(config, Tags)]
    return [
        *folder.describe(folders),
        *table.describe(tables),
        *tags.describe(tagged),
        *resampled.describe([each for _, each in _found(config, Resampled)]),
    ]


def refuse_workdir_inside(config: TrainConfig, workdir: epath.Path) -> None:
    """Raises ValueError for a run folder in a folder of images: a class by its place.

    Its pictures (first_batch.png) would be trained on.
    """
    if files.is_remote(workdir):
        return
    place = files.absolute(workdir)
    for where, each in folders_of(config).items():
        root = files.absolute(each.path)
        if place == root or root in place.parents:
            raise ValueError(
                f"--workdir={workdir} lies in the folder of images {root} ({where}): "
                "what a run writes would become a class of them. Use one outside, such "
                f"as --workdir={root.parent / 'runs' / place.name}"
            )


def fingerprints(config: TrainConfig) -> dict[str, str]:
    """Returns the fingerprint of every folder and table; manifests record them."""
    return {where: each.fingerprint for where, each in sets_of(config).items()}


def check_unchanged(config: TrainConfig, manifest: Mapping[str, Any]) -> None:
    """Raises ValueError where a set to evaluate on is not the one of the run."""
    known = manifest.get("folders", {})
    for where, each in sets_of(config).items():
        if where == "data.source" or where not in known:
            continue
        if each.fingerprint != known[where]:
            place, kind = files.absolute(each.path), "folder"
            recipe = f"configs/folder.py:dir={place}"
            if isinstance(each, Table):
                recipe, kind = f"configs/table.py:table={place},...", "table"
            raise ValueError(
                f"{where}: {place} holds other images than the {kind} that the run was "
                f"evaluated on: {len(each):,} with the fingerprint {each.fingerprint}, "
                f"then {known[where]}. Give the run its {kind} back; or score these "
                f"images on purpose, under a name of their own: --config {recipe}"
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
