"""Accuracy over all images and per class, and the loss."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from big_vision_lite.config import MatchClasses
from big_vision_lite.evaluators import average_precision, per_class
from big_vision_lite.evaluators.duplicates import MARK, Marked
from big_vision_lite.objectives.classification import are_tags
from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runs.scores import check_fields
from big_vision_lite.types import Array, Batch, Forward, Logits, Runner, Source

TOP = 5


@dataclasses.dataclass(kw_only=True)
class Classification:
    """Accuracy and loss of the model's "logits" on every image of `source`.

    Scores: accuracy, balanced_accuracy (each class counts alike, see
    `per_class.balanced_scores`), accuracy_top5 (with more than 5 classes), with several
    labels mean_per_class_recall and mean_average_precision (over the classes that an
    image has), loss (of the objective, class weights included), examples and unreadable
    (counts). They do not depend on the number of devices. Labels are matched to the
    model's classes by name, or with match_classes="in_order" by position if both have
    as many. A model whose logits are numbers is refused. With several labels, an image
    counts as correct if the predicted class is among them; images without any label are
    left out. Tags, int [K] padded with -1, are scored by accuracy and loss alone.
    `per_class` writes WORKDIR/<name>_per_class.csv. `duplicates` is a file of
    tools/find_duplicates.py: lower_bound_accuracy then counts every image wrong that
    has a near duplicate in training (arXiv:1805.00932), and with_duplicate
    counts these images.
    """

    source: Source
    every_steps: int = 1000
    batch_size: int = 256
    per_class: bool = True
    match_classes: MatchClasses = MatchClasses.BY_NAME
    duplicates: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def prepare(self, context: Context) -> Runner:
        if context.objective.logits == Logits.NONE:
            raise ValueError(
                f"{context.name}: the outputs of this model are numbers (a regression "
                "or an embedding), no classes, so there is no accuracy. Take FewShot "
                "for its features, or predict for the numbers."
            )
        classes = context.classes(self.source, self.match_classes)
        names = classes.names
        source = self.source
        if self.duplicates is not None:
            source = Marked.read(source, self.duplicates, context.name)

        def judge(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            batch = classes.translate(batch)
            label = batch["label"]
            logits = classes.logits(forward(**context.model.inputs(batch)))
            top = jax.lax.top_k(logits, min(TOP, len(names)))[1]
            # The objective may call the model differently; if it makes the same call,
            # the compiler computes both once.
            losses, _ = context.objective(forward, batch, rng)
            return {
                "loss": losses.astype(jnp.float32),
                "label": label,
                **{n: x for n, x in batch.items() if n == MARK},
                "predicted": top[:, 0],
                **_hits(top, label),
                **average_precision.ranking(context.objective, logits, label),
            }

        step = context.make_eval_step(judge)
        where = (source, context.preprocess, self.batch_size)
        context.check_step(step, *where)

        def run(state: Any) -> dict[str, Any]:
            rows = context.rows(step, state, *where)
            counts = context.counts(self.source, len(rows["loss"]))
            precision = average_precision.precision_scores(
                context.objective, rows, names, context.log
            )
            balanced = per_class.balanced_scores(
                rows, len(names), context.objective.logits
            )
            label = rows["label"]
            if label.ndim == 2:
                present = label >= 0 if are_tags(label) else label > 0
                labelled = present.any(axis=1)
                rows = {name: value[labelled] for name, value in rows.items()}
            examples = len(rows["loss"])
            if not examples:
                raise ValueError(
                    f"{context.name}: not one of {len(self.source)} examples has a "
                    "label; look at them with tools/check_dataset.py."
                )
            if self.per_class and jax.process_index() == 0:
                per_class.write(
                    context.workdir / f"{context.name}_per_class.csv",
                    int(state.step),
                    names,
                    rows["label"],
                    rows["predicted"],
                )
            scores = {"accuracy": int(rows["top1"].sum()) / examples, **balanced}
            if MARK in rows:
                apart = rows["top1"] & ~rows[MARK]
                scores["lower_bound_accuracy"] = int(apart.sum()) / examples
                scores["with_duplicate"] = int(rows[MARK].sum())
            if len(names) > TOP:
                scores["accuracy_top5"] = int(rows["top5"].sum()) / examples
            # fsum is exact, so the batch size cannot matter.
            scores["loss"] = math.fsum(rows["loss"].tolist()) / examples
            return {**scores, **precision, **counts, "examples": examples}

        return run


def _hits(top: Array, label: Array) -> dict[str, Array]:
    if label.ndim == 1:
        hit = top == label[:, None]
    elif are_tags(label):
        hit = (top[:, :, None] == label[:, None, :]).any(axis=2)
    else:
        hit = jnp.take_along_axis(label, top, axis=1) > 0
    return {"top1": hit[:, 0], "top5": hit.any(axis=1)}
