"""Watches a run without labels: neighbours, a linear model and rank of its features."""

import dataclasses
from typing import Any

import numpy as np

from big_vision_lite.evaluators import features
from big_vision_lite.evaluators.features import Features
from big_vision_lite.evaluators.fewshot import L2_GRID
from big_vision_lite.evaluators.knn import knn_accuracy, rankme
from big_vision_lite.evaluators.ridge import Ridge
from big_vision_lite.runs import controls
from big_vision_lite.runs.class_pairs import class_table
from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runs.scores import check_fields
from big_vision_lite.types import Op, Runner, Source

# Share of the training images on which the penalty of the linear model is chosen.
VALIDATION_SHARE = 0.2
SEED = 0


@dataclasses.dataclass(kw_only=True)
class OnlineProbe:
    """Accuracies of frozen features on a small labelled set, while a run goes on.

    Scores: "knn/accuracy" (the `neighbours` nearest, weighted as in DINOv2),
    "linear/accuracy" (ridge regression with the penalty of 2^-6..2^12 that a fifth of
    `train` chooses, then fitted to all), "rankme" of the features of `train` (the
    number of directions they fill), unreadable. Each accuracy stands beside those of
    raw pixels and of the untrained network, computed once per run. A few thousand
    images do; `train` fits into memory. `preprocess` None uses the recipe's; `output`
    names the features as in FewShot. For a curve, not for a table: FewShot has seeds.
    """

    train: Source
    test: Source
    preprocess: tuple[Op, ...] | None = None
    neighbours: int = 20
    output: str = ""
    every_steps: int = 1000
    batch_size: int = 256
    controls: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.neighbours < 1:
            raise ValueError(
                f"OnlineProbe(neighbours={self.neighbours}): use at least 1; 20 is "
                "usual."
            )

    def prepare(self, context: Context) -> Runner:
        ops = context.preprocess if self.preprocess is None else self.preprocess
        names = tuple(self.train.class_names)
        for what, source in (("train", self.train), ("test", self.test)):
            context.check_set(source, self.batch_size, what=what)
        table = class_table(
            tuple(self.test.class_names),
            names,
            name=f"{context.name} test",
            ours_is=f"{context.name} train",
        )
        if table.message is not None:
            context.log(table.message)
        of_model = context.make_backbone_step(
            features.of_model(context.backbone, self.output)
        )
        of_pixels = context.make_eval_step(features.raw_pixels)
        for source in (self.train, self.test):
            features.check(context, of_model, source, ops, self.batch_size)

        def extract(step: Any, state: Any) -> tuple[Features, Features]:
            train, test = (
                features.extract(context, step, state, source, ops, self.batch_size)
                for source in (self.train, self.test)
            )
            test.labels = table.indices[test.labels]
            return train, test

        def score(step: Any, state: Any, kind: str) -> dict[str, float]:
            train, test = extract(step, state)
            found = self._accuracies(train, test, len(names))
            scores = {f"{probe}/{kind}": value for probe, value in found.items()}
            if kind == "accuracy":
                scores["rankme"] = rankme(train.vectors)
                scores["unreadable"] = float(train.unreadable + test.unreadable)
            return scores

        def control_scores(state: Any) -> dict[str, float]:
            pixels = score(of_pixels, state, "control_raw_pixels")
            untrained = score(of_model, context.untrained_state(), "control_untrained")
            return pixels | untrained

        protocol = {
            "train": self.train.fingerprint,
            "test": self.test.fingerprint,
            "preprocess": repr(ops),
            "neighbours": self.neighbours,
            "output": self.output,
            "raw_pixels_side": features.RAW_PIXELS_SIDE,
            "model": repr(context.model),
            "seed": context.seed,
        }

        def run(state: Any) -> dict[str, float]:
            scores = score(of_model, state, "accuracy")
            if self.controls:
                scores |= controls.once(
                    context, protocol, lambda: control_scores(state)
                )
            return scores

        return run

    def _accuracies(
        self, train: Features, test: Features, num_classes: int
    ) -> dict[str, float]:
        x, y = train.vectors, train.labels
        order = np.random.default_rng(SEED).permutation(len(y))
        held = order[: round(VALIDATION_SHARE * len(y))]
        kept = order[len(held) :]
        # Ties go to the larger penalty.
        l2 = L2_GRID[-1]
        if len(held):
            chosen = Ridge(x[kept], y[kept], num_classes)
            accuracies = chosen.accuracies(x[held], y[held], L2_GRID)
            l2 = max(zip(accuracies, L2_GRID, strict=True))[1]
        linear = Ridge(x, y, num_classes)
        return {
            "knn": knn_accuracy(
                x, y, test.vectors, test.labels, num_classes, self.neighbours
            ),
            "linear": float(linear.accuracies(test.vectors, test.labels, [l2])[0]),
        }
