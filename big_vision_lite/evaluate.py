"""Evaluates a saved run, checkpoint or foreign weights and writes the scores.

  python -m big_vision_lite.evaluate --workdir runs/first
  python -m big_vision_lite.evaluate --workdir runs/first/checkpoints/300 \
      --config configs/folder.py:dir=DIR

The first command runs the evaluators of the run's own recipe, the second those of
another recipe (only its `evaluators` are used) on step 300. --workdir takes a run
folder, a checkpoints folder, one step folder, or weights of another library: a file, a
folder with config.json, or hub:organisation/name.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from big_vision_lite.console.progress import Progress
from big_vision_lite.conversion import assumption
from big_vision_lite.messages import did_you_mean
from big_vision_lite.recipes import command_line, serialize
from big_vision_lite.runs import image_folders, load
from big_vision_lite.runs.evaluations import make_context
from big_vision_lite.runs.saved_run import SavedRun
from big_vision_lite.runs.scores import named_scores
from big_vision_lite.runtime import files, startup
from big_vision_lite.runtime.startup import Platform
from big_vision_lite.training import recalibration
from big_vision_lite.types import Evaluator


def evaluate(
    run: SavedRun,
    evaluators: Mapping[str, Evaluator],
    workdir: epath.Path,
    *,
    progress: Progress,
) -> dict[str, float | int]:
    """Runs evaluators on a saved run; returns scores named as in its metrics.jsonl.

    On the same devices the scores equal, bit for bit, those the run recorded at that
    step. Evaluators write their files (per-class tables, controls) to `workdir`.
    """
    suffix = "" if run.state.ema is None else "_ema"
    scores: dict[str, float | int] = {}
    progress.message(recalibration.describe(run.state) or "")
    with jax.set_mesh(run.mesh):
        for name, evaluator in evaluators.items():
            context = make_context(
                name,
                run.config,
                mesh=run.mesh,
                workdir=workdir,
                class_names=run.class_names,
                num_steps=int(run.manifest["num_steps"]),
                abstract_state=run.state,
                untrained_state=run.untrained,
                log=progress.message,
            )
            runner = evaluator.prepare(context)
            named = named_scores(runner, run.state, f"{name}{suffix}")
            progress.scores(run.step, named)
            scores |= named
    return scores


def choose(
    evaluators: Mapping[str, Evaluator], wanted: Sequence[str], recipe: str
) -> dict[str, Evaluator]:
    """Returns the evaluators named in `wanted`, or all enabled ones if it is empty.

    In the order of the recipe.

    Raises:
        ValueError: a name is unknown, or no evaluator is enabled.
    """
    if not wanted:
        chosen = {n: e for n, e in evaluators.items() if e.every_steps}
        if not chosen:
            raise ValueError(
                f"{recipe} has no evaluator that is switched on. Give the evaluators "
                "of another recipe: --config configs/NAME.py"
            )
        return chosen
    for name in wanted:
        if name not in evaluators:
            raise ValueError(
                f'{recipe} has no evaluator "{name}".'
                f"{did_you_mean(name, evaluators)} It has: "
                f"{', '.join(evaluators) or 'none'}."
            )
    return {name: e for name, e in evaluators.items() if name in wanted}


def name_results(
    folder: epath.Path,
    recipe: str | None,
    evaluators: Mapping[str, Any],
    part: str = "",
) -> str:
    """Returns the base name of score files and folders for the step in `folder`.

    `part` is the model in a file of several.
    A digest of the evaluators' fields distinguishes recipes, arguments and overrides:
    scores on data=A must not be mixed with those on data=B.
    """
    name = f"evaluation_{folder.name}" + (f"_{part.replace('/', '.')}" if part else "")
    if recipe is None:
        return name
    text = json.dumps(evaluators, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name}_{pathlib.Path(recipe.split(':', 1)[0]).stem}_{digest}"


def record(
    run: SavedRun,
    scores: Mapping[str, float | int],
    path: epath.Path,
    recipe: str | None,
    evaluators: Mapping[str, Any],
) -> None:
    """Writes the scores, versions and machine to `path`, keeping scores already in it.

    `evaluators` are the recipe's evaluators as JSON values.
    """
    known = json.loads(path.read_text())["scores"] if path.exists() else {}
    document = {
        "step": run.step,
        "checkpoint": str(run.folder),
        "recipe": recipe or "the run's own",
        "evaluators": evaluators,
        "assumptions": assumption.to_record(
            assumption.from_origin(run.manifest.get("origin"))
        ),
        "scores": known | dict(scores),
        "parameters": recalibration.describe(run.state),
        "versions": startup.versions(),
        "machine": startup.machine(),
    }
    files.replace(path, json.dumps(document, indent=1) + "\n")


@contextlib.contextmanager
def _folder_for(run: SavedRun, name: str) -> Iterator[epath.Path]:
    """Yields a folder for evaluators' files, a temporary one if the run is read-only.

    The run's computed controls are copied into it; a control of another protocol is
    detected and recomputed.
    """
    place = run.place_for_results()
    with contextlib.ExitStack() as stack:
        folder = place / name
        if not files.is_writable(place):
            folder = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for known in place.glob("*_controls.json"):
            if not (folder / known.name).exists():
                files.replace(folder / known.name, known.read_text())
        yield folder


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    command = command_line.parse(argv, define_flags, about=__doc__ or "")
    values = command.flags
    if not values["workdir"].value:
        raise ValueError(
            "Which run? Add --workdir RUN: a run folder, its checkpoints folder or one "
            "step folder."
        )
    chosen_platform = values["platform"].value
    part = str(values["part"].value)
    place = load.locate(values["workdir"].value, part=part)
    startup.set_up_to_use(
        place.platform(),
        chosen_platform and Platform(chosen_platform),
    )
    modules: Any = values["allow_module"].value
    run = load.load(place, allowed_modules=modules)
    recipe = command.recipe
    config = run.config if command.config is None else command.config
    names: Any = values["evaluators"].value
    wanted = [name for name in names if name]
    evaluators = choose(config.evaluators, wanted, recipe or str(run.folder))
    if command.config is None:
        own = dataclasses.replace(config, evaluators=evaluators)
        image_folders.check_unchanged(own, run.manifest)
    described = json.loads(serialize.to_json(config))["config"]["evaluators"]
    name = name_results(run.folder, recipe, described, part)
    total = int(run.manifest["num_steps"])
    with (
        _folder_for(run, name) as folder,
        Progress(total, config.data.batch_size) as progress,
    ):
        progress.begin(run.step)
        scores = evaluate(run, evaluators, folder, progress=progress)
    progress.summary(scores, [])
    path = run.place_for_results() / f"{name}.json"
    if files.is_writable(path.parent):
        record(run, scores, path, recipe, described)
        print(f"Scores of step {run.step} written to {path}")
    else:
        print(f"Nothing written: {path.parent} is read-only.")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of evaluate."""
    flags.DEFINE_string(
        "workdir", None, "Run, checkpoints or step folder.", flag_values=values
    )
    flags.DEFINE_string(
        "part", "", "Of a file with several models one: teacher.", flag_values=values
    )
    flags.DEFINE_list(
        "evaluators", [], "Names, separated by commas; default all.", flag_values=values
    )
    flags.DEFINE_enum(
        "platform",
        None,
        [platform.value for platform in Platform],
        "Device to run on; default what there is.",
        flag_values=values,
    )


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv))
