"""Accuracy over all images and per class, and the loss."""

import csv
import dataclasses
import enum
import io
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runs.labels import ClassTable, class_table
from big_vision_lite.runtime import files
from big_vision_lite.types import Array, Batch, Forward, Runner, Source

TOP = 5
COLUMNS = ("step", "class", "count", "correct", "accuracy")


class MatchClasses(enum.StrEnum):
    """The matching of a source's labels to the model's classes."""

    BY_NAME = "by_name"
    # For the same classes under other names ("tench", "n01440764").
    IN_ORDER = "in_order"


@dataclasses.dataclass(kw_only=True)
class Classification:
    """Accuracy and loss of the model's "logits" on every image of `source`.

    Scores: accuracy, accuracy_top5 (with more than 5 classes), loss (of the objective),
    examples and unreadable (counts). They do not depend on the number of devices.
    Labels are matched to the model's classes by name, or with
    match_classes="in_order" by position if both have as many. With several labels, an
    image counts as correct if the predicted class is among them; images without any
    label are left out. `per_class` writes WORKDIR/<name>_per_class.csv.
    """

    source: Source
    every_steps: int = 1000
    batch_size: int = 256
    per_class: bool = True
    match_classes: MatchClasses = MatchClasses.BY_NAME

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.every_steps < 0:
            raise ValueError(
                f"Classification(every_steps={self.every_steps}, batch_size="
                f"{self.batch_size}): batch_size starts at 1, every_steps at 1, and 0 "
                "switches the evaluator off."
            )

    def prepare(self, context: Context) -> Runner:
        context.check_set(self.source, self.batch_size)
        names = context.class_names or self.source.class_names
        table = self._table(names, context.name)
        if table.message is not None:
            context.log(table.message)
        indices = None if table.is_identity else jnp.asarray(table.indices)

        def judge(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            label = translate(batch["label"], indices, len(names))
            batch = {**batch, "label": label}
            outputs = forward(**context.model.inputs(batch))
            logits = _logits(outputs, len(names), context.name)
            top = jax.lax.top_k(logits, min(TOP, len(names)))[1]
            # The objective may call the model differently; if it makes the same call,
            # the compiler computes both once.
            losses, _ = context.objective(forward, batch, rng)
            return {
                "loss": losses.astype(jnp.float32),
                "label": label,
                "predicted": top[:, 0],
                **_hits(top, label),
            }

        step = context.make_eval_step(judge)
        context.check_step(step, self.source, context.preprocess, self.batch_size)

        def run(state: Any) -> dict[str, float]:
            read = list(
                context.rows(
                    step, state, self.source, context.preprocess, self.batch_size
                )
            )
            rows = {n: np.concatenate([r[n] for r in read]) for n in read[0]}
            num_read = len(rows["loss"])
            if rows["label"].ndim == 2:
                labelled = (rows["label"] > 0).any(axis=1)
                rows = {name: value[labelled] for name, value in rows.items()}
            examples = len(rows["loss"])
            if not examples:
                raise ValueError(
                    f"{context.name}: not one of {len(self.source)} images could be "
                    "read and has a label; look at them with tools/check_dataset.py."
                )
            if self.per_class and jax.process_index() == 0:
                _write_per_class(
                    context.workdir / f"{context.name}_per_class.csv",
                    int(state.step),
                    names,
                    rows["label"],
                    rows["predicted"],
                )
            unreadable = len(self.source) - num_read
            if unreadable:
                context.log(
                    f"{context.name}: {unreadable} of {len(self.source)} images are "
                    "unreadable and not counted; tools/check_dataset.py lists them."
                )
            scores = {"accuracy": int(rows["top1"].sum()) / examples}
            if len(names) > TOP:
                scores["accuracy_top5"] = int(rows["top5"].sum()) / examples
            return scores | {
                # fsum is exact, so the batch size cannot matter.
                "loss": math.fsum(rows["loss"].tolist()) / examples,
                "examples": float(examples),
                "unreadable": float(unreadable),
            }

        return run

    def _table(self, names: Sequence[str], name: str) -> ClassTable:
        option = f"--config.evaluators.{name}.match_classes=in_order"
        theirs = self.source.class_names
        if self.match_classes == MatchClasses.BY_NAME:
            return class_table(
                theirs,
                names,
                name=name,
                ours_is="train",
                # In order only works with as many classes as the model has.
                in_order=option if len(theirs) == len(names) else None,
            )
        if len(theirs) != len(names):
            raise ValueError(
                f"{name} has {len(theirs)} classes, train {len(names)}: in order they "
                f"do not match; use {option.replace('in_order', 'by_name')}."
            )
        return ClassTable(indices=np.arange(len(names), dtype=np.int32), message=None)


def translate(label: Array, indices: Array | None, num_classes: int) -> Array:
    """Returns a source's labels [B] or [B, C] in the model's class order."""
    if label.ndim == 1:
        return label if indices is None else indices[label]
    if indices is None:
        return label
    empty = jnp.zeros((label.shape[0], num_classes), label.dtype)
    return empty.at[:, indices].set(label)


def _hits(top: Array, label: Array) -> dict[str, Array]:
    if label.ndim == 1:
        hit = top == label[:, None]
    else:
        hit = jnp.take_along_axis(label, top, axis=1) > 0
    return {"top1": hit[:, 0], "top5": hit.any(axis=1)}


def _logits(outputs: dict[str, Any], num_classes: int, name: str) -> Array:
    logits = outputs["logits"].astype(jnp.float32)
    if logits.shape[-1] != num_classes:
        raise ValueError(
            f"{name}: the model has {logits.shape[-1]} logits, but there are "
            f"{num_classes} classes; give its head as many outputs as there are "
            "classes."
        )
    return logits


def _write_per_class(
    path: epath.Path,
    step: int,
    names: tuple[str, ...],
    labels: np.ndarray,
    predicted: np.ndarray,
) -> None:
    """Appends the rows of `step`; drops those of it or later that a killed run left."""
    if labels.ndim == 2:
        count = (labels > 0).sum(axis=0)
        hit = labels[np.arange(len(predicted)), predicted] > 0
    else:
        count = np.bincount(labels, minlength=len(names))
        hit = labels == predicted
    correct = np.bincount(predicted[hit], minlength=len(names))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    if path.exists():
        old = list(csv.reader(io.StringIO(path.read_text())))[1:]
        writer.writerows(row for row in old if int(row[0]) < step)
    for name, n, c in zip(names, count.tolist(), correct.tolist(), strict=True):
        writer.writerow((step, name, n, c, c / n if n else ""))
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, text.getvalue().encode())
