"""Prints what XLA makes of a recipe's train step on machines that are not there.

  python tools/compile_report.py --config configs/vit_s16_i1k.py --on v5e:2x4,h100:8
  python tools/compile_report.py --golden --write
  python tools/compile_report.py --table

The second records tests/golden/compiled.json anew, after a wanted change; the third
prints the README's table, an hour of compiling on two cores. Figures are
of one device and one step; bodies of loops count as often as they turn. A custom call
counts as all its operands and results. None of it has run.
"""

import argparse
import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from big_vision_lite import plan
from big_vision_lite.recipes import command_line
from big_vision_lite.runtime import targets
from big_vision_lite.training.compile_process import CompileProcess
from big_vision_lite.training.estimate import Estimate

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "compiled.json"
# The compilers whose versions decide the figures.
COMPILERS = ("jax", "libtpu", "jax-cuda12-plugin")
# Small enough for a test on both machines, with all that repeats in the whole models;
# a GPU's compiler is quick enough for whole ones. The recipe is tests/recipes/peers.py.
BOTH = ("v5e:2x4", "h100:8")
GPU = ("h100:8",)
CASES = {
    "ViT-S/16, 2 blocks": ("model=S/16,depth=2", BOTH),
    "ViT-S/16, 2 blocks, fsdp=8": ("model=S/16,depth=2,fsdp=8", BOTH),
    "ViT-S/16, 2 blocks, fsdp=8, 4 parts": ("model=S/16,depth=2,fsdp=8,parts=4", BOTH),
    "ResNet-50, 2 stages": ("model=R50,depth=2", BOTH),
    "ViT-S/16": ("model=S/16", GPU),
    "ViT-B/16": ("model=B/16", GPU),
    "ViT-L/16": ("model=L/16,batch=256", GPU),
    "ViT-L/16, 4 blocks, fsdp=8": ("model=L/16,depth=4,batch=256,fsdp=8", GPU),
    "ResNet-50": ("model=R50", GPU),
    "BiT-R50x1": ("model=BiT-R50x1", GPU),
}
# The README's table: whole models, a batch of 1,024 or, of ViT-L, 256.
MODELS = {
    "ViT-S/16": "model=S/16",
    "ViT-B/16": "model=B/16",
    "ViT-L/16": "model=L/16,batch=256",
    "ResNet-50": "model=R50",
    "BiT-R50x1": "model=BiT-R50x1",
}
MACHINES = ("v5e:2x4", "v5p:2x2x1", "v6e:2x4", "tpu7x:2x2x1", "h100:8", "b200:8")
PEERS = ROOT / "tests" / "recipes" / "peers.py"
COMPARED = ("bytes_moved", "flops", "cycles", "kernels", "temporaries")


def versions() -> str | None:
    """Names the compilers' versions in one line, None where one is not installed."""
    try:
        found = [f"{name} {importlib.metadata.version(name)}" for name in COMPILERS]
    except importlib.metadata.PackageNotFoundError:
        return None
    return ", ".join(found)


def figures(found: Estimate) -> dict[str, Any]:
    """Returns what is recorded of an estimate."""
    return {
        "bytes_moved": found.bytes_moved,
        "flops": found.flops,
        "cycles": found.cycles,
        "kernels": found.kernels,
        "temporaries": found.memory.get("activations and gradients"),
        "collectives": found.collectives,
    }


def estimates(recipe: Sequence[str], machines: Sequence[str]) -> list[Estimate]:
    """Compiles a recipe, given as on a command line, for some machines."""
    words = ["plan", f"--config={recipe[0]}", *recipe[1:]]
    config = command_line.parse(words, plan.define_flags).config
    for machine in machines:
        targets.parse(machine)
    with CompileProcess() as process:
        return [process.estimate(config, machine, None) for machine in machines]


def golden() -> dict[str, dict[str, Any]]:
    """Compiles what `tests/golden/compiled.json` holds."""
    found = {}
    for name in CASES:
        found |= case(name)
    return found


def case(name: str) -> dict[str, dict[str, Any]]:
    """Compiles one of `CASES`; returns its figures by machine."""
    arguments, machines = CASES[name]
    all_ = estimates([f"{PEERS}:{arguments}"], machines)
    return {f"{name} on {e.target}": figures(e) for e in all_}


def table(machines: Sequence[str]) -> None:
    """Prints a Markdown table of `MODELS` on machines, a row as soon as it is known."""
    print("| | " + " | ".join(machines) + " |")
    print("| --- " * (1 + len(machines)) + "|", flush=True)
    for name, arguments in MODELS.items():
        found = estimates([f"{PEERS}:{arguments}"], machines)
        print(f"| {name} | " + " | ".join(map(cell, found)) + " |", flush=True)


def cell(found: Estimate) -> str:
    """Returns bytes, memory, cycles and MFU of one estimate."""
    memory = f"{found.memory_needed / 1e9:.1f} GB"
    if not found.fits:
        return f"needs {memory}"
    assert found.bytes_moved is not None and found.mfu is not None
    cycles = f", {found.cycles / 1e6:.0f} M" if found.cycles else ""
    return f"{found.bytes_moved / 1e9:.1f} GB, {memory}{cycles}, {found.mfu:.0%}"


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists figures that differ by more than 1 %, and numbers of collectives."""
    lines = []
    for name in COMPARED:
        before, after = recorded[name] or 0, now[name] or 0
        if abs(after - before) > 0.01 * before:
            lines.append(f"{name}: {before:,} recorded, {after:,} now")
    if recorded["collectives"] != now["collectives"]:
        lines.append(
            f"collectives: {recorded['collectives']} recorded, {now['collectives']} now"
        )
    return lines


def show(found: Estimate, console: Console) -> None:
    """Prints the figures of one machine and its dearest operations."""
    console.print(f"{found.target}: estimated, not run")
    for name, value in figures(found).items():
        text = f"{value:,}" if isinstance(value, int) else value
        console.print(f"  {name:14} {text}")
    table = Table(title="dearest operations (blocks of a model summed up)")
    columns = ("operation", "count", "bytes", "flops", "microseconds")
    for column in columns:
        table.add_column(column, justify="left" if column == "operation" else "right")
    for row in found.top:
        cells = [row.get(column, 0) for column in columns[1:]]
        table.add_row(row["operation"], *(f"{cell:,}" for cell in cells))
    console.print(table)


def main(argv: Sequence[str]) -> None:
    """Reads the command line; prints or records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help="a recipe")
    parser.add_argument("--on", default=",".join(BOTH), help="machines")
    parser.add_argument("--golden", action="store_true", help="the recorded cases")
    parser.add_argument("--write", action="store_true", help="record --golden anew")
    parser.add_argument("--table", action="store_true", help="the README's table")
    options, rest = parser.parse_known_args(argv)
    if (options.config is not None) + options.golden + options.table != 1:
        raise ValueError("Give one of --config FILE, --golden and --table.")
    if options.table:
        table(MACHINES)
        return
    if options.golden:
        document = {versions() or "compilers missing": golden()}
        text = json.dumps(document, indent=1, sort_keys=True) + "\n"
        if options.write:
            GOLDEN.write_text(text)
        print(text, end="")
        return
    for found in estimates([options.config, *rest], options.on.split(",")):
        show(found, Console(width=160))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as mistake:
        sys.exit(f"error: {mistake}")
