"""Names what is on images: `python -m big_vision_lite.predict --workdir RUN ...`.

  ... --images FOLDER --out preds.csv [--embed features.npz]

RUN is a run folder, a checkpoints folder, one step folder, or weights of another
library (file, folder with config.json, hub:organisation/name); no recipe is needed.
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float32, Int32
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from big_vision_lite.data import pipeline
from big_vision_lite.data.sources.files import Guarded, ImageFiles
from big_vision_lite.data.sources.listing import SUFFIXES
from big_vision_lite.recipes import command_line
from big_vision_lite.runs import load
from big_vision_lite.runs.saved_run import SavedRun
from big_vision_lite.runtime import files, startup
from big_vision_lite.runtime.startup import Platform
from big_vision_lite.training import step as step_lib
from big_vision_lite.types import (
    Array,
    Batch,
    Forward,
    Model,
    Objective,
    backbone_of,
)

SHOWN_ROWS = 5


@dataclasses.dataclass(kw_only=True)
class Predictions:
    """One row a file, in order, zeros where `errors` says why it could not be read.

    `classes` [N, K] are labels, the most probable first, `probabilities` [N, K] theirs,
    `features` [N, D] the pooled vectors; None is what was not asked for.
    """

    files: tuple[str, ...]
    errors: dict[str, str]
    classes: Int32[np.ndarray, "N K"] | None = None
    probabilities: Float32[np.ndarray, "N K"] | None = None
    features: Float32[np.ndarray, "N D"] | None = None


def table_of(found: Predictions, class_names: Sequence[str]) -> list[list[str]]:
    """Returns rows of text, the first being the names of the columns."""
    assert found.classes is not None and found.probabilities is not None
    ranks = range(1, found.classes.shape[1] + 1)
    titles = [(f"class_{rank}", f"probability_{rank}") for rank in ranks]
    rows = [["file", *(title for pair in titles for title in pair), "error"]]
    for file, labels, likely in zip(
        found.files, found.classes, found.probabilities, strict=True
    ):
        # The shortest digits that read back as the same float32.
        pairs = [
            (_class_name(int(label), class_names), str(probability))
            for label, probability in zip(labels, likely, strict=True)
        ]
        if file in found.errors:
            pairs = [("", "")] * len(pairs)
        texts = [text for pair in pairs for text in pair]
        rows.append([file, *texts, found.errors.get(file, "")])
    return rows


def _class_name(label: int, class_names: Sequence[str]) -> str:
    # Weights from elsewhere may come without names.
    return class_names[label] if class_names else f"class_{label}"


def write_csv(path: epath.Path, rows: Sequence[Sequence[str]]) -> None:
    """Writes rows of text as CSV in UTF-8, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    files.replace(path, text.getvalue().encode("utf-8"))


def write_features(path: epath.Path, found: Predictions) -> None:
    """Writes arrays `files` and `features` [N, D] float32 of the readable images."""
    assert found.features is not None
    readable = np.asarray([file not in found.errors for file in found.files])
    content = io.BytesIO()
    np.savez(
        content,
        files=np.asarray(found.files)[readable],
        features=found.features[readable],
    )
    files.replace(path, content.getvalue())


