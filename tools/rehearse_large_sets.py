"""Makes data sets as large as ImageNet-21k, of tiny images, and measures their opening.

  python tools/rehearse_large_sets.py tfrecord --out DIR
  python tools/rehearse_large_sets.py array_record --out DIR --records 13000000
  python tools/rehearse_large_sets.py folder --out DIR --records 1000000

What is slow or large in a set of many records shows without their pixels: images are
8x8, the files of a folder are links to few of them. Every measurement runs in a new
process that may open 1,024 files, the limit of most systems; memory is what that
process took since it began, with the set still closed. The labels of every batch are
compared with what was written. The set stays in DIR.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# Batches end on the CPU: the way to an accelerator is no part of this.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cv2
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from big_vision_lite.data import pipeline
from big_vision_lite.data.batches import Order
from big_vision_lite.data.ops import Decode
from big_vision_lite.data.sources import ImageFolder, Tfds
from big_vision_lite.data.sources.tfds.example import encode_example
from big_vision_lite.data.sources.tfds.prepared_set import FILE_TEMPLATE, shard_file
from big_vision_lite.recipes import command_line
from big_vision_lite.runtime import sharding

NAME, CLASSES, FOLDERS = "rehearsal", 21_841, 1_000
BATCH_SIZE = 1_024
FAR_STEP = 1_000_000
# What most systems let a process open at first.
OPEN_FILES = 1_024
PACKAGE = "tensorflow_datasets.core.features"
FEATURES = {
    "image": {
        "pythonClassName": f"{PACKAGE}.image_feature.Image",
        "image": {"dtype": "uint8", "encodingFormat": "png"},
    },
    "label": {
        "pythonClassName": f"{PACKAGE}.class_label_feature.ClassLabel",
        "classLabel": {"numClasses": str(CLASSES)},
    },
}


def image_of(number: int) -> bytes:
    """Returns a PNG of 8x8 pixels, one of 64."""
    pixels = np.random.default_rng(number % 64).integers(0, 256, (8, 8), np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


# Making a set.


def make(kind: str, out: Path, records: int, shards: int) -> None:
    """Writes the set of this kind below `out`."""
    if kind == "folder":
        make_folder(out / kind, records)
    else:
        make_prepared(out / kind / NAME / "1.0.0", kind, records, shards)


def make_prepared(folder: Path, kind: str, records: int, shards: int) -> None:
    """Writes a prepared TFDS set; the images go round, and the labels."""
    folder.mkdir(parents=True)
    # As many different records as classes, so that a set is written in minutes.
    distinct = [
        encode_example({"image": image_of(label), "label": label})
        for label in range(CLASSES)
    ]
    if kind == "tfrecord":
        distinct = [_framed(record) for record in distinct]
    bounds = [records * shard // shards for shard in range(shards + 1)]
    num_bytes = 0
    for shard in range(shards):
        name = shard_file(FILE_TEMPLATE, NAME, "train", kind, shard, shards)
        rows = (distinct[n % CLASSES] for n in range(bounds[shard], bounds[shard + 1]))
        num_bytes += _write_shard(folder / name, kind, rows)
    split = {
        "name": "train",
        "shardLengths": [str(b - a) for a, b in zip(bounds, bounds[1:], strict=False)],
        "numBytes": str(num_bytes),
        "filepathTemplate": FILE_TEMPLATE,
    }
    features = {
        "pythonClassName": f"{PACKAGE}.features_dict.FeaturesDict",
        "featuresDict": {"features": FEATURES},
    }
    (folder / "features.json").write_text(json.dumps(features))
    info = {"name": NAME, "version": folder.name, "fileFormat": kind, "splits": [split]}
    # Last: a set with this file is whole.
    (folder / "dataset_info.json").write_text(json.dumps(info))


def _write_shard(path: Path, kind: str, rows: Iterable[bytes]) -> int:
    """Writes one file and returns the bytes of its records, as TFDS counts them."""
    if kind == "tfrecord":
        data = list(rows)
        path.write_bytes(b"".join(data))
        return sum(map(len, data)) - 16 * len(data)
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    num_bytes = 0
    for row in rows:
        writer.write(row)
        num_bytes += len(row)
    writer.close()
    return num_bytes


def _framed(record: bytes) -> bytes:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    length = struct.pack("<Q", len(record))
    sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, record))
    return length + next(sums) + record + next(sums)


def make_folder(folder: Path, records: int) -> None:
    """Writes a folder of classes; its files are links to few images."""
    images = folder.with_name("images")
    images.mkdir()
    # A file has at most 65,000 names on most systems.
    different = max(64, records // 50_000)
    for number in range(different):
        (images / str(number)).write_bytes(image_of(number))
    for record in range(records):
        path = folder / f"{record % FOLDERS:04d}" / f"{record:08d}.png"
        if record < FOLDERS:
            path.parent.mkdir(parents=True)
        os.link(images / str(record % different), path)


# Measuring it, each time in a new process.


@dataclasses.dataclass(kw_only=True)
class Cost:
    """What one thing cost a process: seconds, memory since the start, open files."""

    what: str
    seconds: float
    megabytes: float
    peak_megabytes: float
    open_files: int


class Meter:
    """Measures what follows one another in this process."""

    def __init__(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, OPEN_FILES), hard))
        self.costs: list[Cost] = []
        self._before, self._peak = _own_megabytes(), _peak_megabytes()

    def measure(self, what: str, run: Callable[[], Any]) -> Any:
        """Runs it and notes its time, and what the process holds since the start."""
        start = time.perf_counter()
        result = run()
        self.costs.append(
            Cost(
                what=what,
                seconds=time.perf_counter() - start,
                megabytes=_own_megabytes() - self._before,
                peak_megabytes=_peak_megabytes() - self._peak,
                open_files=len(os.listdir("/proc/self/fd")),
            )
        )
        return result


def _own_megabytes() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("proc(5): every process has RssAnon")


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def open_source(kind: str, out: str) -> Tfds | ImageFolder:
    """Returns the set, not yet opened."""
    if kind == "folder":
        return ImageFolder(path=f"{out}/folder")
    return Tfds(dataset=NAME, data_dir=f"{out}/{kind}")


def look(kind: str, out: str, records: int, shards: int) -> list[Cost]:
    """Opens the set, makes batches near and far, then reads of every file."""
    source = open_source(kind, out)
    first_batch(ImageFolder(path=_tiny_folder(out)), 1)  # threads, compiled code
    meter = Meter()
    count = meter.measure("open", lambda: len(source))
    # A tenth of a folder is held out.
    if count != (records if kind != "folder" else round(0.9 * records)):
        raise ValueError(f"{count} examples of {records}")
    meter.measure("fingerprint", lambda: source.fingerprint)
    for step in (FAR_STEP, 1):
        batch = meter.measure(
            f"batch of step {step:,}", lambda s=step: first_batch(source, s)
        )
        check_labels(batch, range(BATCH_SIZE), step, source)
    every = [count * shard // shards for shard in range(shards)]
    meter.measure("a record of every file", lambda: [source[row] for row in every])
    return meter.costs


def _tiny_folder(out: str) -> str:
    folder = Path(out) / "tiny"
    for number in range(2 * BATCH_SIZE):
        path = folder / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_of(number))
    return str(folder)


def first_batch(source: Tfds | ImageFolder, step: int) -> dict[str, np.ndarray]:
    """Returns "label" and "row", the place in the batch, of what this process holds."""
    mesh = sharding.make_mesh(sharding.Mesh())
    stream = pipeline.Stream(
        source=source, ops=(Decode(channels=1),), batch_size=BATCH_SIZE
    )
    with pipeline.open_batches(stream, 0, mesh) as batches:
        batch = next(batches.starting_at(step))
    shards = sorted(batch["label"].addressable_shards, key=lambda s: s.index[0].start)
    return {
        "label": np.concatenate([shard.data for shard in shards]),
        "row": np.concatenate([np.arange(BATCH_SIZE)[s.index] for s in shards]),
    }


def check_labels(
    batch: dict[str, np.ndarray], rows: range, step: int, source: Tfds | ImageFolder
) -> None:
    """Raises ValueError unless the batch has these rows, and the labels written."""
    first = (step - 1) * BATCH_SIZE
    chosen = Order(len(source), 0).indices([first + row for row in rows])
    if isinstance(source, Tfds):
        expected = [index % CLASSES for index in chosen]
    else:
        expected = [int(source.relative_path(index).split("/")[0]) for index in chosen]
    if batch["row"].tolist() != list(rows) or batch["label"].tolist() != expected:
        raise ValueError(f"the batch of step {step} holds other examples")


def look_of_two(process: int, port: int, kind: str, out: str) -> Cost:
    """Makes this process's half of the batch of a far step, as one of two hosts."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    source, meter = open_source(kind, out), Meter()
    batch = meter.measure(
        f"host {process} of 2: open, its rows of step {FAR_STEP:,}",
        lambda: first_batch(source, FAR_STEP),
    )
    half = BATCH_SIZE // 2
    rows = range(process * half, (process + 1) * half)
    check_labels(batch, rows, FAR_STEP, source)
    jax.distributed.shutdown()
    return meter.costs[0]


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def in_new_processes(count: int) -> concurrent.futures.ProcessPoolExecutor:
    """Returns a pool of processes that share nothing with this one."""
    return concurrent.futures.ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn")
    )


