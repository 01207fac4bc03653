"""What a model says of many files: as a table, a CSV file, an npz file."""

import csv
import dataclasses
import io
import unicodedata
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float32, Int32
from rich.console import Console
from rich.table import Table
from rich.text import Text

from big_vision_lite import files

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
