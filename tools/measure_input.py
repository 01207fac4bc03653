"""Measures how fast images become batches, and where the time goes; trains nothing.

  python tools/measure_input.py --config configs/fashion_mnist.py
  python tools/measure_input.py --folder DIR --size 224 --batch_size 64
  python tools/measure_input.py --tfds fashion_mnist --size 28 --threads 1 2 4

One row for each number of threads: images a second, images per CPU-second of the whole
process tree (what to compare, it hardly depends on other programs), time to the first
batch. Then the CPU time of each stage. Read everything once before (a second run), or
the disk is what is measured.
"""

import argparse
import dataclasses
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence

# Batches end on the CPU: the way to an accelerator is no part of this.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from rich.console import Console
from rich.table import Table

from big_vision_lite.data import pipeline
from big_vision_lite.data.ops import DecodeInceptionCrop, FlipLeftRight
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import ImageFolder, Tfds
from big_vision_lite.data.workers import resolve_threads
from big_vision_lite.recipes import command_line
from big_vision_lite.runtime import sharding


@dataclasses.dataclass(kw_only=True)
class Measured:
    """What one setting cost."""

    threads: int
    images_per_second: float
    images_per_cpu_second: float
    first_batch_seconds: float
    stages: dict[str, tuple[float, int]]


def measure(stream: Stream, seconds: float, seed: int = 0) -> Measured:
    """Makes batches for about `seconds`, after the first few."""
    mesh = sharding.make_mesh(sharding.Mesh(), devices=jax.devices()[:1])
    start = time.perf_counter()
    with pipeline.open_batches(stream, seed, mesh) as batches:
        iterator = batches.starting_at(1)
        jax.block_until_ready(next(iterator))
        first = time.perf_counter() - start
        # What was made ahead of the clock would count as free.
        for _ in range(4):
            next(iterator)
        start, cpu, count = time.perf_counter(), tree_cpu_seconds(), 0
        while count < 2 or time.perf_counter() - start < seconds:
            jax.block_until_ready(next(iterator))
            count += 1
        wall = time.perf_counter() - start
        cpu = tree_cpu_seconds() - cpu
        return Measured(
            threads=batches.threads,
            images_per_second=count * stream.batch_size / wall,
            images_per_cpu_second=count * stream.batch_size / cpu,
            first_batch_seconds=first,
            stages=batches.stages(),
        )


def tree_cpu_seconds() -> float:
    """Returns user and system time of this process and its worker processes."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        try:
            with open(f"/proc/{child.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        # proc(5): utime and stime are fields 14 and 15, the first here is field 3.
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def stream_of(arguments: argparse.Namespace, rest: Sequence[str]) -> Stream:
    """Returns the data of a recipe, a folder or a prepared set.

    Raises:
        ValueError: none or several of them were given.
    """
    recipe = any(argument.startswith("--config") for argument in rest)
    if rest and not recipe:
        raise ValueError(f"What is {rest[0]!r}? See --help.")
    if [recipe, arguments.folder is not None, arguments.tfds is not None].count(
        True
    ) != 1:
        raise ValueError("Give one of --config FILE, --folder DIR and --tfds NAME.")
    if recipe:
        command = command_line.parse([sys.argv[0], *rest], lambda flags: None)
        stream = command.config.data
    else:
        if arguments.folder is not None:
            source = ImageFolder(path=arguments.folder, split=arguments.split)
        else:
            source = Tfds(
                dataset=arguments.tfds,
                split=arguments.split,
                data_dir=arguments.data_dir,
            )
        ops = (DecodeInceptionCrop(size_px=arguments.size), FlipLeftRight())
        stream = Stream(source=source, ops=ops, batch_size=64)
    if arguments.batch_size is not None:
        stream = dataclasses.replace(stream, batch_size=arguments.batch_size)
    return dataclasses.replace(stream, processes=arguments.processes)


def show(stream: Stream, rows: Sequence[Measured], console: Console) -> None:
    """Prints the table of all settings and the cost of each stage."""
    workers = f", {stream.processes} processes" if stream.processes else ""
    table = Table(title=f"{stream.batch_size} images a batch{workers}")
    for name in (
        "threads",
        "images/s",
        "images/CPU-second",
        "CPU ms/image",
        "first batch s",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.threads),
            f"{row.images_per_second:,.0f}",
            f"{row.images_per_cpu_second:,.0f}",
            f"{1000 / row.images_per_cpu_second:.3f}",
            f"{row.first_batch_seconds:.2f}",
        )
    console.print(table)
    costs = Table(title="CPU ms of an image, by stage (1 image in 8 is timed)")
    costs.add_column("stage")
    for row in rows:
        costs.add_column(f"{row.threads} threads", justify="right")
    for name in rows[0].stages:
        cells = [row.stages.get(name, (0.0, 0)) for row in rows]
        costs.add_row(name, *(f"{1000 * s / max(n, 1):.3f}" for s, n in cells))
    console.print(costs)


def main(argv: Sequence[str]) -> None:
    """Reads the command line and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="images in DIR/CLASS/ or DIR/SPLIT/CLASS/")
    parser.add_argument("--tfds", help="name of a prepared TFDS set")
    parser.add_argument("--data_dir", help="where the prepared set lies")
    parser.add_argument("--split", default="train")
    parser.add_argument("--size", type=int, default=224, help="pixels of the crop")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--threads", type=int, nargs="+", help="settings to compare")
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each setting")
    arguments, rest = parser.parse_known_args(list(argv[1:]))
    stream = stream_of(arguments, rest)
    settings = arguments.threads or sorted(
        {1, resolve_threads(stream.threads, stream.processes)}
    )
    rows = [
        measure(dataclasses.replace(stream, threads=threads), arguments.seconds)
        for threads in settings
    ]
    show(stream, rows, Console())


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv))
