"""Estimates memory and speed of a recipe on machines you need not have.

python -m big_vision_lite.plan --config configs/vit_s16_i1k.py --on v5e:2x4,h100:8

No data and no accelerator: the train step is compiled from shapes alone, by the real
compilers of TPUs and GPUs (pip install -e '.[plan]'). Times are estimates, not run. If
a recipe does not fit, plan searches by compiling for the smallest change that does.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath
from rich.console import Console
from rich.text import Text

from big_vision_lite.config import TrainConfig
from big_vision_lite.console import bar_chart, tables
from big_vision_lite.data import unopened
from big_vision_lite.recipes import command_line
from big_vision_lite.runtime import cpu, files, plugins, startup, targets
from big_vision_lite.runtime.targets import Target
from big_vision_lite.training import estimate as estimates
from big_vision_lite.training import fitting
from big_vision_lite.training.compile_process import CompileProcess
from big_vision_lite.training.estimate import DISK, Estimate

GIGA = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimates of one recipe on several machines, and the values they share.

    `num_steps` and `examples` are None if they cannot be known without the data.
    `seconds_an_image` is the CPU time of preprocessing one image on this machine.
    """

    recipe: str
    estimates: list[Estimate]
    fits: dict[str, fitting.Fit | None]
    examples: int | None
    num_steps: int | None
    batch_size: int
    seconds_an_image: float
    assumed: list[str]

    def hours(self, found: Estimate) -> float | None:
        """Estimates the hours to the last step, without evaluations and checkpoints."""
        if self.num_steps is None or found.step_seconds is None:
            return None
        return self.num_steps * found.step_seconds / 3600

    def input_cores(self, found: Estimate) -> float | None:
        """Returns the CPU cores, at this machine's speed, that keep the devices fed."""
        if found.images_per_second is None:
            return None
        return found.images_per_second * self.seconds_an_image


