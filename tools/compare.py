"""Trains one network by every method of a recipe, for several seeds; makes one table.

  python tools/compare.py --data_dir DATA_DIR --runs runs/comparison
  python tools/compare.py --data_dir DATA_DIR --runs runs/comparison --seeds 5
  python tools/compare.py --table
  python tools/compare.py --data_dir DATA_DIR --runs DIR --out DIR/trial --steps 20

Every training is a process of its own, whose CPU-seconds count (start, compilation,
reading of images); its evaluation is another. What is done is a JSON file in
tools/comparison/, with the commit of the code that made it; those are kept, so that the
tool continues where it stopped, one seed of all methods after the other. A training
that was stopped begins anew, since its CPU-seconds would be those of a part. The table
goes beside that folder, as Markdown. --steps is for trials: all trainings get this
length. Run it beside nothing else: on a shared core work costs more CPU-seconds.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "comparison.py"
TEACHER = ROOT / "configs" / "glyphs.py"
RESULTS = ROOT / "tools" / "comparison"
# Column, and the end of the score's name: with "_ema" before it where there is one.
COLUMNS = {
    "digits": "digits/10_shot",
    "new fonts": "new_fonts/10_shot",
    "fashion": "fashion/10_shot",
    "emoji": "emoji/10_shot",
}
CHOSEN, FINE_TUNED = "accuracy_l2_chosen", "fashion, 1,000 labels"
CONTROLS = {"raw pixels": "control_raw_pixels", "untrained": "control_untrained"}


@dataclasses.dataclass(kw_only=True)
class Result:
    """One training, and the scores of its network, in percent."""

    method: str
    seed: int
    steps: int
    cpu_seconds: float
    scores: dict[str, float]
    controls: dict[str, dict[str, float]]
    commit: str
    date: str
    machine: str


def read(folder: pathlib.Path) -> list[Result]:
    """Returns the results in a folder, by seed and method.

    Raises:
        ValueError: a file is no result.
    """
    found = []
    for file in folder.glob("*.json"):
        try:
            found.append(Result(**json.loads(file.read_text())))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file} is no result of compare.py: {error}") from error
    return sorted(found, key=lambda result: (result.seed, result.method))


def of_evaluation(
    scores: Mapping[str, float],
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Returns percentages by column, of the network and of each control there is."""
    plain = {name.replace("_ema/", "/"): value for name, value in scores.items()}
    network = {
        column: 100 * plain[f"fewshot/{name}/{CHOSEN}"]
        for column, name in COLUMNS.items()
    }
    network[FINE_TUNED] = 100 * plain["finetune/accuracy"]
    controls = {}
    for control, prefix in CONTROLS.items():
        # Written as <set>/<shots>/control_<kind>_<score>.
        values = {
            column: 100 * plain[key]
            for column, name in COLUMNS.items()
            if (key := f"fewshot/{name}/{prefix}_l2_chosen") in plain
        }
        if values:
            controls[control] = values
    if "finetune/control_untrained" in plain:
        controls["untrained"][FINE_TUNED] = 100 * plain["finetune/control_untrained"]
    return network, controls


def table(results: Sequence[Result]) -> str:
    """Returns the table as Markdown: means over seeds, ± sample sd of two or more."""
    columns = (*COLUMNS, FINE_TUNED)
    lines = [
        f"| method | seeds | steps | CPU-seconds | {' | '.join(columns)} |",
        f"| --- {'| --- ' * (3 + len(columns))}|",
    ]
    methods = sorted({result.method for result in results})
    rows = {m: [r for r in results if r.method == m] for m in methods}
    # The best first, by the column that says most of the network alone.
    first = next(iter(COLUMNS))
    best = sorted(
        methods, key=lambda m: -statistics.mean(r.scores[first] for r in rows[m])
    )
    for method in best:
        each = rows[method]
        values = [_spread([r.scores[c] for r in each]) for c in columns]
        steps = ", ".join(sorted({f"{r.steps:,}" for r in each}))
        cpu = _spread([r.cpu_seconds for r in each], digits=0)
        lines.append(
            f"| {method} | {len(each)} | {steps} | {cpu} | {' | '.join(values)} |"
        )
    for control in CONTROLS:
        each = [r.controls[control] for r in results if control in r.controls]
        if each:
            values = [
                _spread([c[column] for c in each if column in c]) for column in columns
            ]
            lines.append(f"| {control} | {len(each)} | | | {' | '.join(values)} |")
    commits = sorted({result.commit for result in results})
    machines = sorted({result.machine for result in results})
    dates = sorted(result.date for result in results)
    lines += [
        "",
        f"Accuracy in percent; few-shot with 10 images a class. {dates[0]} to "
        f"{dates[-1]}; commits {', '.join(commits)}; {'; '.join(machines)}.",
    ]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):,.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}"