def show(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Prints the first rows, top class only."""
    table = Table("file", "class", "probability", "error")
    for file, *middle, error in rows[1 : SHOWN_ROWS + 1]:
        name, likely = (middle[0], f"{float(middle[1]):.3f}") if middle[0] else ("", "")
        table.add_row(*map(Text, (_printable(file), _printable(name), likely, error)))
    console.print(table)


def _printable(text: str) -> str:
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)


def predict(
    run: SavedRun,
    images: ImageFiles,
    *,
    top: int = 5,
    embed: bool = False,
    batch_size: int = 64,
    quiet: bool = True,
    log: Callable[[str], None] = print,
) -> Predictions:
    """Runs the model on every image once, through the run's own preprocessing.

    Gives the `top` classes (0: none) and, with `embed`, the features. Averaged
    parameters are taken where the run kept some.

    Raises:
        ValueError: not one image can be read, the preprocessing does not give all of
            them one size, or classes are asked of a model without a head.
    """
    num_devices = run.mesh.size
    batch_size = -(-min(batch_size, len(images)) // num_devices) * num_devices
    ops = Guarded(run.config.preprocess)
    batches = pipeline.eval_batches(images, (ops,), batch_size, run.mesh)
    model = run.config.model
    part, backbone = backbone_of(model)
    steps = []
    if top:
        probabilities = meaning_of_logits(run.config.objective, log)

        def classify(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            outputs = forward(**_inputs(model, batch))
            check_head(run, outputs)
            likely = probabilities(outputs["logits"].astype(jnp.float32))
            best = jax.lax.top_k(likely, min(top, likely.shape[-1]))
            rows = {"probabilities": best[0], "classes": best[1]}
            if embed and not part:
                rows["features"] = _features(outputs)
            return rows

        steps.append(_make_step(run, classify, model, ""))
    if embed and (part or not top):

        def represent(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            outputs = forward(**_inputs(backbone, batch))
            return {"features": _features(outputs)}

        steps.append(_make_step(run, represent, backbone, part))
    found: dict[str, np.ndarray] = {}
    with jax.set_mesh(run.mesh), _refusing(images, ops):
        for batch in track(batches, "predicting", transient=True, disable=quiet):
            # Zeros where nothing could be read, whole batches of it included.
            rows = jax.device_get([step(run.state, batch) for step in steps])
            rows = {name: x for found_rows in rows for name, x in found_rows.items()}
            valid = np.asarray(batch["valid"])
            for name, values in rows.items():
                if name not in found:
                    shape = (len(images), *values.shape[1:])
                    found[name] = np.zeros(shape, values.dtype)
                found[name][np.asarray(batch["index"])[valid]] = values[valid]
    errors = {images.files[i]: reason for i, reason in sorted(ops.errors.items())}
    return Predictions(files=images.files, errors=errors, **found)


def _make_step(
    run: SavedRun, function: Any, model: Model, part: str
) -> Callable[..., dict[str, Array]]:
    return step_lib.make_eval_step(
        model,
        function,
        seed=run.config.seed,
        num_steps=int(run.manifest["num_steps"]),
        part=part,
    )


def _inputs(model: Model, batch: Batch) -> dict[str, Any]:
    try:
        return model.inputs(batch)
    except KeyError as error:
        raise ValueError(
            f"{type(model).__name__}.inputs asks for {error}, but predict has images "
            "alone. Let it leave out what the batch has not, or take the features of "
            "its backbone: --embed features.npz without --out."
        ) from error


def _features(outputs: Mapping[str, Any]) -> Array:
    if "pooled" not in outputs:
        raise ValueError(
            f"The model gives {', '.join(sorted(outputs))}; features need "
            '"pooled" [B, D].'
        )
    return outputs["pooled"].astype(jnp.float32)


def check_head(run: SavedRun, outputs: Mapping[str, Any]) -> None:
    """Refuses a model that gives no logits, or not one for each class of the data."""
    if "logits" not in outputs:
        raise ValueError(
            f"The model of {run.folder} has no head, so it names no classes. Write its "
            "features with --embed features.npz and without --out, or give it a head "
            f"by fine-tuning: --config configs/finetune.py:init={run.folder},"
            "data=FOLDER"
        )
    width, count = outputs["logits"].shape[-1], len(run.class_names)
    if run.class_names and width != count:
        raise ValueError(
            f"The model has {width} logits, but {run.folder} names {count} classes."
        )


@contextlib.contextmanager
def _refusing(images: ImageFiles, ops: Guarded) -> Iterator[None]:
    """Says in the words of this program that not one image can be read."""
    try:
        yield
    except ValueError as error:
        if len(ops.errors) < len(images):
            raise
        index, reason = min(ops.errors.items())
        first = images.files[index]
        text = f"{images.root / first} cannot be read: {reason}"
        if len(images) > 1:
            text = (
                f"Not one of {len(images)} images of {images.root} can be read; the "
                f"first is {first}: {reason}"
            )
        raise ValueError(text) from error


def meaning_of_logits(objective: Objective, log: Callable[[str], None]) -> Any:
    """Returns the objective's `probabilities`; says so where softmax stands in."""
    declared = objective.probabilities
    if declared is None:
        log(
            f"{type(objective).__name__} does not say what its logits mean: taken as "
            "one class an image (softmax). If several may be right, give it a method: "
            "def probabilities(self, logits): return jax.nn.sigmoid(logits)"
        )
    return declared or jax.nn.softmax


def _output(path: str | None, flag: str) -> epath.Path | None:
    """Checks before any work that the file can be written."""
    if path is None:
        return None
    given = files.absolute(path)
    if given.is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file in it.")
    given.parent.mkdir(parents=True, exist_ok=True)
    if not files.is_writable(given.parent):
        raise OSError(f"Cannot write {path}: {given.parent} is read-only.")
    return given


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m big_vision_lite.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", required=True, help="run, checkpoints or step folder")
    add("--images", required=True, help="folder of images, at any depth, or one image")
    add("--out", help="CSV file for the classes")
    add("--embed", help="npz file for the pooled features")
    add("--top", type=int, default=5, help="classes a file (default 5)")
    add("--batch_size", type=int, default=64, help="images at a time (default 64)")
    add("--platform", type=Platform, choices=list(Platform), help="device to run on")
    add("--allow_module", action="append", default=[], help="a module of your own")
    options = parser.parse_args(list(argv)[1:])
    if options.out is None and options.embed is None:
        parser.error("nothing to write: add --out preds.csv or --embed features.npz")
    if options.top < 1 or options.batch_size < 1:
        parser.error("--top and --batch_size start at 1")
    return options


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    options = parse(argv)
    out, embed = _output(options.out, "--out"), _output(options.embed, "--embed")
    images = ImageFiles(options.images)
    place = load.locate(options.workdir)
    startup.set_up_to_use(place.platform(), options.platform)
    run = load.load(
        place,
        allowed_modules=options.allow_module,
        devices=jax.local_devices(),
    )
    started = time.perf_counter()
    console = Console()
    found = predict(
        run,
        images,
        top=0 if out is None else options.top,
        embed=embed is not None,
        batch_size=options.batch_size,
        quiet=not console.is_terminal,
    )
    seconds = time.perf_counter() - started
    if embed is not None:
        write_features(embed, found)
    if out is not None:
        rows = table_of(found, run.class_names)
        write_csv(out, rows)
        show(console, rows)
    if found.errors:
        listed = out or "; ".join(f"{f}: {e}" for f, e in found.errors.items())
        print(
            f"warning: {len(found.errors)} of {len(images)} images cannot be read, "
            f"see {listed}"
        )
    if images.skipped:
        print(f"left out, as they are no {'/'.join(SUFFIXES)}: {images.skipped}")
    where = " and ".join(str(path) for path in (out, embed) if path is not None)
    print(
        f"{len(images) - len(found.errors)} images of {images.root} -> {where}, in "
        f"{seconds:.1f} s ({len(images) / seconds:,.1f} img/s, compilation included) "
        f"on {run.mesh.size} {jax.local_devices()[0].device_kind}"
    )


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv))