def main(argv: Sequence[str]) -> None:
    """Parses the command line, compiles for every target and prints one table."""
    command = command_line.parse(argv, define_flags, about=__doc__ or "")
    values = command.flags
    if command.config is None:
        raise ValueError(
            "Which recipe? For example: python -m big_vision_lite.plan "
            "--config configs/vit_s16_i1k.py --on v5e:2x4,h100:8"
        )
    on: Any = values["on"].value
    warn = functools.partial(print, file=sys.stderr, flush=True)
    if on == targets.HERE:
        startup.set_up(command.config.platform)
        if not plugins.compilers_installed():
            warn(f"For TPUs and GPUs that are not here: {targets.INSTALL}")
    chosen = read_targets(on)
    modules: Any = values["allow_module"].value
    picture = values["picture"].value and files.absolute(values["picture"].value)
    if picture and picture.suffix != ".png":
        raise ValueError(f"--picture={picture} is no PNG; write --picture=plan.png")
    config = with_batch(command.config, values["batch"].value, modules)
    found = make(
        config,
        chosen,
        recipe=command.recipe or "",
        examples=values["examples"].value,
        modules=modules,
        search=bool(values["search"].value),
        say=warn,
    )
    if picture:
        draw(found, picture)
    if values["json"].value:
        print(json.dumps(as_document(found), indent=1))
    else:
        show(found, Console())


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of plan."""
    string, boolean, integer = (
        functools.partial(define, flag_values=values)
        for define in (flags.DEFINE_string, flags.DEFINE_bool, flags.DEFINE_integer)
    )
    string("on", targets.HERE, "Machines: v5e:2x4,v5p:4x4x4,h100:8,h100:2x8,cpu:8, ...")
    integer("batch", None, "Images a step; the same as --config.data.batch_size.")
    integer("examples", None, "Images of the training set, where no table knows them.")
    boolean("search", True, "Look for a change that fits; --nosearch does not.")
    boolean("json", False, "Print everything as JSON.")
    string("picture", None, "Draw memory and time by kind into this PNG.")
    # Accepted, so that a train command can be reused with its flags.
    string("workdir", None, "Not used: nothing is written there.")


def read_targets(text: str) -> list[Target]:
    """Parses "v5e:2x4,h100:8"; `targets.HERE` means this machine.

    Raises:
        ValueError: a target is unknown or repeated, or none is named.
    """
    if text == targets.HERE:
        return [targets.here()]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"--on={text} names {'a target twice' if names else 'no target'}; for "
            "example --on=v5e:2x4,h100:8"
        )
    return [targets.parse(name) for name in names]


def with_batch(config: TrainConfig, batch: int | None, modules: Any) -> TrainConfig:
    """Returns the recipe with batch size `batch`, unchanged if that is None."""
    if batch is None:
        return config
    return fitting.changed(config, {"data.batch_size": batch}, modules)


def make(
    config: TrainConfig,
    chosen: Sequence[Target],
    *,
    recipe: str,
    examples: int | None,
    modules: Any,
    search: bool,
    say: Any,
) -> Plan:
    """Returns the plan of a recipe, compiled for each target; opens no source.

    Raises:
        ValueError: the recipe does not fit the devices of a target, or a compiler is
            missing.
    """
    assumed = ["labels: one class an image, as many classes as the head has outputs"]
    known = examples or unopened.count(config.data.source)
    if known is None:
        assumed.append("examples: not known without the data; --examples=N says it")
    num_steps = config.num_steps
    if num_steps is None and known is not None:
        num_steps = config.resolve_steps(known)
    cpus = [math.prod(map(int, t.shape.split("x"))) for t in chosen if t.kind == "cpu"]
    with CompileProcess(modules, cpu_devices=max(cpus, default=1)) as process:
        found, fits = [], {}
        for target in chosen:
            say(f"compiling for {target.name}")
            if target.name == targets.HERE:
                estimate = estimates.on_target(config, target, num_steps)
            else:
                estimate = process.estimate(config, target.name, num_steps)
            found.append(estimate)
            if not estimate.fits and search and target.name != targets.HERE:
                say(f"{target.name} is too small; looking for what fits")
                larger = [target.name, *more_chips(target)]
                ask = functools.partial(process.memory, num_steps=num_steps)
                fits[target.name] = fitting.search(
                    config, estimate, larger, ask, say, modules
                )
    return Plan(
        recipe=recipe,
        estimates=found,
        fits=fits,
        examples=known,
        num_steps=num_steps,
        batch_size=config.data.batch_size,
        seconds_an_image=unopened.seconds_an_image(
            config.data.ops, config.preprocess, source=config.data.source
        ),
        assumed=assumed,
    )


def more_chips(target: Target, most: int = 2) -> list[str]:
    """Returns `most` targets of the same chips, each with twice as many as the last."""
    sides = [int(side) for side in target.shape.split("x")]
    found = []
    for _ in range(most):
        if target.kind == "tpu":
            shortest = min(range(len(sides)), key=lambda axis: sides[axis])
            sides[shortest] *= 2
        else:
            sides = [sides[0] * 2, sides[1]] if len(sides) == 2 else [2, sides[0]]
        found.append(f"{target.generation}:{'x'.join(map(str, sides))}")
    return found


def as_document(plan: Plan) -> dict[str, Any]:
    """Returns the plan as JSON values."""
    return {
        "recipe": plan.recipe,
        "note": "estimated from compiled programs, not run",
        "examples": plan.examples,
        "steps": plan.num_steps,
        "batch_size": plan.batch_size,
        "assumed": plan.assumed,
        "input_seconds_an_image": plan.seconds_an_image,
        "targets": [
            dataclasses.asdict(found)
            | {
                "hours": plan.hours(found),
                "input_cores": plan.input_cores(found),
                "checkpoint_seconds": found.checkpoint_bytes / DISK,
            }
            for found in plan.estimates
        ],
        "fits": {
            name: None if fit is None else dataclasses.asdict(fit)
            for name, fit in plan.fits.items()
        },
    }


def show(plan: Plan, console: Console) -> None:
    """Prints a column per target, then assumptions and the changes that fit."""
    first = plan.estimates[0]
    title = f"{plan.recipe}: estimated from compiled programs, not run"
    rows = {}
    for name, cell in ROWS.items():
        cells = {found.target: cell(plan, found) for found in plan.estimates}
        if any(cells.values()):
            rows[name] = cells
    columns = console.width if console.is_terminal else None
    say(console, tables.format_table(title, rows, columns))
    say(console, "All figures are per device and step, unless said.")
    for name, leaf in first.batch.items():
        say(console, f"batch        {name} {leaf}")
    steps = "not known" if plan.num_steps is None else f"{plan.num_steps:,}"
    say(console, f"steps        {steps} of {plan.batch_size} images")
    say(
        console,
        f"input        {1e3 * plan.seconds_an_image:.2f} ms of CPU an image on this "
        f"machine, which has {cpu.available()} cores",
    )
    size = first.checkpoint_bytes
    say(
        console,
        f"checkpoint   {_size(size)}, {size / DISK:.1f} s at 1 GB/s",
    )
    for line in plan.assumed:
        say(console, f"assumed      {line}")
    for name, fit in plan.fits.items():
        say(console, fit_line(plan, name, fit))


def fit_line(plan: Plan, name: str, fit: fitting.Fit | None) -> str:
    """Returns a message with the flags that make the recipe fit a target."""
    refused = next(found for found in plan.estimates if found.target == name)
    there = (refused.memory_there or 0) / GIGA
    if fit is None:
        return (
            f"{name}: needs {refused.memory_needed / GIGA:.1f} GB of {there:.1f}, and "
            "no change was found that fits; try more chips, or a smaller --batch"
        )
    return (
        f"{name}: needs {refused.memory_needed / GIGA:.1f} GB of {there:.1f}; fits "
        f"({fit.estimate.memory_needed / GIGA:.1f} GB, compiled) with "
        f"{' '.join(fit.flags)}"
    )


def say(console: Console, line: str) -> None:
    """Prints a line without markup or hard wrapping."""
    console.print(Text(line), soft_wrap=True)


def draw(plan: Plan, path: epath.Path) -> None:
    """Draws one bar per target into a PNG: memory by kind, time by operation."""
    memory = {
        found.target: {kind: size / GIGA for kind, size in found.memory.items() if size}
        for found in plan.estimates
    }
    spent = {found.target: by_operation(found) for found in plan.estimates if found.top}
    charts = [
        bar_chart.Chart(title="memory of a device, GB", bars=memory),
        bar_chart.Chart(title="time of a step, ms (estimated)", bars=spent),
    ]
    files.make_folder(path.parent)
    path.write_bytes(bar_chart.draw(charts))


def by_operation(found: Estimate) -> dict[str, float]:
    """Returns milliseconds by module, summed over the most expensive operations."""
    sums: dict[str, float] = {}
    for row in found.top:
        names = [n for n in row["operation"].split("/") if "(" not in n] or ["other"]
        part = "/".join(names[:-1][-2:]) or names[0]
        sums[part] = sums.get(part, 0.0) + row.get("microseconds", 0) / 1e3
    return dict(sorted(sums.items(), key=lambda item: -item[1])[:8])


def _size(size: float | int | None) -> str:
    if size is None:
        return ""
    if size < 0.1 * GIGA:
        return f"{size / 1e6:.1f} MB" if size else "0 MB"
    return f"{size / GIGA:,.2f} GB"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.1f} ms"


def _memory(plan: Plan, found: Estimate) -> str:
    there = found.memory_there
    needed = _size(found.memory_needed)
    if there is None:
        return needed
    verdict = "fits" if found.fits else "DOES NOT FIT"
    return f"{needed} of {there / GIGA:,.2f}, {verdict}"


def _collectives(plan: Plan, found: Estimate) -> str:
    return "\n".join(
        f"{sums['count']} {kind} {sums['bytes'] / 1e6:,.1f} MB"
        for kind, sums in found.collectives.items()
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


ROWS: dict[str, Any] = {
    "mesh": lambda plan, e: (
        ", ".join(f"{k}={n}" for k, n in e.mesh.items() if n > 1) or "1 device"
    ),
    "parameters (trained)": lambda plan, e: f"{e.parameters:,} ({e.trained:,})",
    "memory": _memory,
    **{
        f"  {kind}": lambda plan, e, kind=kind: _size(e.memory.get(kind))
        for kind in (
            "parameters",
            "optimizer",
            "averages and statistics",
            "batch",
            "activations and gradients",
            "program",
        )
    },
    "bytes moved": lambda plan, e: _size(e.bytes_moved),
    "FLOPs of products": lambda plan, e: (
        _number(e.flops and e.flops / 1e9, ",.0f") + (" G" if e.flops else "")
    ),
    "kernels": lambda plan, e: _number(e.kernels, ",d"),
    "cycles": lambda plan, e: (
        _number(e.cycles and e.cycles / 1e6, ",.1f") + (" M" if e.cycles else "")
    ),
    "collectives": _collectives,
    "time of collectives alone": lambda plan, e: _milliseconds(e.link_seconds),
    "step, roofline": lambda plan, e: _milliseconds(e.bound_seconds),
    "step, estimated": lambda plan, e: _milliseconds(e.step_seconds),
    "images/s, all devices": lambda plan, e: _number(e.images_per_second, ",.0f"),
    "MFU": lambda plan, e: _number(e.mfu, ".1%"),
    "CPU cores for the input": lambda plan, e: _number(plan.input_cores(e), ",.1f"),
    "hours to the last step": lambda plan, e: _number(plan.hours(e), ",.1f"),
    "compiled in": lambda plan, e: f"{e.compile_seconds:,.0f} s",
}


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv))