def missing(
    methods: Iterable[str], seeds: int, results: Iterable[Result]
) -> list[tuple[int, str]]:
    """Returns (seed, method) of what has no result, a seed of all methods first."""
    there = {(result.seed, result.method) for result in results}
    wanted = [(seed, method) for seed in range(seeds) for method in methods]
    return [each for each in wanted if each not in there]


def measure(
    method: str, seed: int, data_dir: str, runs: pathlib.Path, steps: int
) -> Result:
    """Trains and evaluates one method with one seed; `steps` 0 are the recipe's.

    The first method's evaluation has the controls, which are the same for all.

    Raises:
        subprocess.CalledProcessError: a process failed; it has said why.
    """
    argument = f"method={method},data_dir={data_dir},steps={steps}"
    if method == "distil":
        teacher = runs / "teacher"
        _run("train", f"{TEACHER}:data_dir={data_dir}", teacher)
        argument += f",teacher={teacher}"
    workdir = runs / f"{method}_{seed}"
    if workdir.exists():
        shutil.rmtree(workdir)
    of_seed = f"--config.seed={seed}"
    cpu = _run("train", f"{RECIPE}:{argument},transfer=false", workdir, of_seed)
    argument += f",controls={str(method == _methods()[0]).lower()}"
    _run("evaluate", f"{RECIPE}:{argument}", workdir, of_seed)
    (file,) = workdir.glob("evaluation_*_comparison_*.json")
    evaluation = json.loads(file.read_text())
    scores, of_controls = of_evaluation(evaluation["scores"])
    return Result(
        method=method,
        seed=seed,
        steps=evaluation["step"],
        cpu_seconds=round(cpu, 1),
        scores={name: round(value, 3) for name, value in scores.items()},
        controls=of_controls,
        commit=commit(),
        date=datetime.date.today().isoformat(),
        machine=_machine(evaluation["machine"]),
    )


def _run(program: str, recipe: str, workdir: pathlib.Path, *flags: str) -> float:
    """Runs a program of the package; returns the CPU-seconds of its process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", f"big_vision_lite.{program}"]
    command += [f"--config={recipe}", f"--workdir={workdir}", *flags]
    subprocess.run(command, check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commit() -> str:
    """Returns the commit of the code, with "+" where files differ from it."""
    git = ("git", "-C", str(ROOT))
    name = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True)
    changed = subprocess.check_output(
        [*git, "status", "--porcelain", "--", "big_vision_lite", "configs"], text=True
    )
    return name.strip() + ("+" if changed else "")


def _machine(recorded: Any) -> str:
    return recorded if isinstance(recorded, str) else json.dumps(recorded)


def _methods() -> tuple[str, ...]:
    """Returns the names of the recipe's methods, in its order."""
    spec = importlib.util.spec_from_file_location("comparison", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return tuple(module.STEPS)


def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", help="the prepared sets that the recipe names")
    parser.add_argument("--runs", type=pathlib.Path, help="where the runs go")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="of every training")
    parser.add_argument("--methods", help="names with commas; default all")
    parser.add_argument("--table", action="store_true", help="write the table alone")
    chosen = parser.parse_args(arguments)
    if not chosen.table:
        if not (chosen.data_dir and chosen.runs):
            parser.error("give --data_dir and --runs, or --table")
        methods = _methods()
        if chosen.methods:
            wanted = tuple(chosen.methods.split(","))
            if unknown := set(wanted) - set(methods):
                names = ", ".join(methods)
                parser.error(f"{', '.join(sorted(unknown))}: the methods are {names}")
            methods = wanted
        chosen.out.mkdir(parents=True, exist_ok=True)
        for seed, method in missing(methods, chosen.seeds, read(chosen.out)):
            print(f"compare: {method}, seed {seed}", flush=True)
            runs = chosen.runs.resolve()
            result = measure(method, seed, chosen.data_dir, runs, chosen.steps)
            text = json.dumps(dataclasses.asdict(result), indent=1) + "\n"
            (chosen.out / f"{method}_{seed}.json").write_text(text)
    if not (results := read(chosen.out)):
        parser.error(f"{chosen.out} has no results yet: leave --table out")
    file = chosen.out.with_suffix(".md")
    file.write_text(table(results))
    print(f"{len(results)} results: {file}")


if __name__ == "__main__":
    main(sys.argv[1:])
