"""The commands that a finished run suggests: what it can do, from any folder."""

import importlib.metadata
import importlib.util
import os
import pathlib
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

import big_vision_lite
from big_vision_lite.config import TrainConfig
from big_vision_lite.recipes import serialize
from big_vision_lite.types import backbone_of

ROOT = pathlib.Path(big_vision_lite.__file__).parents[1]


def next_commands(
    workdir: epath.Path,
    command: str | None,
    config: TrainConfig,
    outputs: Sequence[str],
) -> list[str]:
    """Returns the commands to suggest after a run, with the running Python.

    `outputs` are those that the model gave in training.
    """
    modules = serialize.modules(config)
    package = f"{python(modules)} -m big_vision_lite"
    allowed = "".join(f" --allow_module={module}" for module in modules)
    run, tuned = (shlex.quote(f"{workdir}{end}") for end in ("", "_finetuned"))
    lines = []
    if written := predicted(config, outputs):
        images = f"--images FOLDER {written}"
        lines.append(f"{package}.predict --workdir {run} {images}{allowed}")
    if any(evaluator.every_steps for evaluator in config.evaluators.values()):
        lines.append(f"{package}.evaluate --workdir {run}{allowed}")
    recipe = ROOT / "configs" / "finetune.py"
    if recipe.exists() and written:
        more = f",allow_module={modules[0]}" if modules else ""
        words = shlex.quote(f"{recipe}:init={workdir},data=FOLDER{more}")
        lines.append(f"{package}.train --config {words} --workdir {tuned}{allowed}")
    if command is not None:
        lines.append(f"{command}  # resumes")
    return [*lines, f"tensorboard --logdir {run}"]


def predicted(config: TrainConfig, outputs: Sequence[str]) -> str:
    """Returns what predict can write: classes, without a head features, or nothing."""
    part, _ = backbone_of(config.model)
    try:
        config.model.inputs({"image": None})
        of_images_alone = True
    except KeyError:  # a caption, say
        of_images_alone = False
    if "logits" in outputs and of_images_alone:
        return "--out preds.csv"
    # A backbone within the model takes images alone and gives features.
    if part or ("pooled" in outputs and of_images_alone):
        return "--embed features.npz"
    return ""


def python(modules: Iterable[str]) -> str:
    """Returns the running Python, with the PYTHONPATH that finds `modules` anywhere.

    What is found only because the command was given in its folder, or by a relative
    PYTHONPATH, would not be found from another folder.
    """
    names = [module.partition(".")[0] for module in modules]
    try:
        importlib.metadata.distribution("big_vision_lite")
    except importlib.metadata.PackageNotFoundError:
        names.append("big_vision_lite")
    known = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    folders = []
    for name in names:
        folder = _folder_of(name)
        by_chance = folder == os.getcwd() or any(
            os.path.abspath(path) == folder for path in known if not os.path.isabs(path)
        )
        if by_chance and folder not in [*known, *folders]:
            folders.append(folder)
    executable = shlex.quote(sys.orig_argv[0])
    if not folders:
        return executable
    absolute = [*folders, *map(os.path.abspath, known)]
    path = os.pathsep.join(dict.fromkeys(absolute))
    return f"PYTHONPATH={shlex.quote(path)} {executable}"


def _folder_of(name: str) -> str:
    spec: Any = importlib.util.find_spec(name)
    origin = spec and (spec.origin or next(iter(spec.submodule_search_locations), ""))
    if not origin:
        return ""
    file = pathlib.Path(origin).absolute()
    package = spec.submodule_search_locations is not None and spec.origin is not None
    return str(file.parents[1] if package else file.parent)
