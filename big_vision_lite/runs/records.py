"""Writes metrics to metrics.jsonl, TensorBoard event files and Weights & Biases."""

import contextvars
import importlib.util
import json
import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

# Imported from where they live: `tensorboard.summary` alone costs half a second, and
# its EventFileWriter imports TensorFlow wherever that is installed.
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from big_vision_lite.runtime import files

# Generated when imported, so that type checkers find nothing in them.
_event: Any = event_pb2
_summary: Any = summary_pb2

FILE_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

# A run inside a run (fine-tuning as an evaluator) sends nothing to Weights & Biases,
# which has one run per process: the outer one.
_inside: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "inside_writer", default=False
)


def read_history(workdir: epath.Path) -> list[dict[str, Any]]:
    """Returns the records of a run, oldest first, without a half-written last line.

    Raises:
        ValueError: a line before the last is not a record, so the file was edited.
    """
    path = workdir / FILE_NAME
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:  # no JSON, or no UTF-8
            # The last line is empty, or a record cut short by a kill.
            if number == len(lines):
                continue
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(
                f"{path}, line {number}, is not a record: {line[:60]!r}. Every line "
                'must be a JSON object with a "step"; delete that line.'
            )
        records.append(record)
    return records


class Writer:
    """A writer of metric records; a resumed run continues its files.

    The records are in `workdir/metrics.jsonl`, one JSON object a line, and the same
    in `workdir/tensorboard`. With the wandb package installed and the environment
    variable WANDB_PROJECT set, they also go to Weights & Biases, but not those of a
    Writer inside another one's context. Only process 0 writes.

    Raises:
        OSError: a file cannot be written, for example because the disk is full.
    """

    def __init__(self, workdir: epath.Path):
        self._workdir = workdir
        self._writes = jax.process_index() == 0
        self._records: list[dict[str, Any]] = []
        self._seen: set[tuple[int, str]] = set()
        self._file: files.AppendOnlyFile | None = None
        self._events: _EventFile | None = None
        self._wandb: Any = None

    def __enter__(self) -> "Writer":
        self._remember(read_history(self._workdir))
        if self._writes and not _inside.get():
            self._wandb = _start_wandb(self._workdir)
        self._token = _inside.set(True)
        return self

    def __exit__(self, *_: Any) -> None:
        _inside.reset(self._token)
        self._close()
        if self._wandb is not None:
            self._wandb.finish()

    def resume_at(self, step: int) -> None:
        """Drops the records after `step`, the restored one, or 0 in a new run.

        The file is replaced atomically: a kill leaves the old or the new one.
        """
        self._close()
        kept = [record for record in self._records if record["step"] <= step]
        self._remember(kept)
        if self._writes:
            self._rewrite()
            self._events = self._open(first_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records `metrics` of `step`; values are numbers or scalar arrays.

        Raises:
            ValueError: a value is not finite, and so neither JSON nor a score.
        """
        values = {name: _number(name, step, value) for name, value in metrics.items()}
        for name in values:
            assert (step, name) not in self._seen, f"{name} of step {step} is written"
        record = {"step": step, **values}
        if self._writes:
            if self._events is None:
                self._rewrite()  # a line cut short must not be continued
                self._events = self._open(first_step=None)
            # TensorBoard first: a kill in between repeats a point there, invisibly, and
            # loses none, because metrics.jsonl alone decides what is missing.
            self._events.scalars(step, values)
            self._append(record)
            if self._wandb is not None:
                self._wandb.log(record)
        self._records.append(record)
        self._seen |= _keys(record)

    def recorded(self, step: int, prefix: str) -> bool:
        """Returns whether `prefix` or a name "`prefix`/..." is recorded at `step`."""
        return any(
            s == step and f"{n}/".startswith(f"{prefix}/") for s, n in self._seen
        )

    def latest(self) -> dict[str, float | int]:
        """Returns the newest value of every evaluator's score, by name."""
        scores = {}
        for record in sorted(self._records, key=lambda record: record["step"]):
            names = [n for n in record if "/" in n and not n.startswith("train/")]
            scores |= {name: record[name] for name in names}
        return scores

    def _remember(self, records: list[dict[str, Any]]) -> None:
        self._records = records
        self._seen = set().union(*(_keys(record) for record in records))

    def _rewrite(self, *more: dict[str, Any]) -> None:
        lines = (_line(record) for record in (*self._records, *more))
        path = self._workdir / FILE_NAME
        with files.writing(path):
            self._workdir.mkdir(parents=True, exist_ok=True)
            files.replace(path, b"".join(lines))

    def _append(self, record: dict[str, Any]) -> None:
        if self._file is None:
            # Object stores cannot append, so every record replaces the file.
            self._rewrite(record)
        else:
            self._file.add(_line(record))

    def _open(self, first_step: int | None) -> "_EventFile":
        if not files.is_remote(self._workdir):
            self._file = files.AppendOnlyFile(self._workdir / FILE_NAME)
        return _EventFile(self._workdir / TENSORBOARD_FOLDER, first_step)

    def _close(self) -> None:
        if self._events is not None:
            self._events.close()
        if self._file is not None:
            self._file.close()
        self._events = self._file = None


class _EventFile:
    """A TensorBoard event file: framed protocol buffers, written at every record."""

    def __init__(self, folder: epath.Path, first_step: int | None):
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names; nanoseconds keep the
        # order of two runs within one second.
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9:010d}.{now % 10**9:09d}"
        path = folder / f"{name}.{socket.gethostname()}.{os.getpid()}"
        self._path = path
        self._content = b""
        self._file = None if files.is_remote(folder) else files.AppendOnlyFile(path)
        self._add(_event.Event(file_version="brain.Event:2"))
        if first_step is not None:
            # START makes TensorBoard forget what a killed run wrote from there on.
            start = _event.SessionLog(status=_event.SessionLog.START)
            self._add(_event.Event(step=first_step, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        summary = _summary.Summary(
            value=[
                _summary.Summary.Value(tag=name, simple_value=value)
                for name, value in values.items()
            ]
        )
        self._add(_event.Event(step=step, summary=summary))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        header = struct.pack("<Q", len(data))
        framed = (
            header
            + struct.pack("<I", masked_crc32c(header))
            + data
            + struct.pack("<I", masked_crc32c(data))
        )
        if self._file is None:
            self._content += framed
            with files.writing(self._path):
                self._path.write_bytes(self._content)
        else:
            self._file.add(framed)


def _line(record: Mapping[str, Any]) -> bytes:
    # Python writes the shortest digits that read back as the same float.
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _keys(record: Mapping[str, Any]) -> set[tuple[int, str]]:
    return {(record["step"], name) for name in record if name != "step"}


def _number(name: str, step: int, value: Any) -> float | int:
    assert name != "step", "step is no metric"
    number = value if isinstance(value, int | float) else value.item()
    number = int(number) if isinstance(number, bool) else number
    if not math.isfinite(number):
        raise ValueError(
            f"{name} is {number} at step {step}; only finite numbers are recorded. "
            "Lower the learning rate, or evaluate an earlier checkpoint."
        )
    return number


def _start_wandb(workdir: epath.Path) -> Any:
    if not os.environ.get("WANDB_PROJECT"):
        return None
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"WANDB_PROJECT={os.environ['WANDB_PROJECT']} asks for Weights & Biases, "
            "which is not installed: pip install wandb, or unset WANDB_PROJECT."
        )
    wandb: Any = importlib.import_module("wandb")
    identity = workdir / "wandb_id.txt"
    if not identity.exists():
        with files.writing(identity):
            workdir.mkdir(parents=True, exist_ok=True)
            files.replace(identity, wandb.util.generate_id().encode())
    run = wandb.init(id=identity.read_text(), resume="allow")
    # wandb's own counter may not go back; ours does when a resumed run repeats steps.
    run.define_metric("*", step_metric="step")
    return run