def measurements(options: argparse.Namespace) -> Iterator[Cost]:
    """Yields the costs of the set, opened by one process, then by two hosts."""
    kind, out, records = options.kind, options.out, options.records
    with in_new_processes(1) as pool:
        files = records if kind == "folder" else options.shards
        yield from pool.submit(look, kind, out, records, min(files, 10_000)).result()
    with in_new_processes(2) as pool:
        port = free_port()
        hosts = [pool.submit(look_of_two, each, port, kind, out) for each in range(2)]
        for host in hosts:
            yield host.result()


def main(argv: list[str]) -> None:
    """Makes the set if it is not there, measures, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("tfrecord", "array_record", "folder"))
    parser.add_argument("--out", required=True, help="folder of the sets")
    parser.add_argument("--records", type=int, help="13,000,000; 1,000,000 of a folder")
    parser.add_argument("--shards", type=int, default=1024, help="of a prepared set")
    options = parser.parse_args(argv[1:])
    if options.records is None:
        options.records = 1_000_000 if options.kind == "folder" else 13_000_000
    if not (Path(options.out) / options.kind).exists():
        start = time.perf_counter()
        make(options.kind, Path(options.out), options.records, options.shards)
        Console().print(f"written in {time.perf_counter() - start:.0f} s")
    table = Table(title=f"{options.records:,} records, {options.kind}")
    for name in ("", "seconds", "MB", "MB at the peak", "open files"):
        table.add_column(name, justify="right" if name else "left")
    for cost in measurements(options):
        table.add_row(
            cost.what,
            f"{cost.seconds:.2f}",
            f"{cost.megabytes:.0f}",
            f"{cost.peak_megabytes:.0f}",
            str(cost.open_files),
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv))
