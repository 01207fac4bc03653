"""Predicts classes of images: `python -m big_vision_lite.predict --workdir RUN ...`.

  ... --images FOLDER --out preds.csv [--embed features.npz]

RUN is a run folder, a checkpoints folder, one step folder, or weights of another
library (file, folder with config.json, hub:organisation/name); no recipe is needed.

Every image has a row in preds.csv; one that cannot be read says why under "error". The
file is UTF-8: bytes of a name that are not, and a % before two hexadecimal digits, are
written as %XX; urllib.parse.unquote_to_bytes(row["file"]) is the name in bytes.
"""

import argparse
import dataclasses
import io
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import Float32, Int32
from rich.console import Console
from rich.table import Table
from rich.text import Text

from big_vision_lite.data.sources.files import Guarded, ImageFiles
from big_vision_lite.recipes import command_line
from big_vision_lite.runs import inference, load
from big_vision_lite.runs.saved_run import SavedRun
from big_vision_lite.runtime import files, startup
from big_vision_lite.runtime.startup import Platform

SHOWN_ROWS = 5


@dataclasses.dataclass(kw_only=True)
class Predictions:
    """Outputs for N files, in order; rows of unreadable files (see `errors`) are zeros.

    `classes` [N, K] are labels, most probable first, with their `probabilities` [N, K];
    a regression has `numbers` [N, C] in place of both. `features` [N, D] are the pooled
    features. Outputs not requested are None. `errors`
    maps a file to the reason why it could not be read.
    """

    files: tuple[str, ...]
    errors: dict[str, str]
    classes: Int32[np.ndarray, "N K"] | None = None
    probabilities: Float32[np.ndarray, "N K"] | None = None
    numbers: Float32[np.ndarray, "N C"] | None = None
    features: Float32[np.ndarray, "N D"] | None = None


def table_of(found: Predictions, class_names: Sequence[str]) -> list[list[str]]:
    """Returns one row of text per file, after a row of column names."""
    if found.numbers is not None:
        return _table_of_numbers(found, found.numbers, class_names)
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


def _table_of_numbers(
    found: Predictions, numbers: Float32[np.ndarray, "N C"], names: Sequence[str]
) -> list[list[str]]:
    titles = names or [f"output_{index}" for index in range(numbers.shape[1])]
    rows = [["file", *titles, "error"]]
    for file, values in zip(found.files, numbers, strict=True):
        error = found.errors.get(file, "")
        texts = ["" if file in found.errors else str(value) for value in values]
        rows.append([file, *texts, error])
    return rows


def _class_name(label: int, class_names: Sequence[str]) -> str:
    # Foreign weights may lack class names.
    return class_names[label] if class_names else f"class_{label}"


def write_csv(path: epath.Path, rows: Sequence[Sequence[str]]) -> None:
    """Writes rows as UTF-8 CSV, atomically."""
    files.replace(path, files.csv_text(rows))


def write_features(path: epath.Path, found: Predictions) -> None:
    """Writes an npz of the readable images: `files` [N], `features` [N, D] float32."""
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
    """Prints the first rows with their most probable class, or their first number."""
    first = rows[0][1]
    of_classes = first == "class_1"
    titles = ("class", "probability") if of_classes else (_printable(first),)
    table = Table("file", *titles, "error")
    for file, *middle, error in rows[1 : SHOWN_ROWS + 1]:
        texts = [_printable(middle[0])] if of_classes else []
        number = middle[len(texts)]
        texts += [f"{float(number):.3f}" if number else ""]
        table.add_row(*map(Text, (_printable(file), *texts, error)))
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
    """Returns predictions for all images, preprocessed as in the run's evaluations.

    They hold the `top` classes (0: none) and, with `embed`, the pooled features. The
    averaged parameters (EMA) are used if the run has them.

    Raises:
        ValueError: no image can be read, preprocessing yields different sizes, or
            classes are requested from a model without a head.
    """
    guarded = Guarded(images, run.config.preprocess)
    steps = inference.make_steps(run, classes=top, features=embed, log=log)
    found = inference.run_steps(run, steps, guarded, batch_size, hidden=quiet or None)
    errors = {images.files[i]: reason for i, reason in sorted(guarded.errors.items())}
    return Predictions(files=images.files, errors=errors, **found)


def _outputs(options: argparse.Namespace) -> list[epath.Path | None]:
    """Checks before any work that the files can be written; raises OSError if not."""
    found = [p and files.absolute(p) for p in (options.out, options.embed)]
    if None not in found and found[0] == found[1]:
        raise ValueError(
            f"--out and --embed are both {found[0]}; name a file for each, such as "
            "preds.csv and features.npz."
        )
    for path in found:
        if path is not None:
            files.check_output(path)
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line of predict."""
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
    add("--part", default="", help="of a file with several models one: teacher")
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
    out, embed = _outputs(options)
    images = ImageFiles(options.images)
    place = load.locate(options.workdir, part=options.part)
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
    for line in images.left_out.lines(str(images.root), faults=False):
        print(f"left out: {line}")
    where = " and ".join(str(path) for path in (out, embed) if path is not None)
    print(
        f"{len(images) - len(found.errors)} images of {images.root} -> {where}, in "
        f"{seconds:.1f} s ({len(images) / seconds:,.1f} img/s, compilation included) "
        f"on {run.mesh.size} {jax.local_devices()[0].device_kind}"
    )


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv))
