"""Few-shot transfer: ridge regression on frozen features of k images per class."""

import dataclasses
from typing import Any

import numpy as np

from big_vision_lite.data.ops import CentralCrop, Decode, Resize
from big_vision_lite.data.sources import Tfds
from big_vision_lite.evaluators import features
from big_vision_lite.evaluators.features import Features
from big_vision_lite.evaluators.ridge import Ridge, shuffled_classes
from big_vision_lite.messages import some
from big_vision_lite.runs import controls
from big_vision_lite.runs.class_pairs import class_table
from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runs.scores import check_fields
from big_vision_lite.types import Op, Runner, Source

L2_GRID = tuple(2.0**power for power in range(-6, 13))
# Validation images per class: those after the k shots in the shuffled list.
VALIDATION_PER_CLASS = 25


@dataclasses.dataclass(kw_only=True)
class FewShotSet:
    """A training pool and a test set; `preprocess=None` uses the recipe's."""

    name: str
    train: Source
    test: Source
    preprocess: tuple[Op, ...] | None = None

    def ops(self, context: Context) -> tuple[Op, ...]:
        """Returns the ops from file bytes to model input."""
        return context.preprocess if self.preprocess is None else self.preprocess


@dataclasses.dataclass(kw_only=True)
class FewShot:
    """Top-1 test accuracy of ridge regression on features of k images per class.

    For every set and k: "<set>/<k>_shot/accuracy" at the fixed penalty `l2`, and
    "accuracy_l2_chosen" at the penalty of 2^-6..2^12 ("l2_chosen") with the best
    validation accuracy, averaged over seeds; ties go to the larger penalty. Validation
    images are, per class, up to 25 of the training pool after the seed's k shots, never
    test images; without any, these two scores are left out. All accuracies are means
    over `seeds`; with several, "..._sd" is the sample standard deviation. Follows
    big_vision's protocol (arXiv:2205.01580, section 3). "<set>/unreadable" counts the
    unreadable images of pool and test set. A class of fewer than k images gives all it
    has, which the log says. `output` names the features: an output of the model or a
    module such as "encoder/block_05"; "": the pooled ones (see `features.of_model`).

    `controls` adds the same scores for raw pixels ("control_raw_pixels", at most 32 px
    a side) and the untrained network ("control_untrained"), computed once per run and
    kept in WORKDIR/<name>_controls.json.
    """

    sets: tuple[FewShotSet, ...]
    shots: tuple[int, ...] = (1, 5, 10, 25)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    l2: float = 1024.0
    every_steps: int = 25_000
    batch_size: int = 256
    controls: bool = True
    output: str = ""

    def __post_init__(self) -> None:
        names = [few.name for few in self.sets]
        problem = None
        if not names or len(set(names)) < len(names) or not all(names):
            problem = f"sets={names} must be there, each with a name of its own"
        elif not self.shots or min(self.shots) < 1:
            problem = f"shots={self.shots} must be at least 1, for example (1, 5, 10)"
        elif not self.seeds or len(set(self.seeds)) < len(self.seeds):
            problem = f"seeds={self.seeds} must differ, for example (0, 1, 2)"
        elif self.l2 <= 0:
            problem = f"l2={self.l2} must be above 0, for example 1024"
        if problem is not None:
            raise ValueError(f"FewShot: {problem}.")
        check_fields(self)

    def prepare(self, context: Context) -> Runner:
        for few in self.sets:
            for part, source in (("train", few.train), ("test", few.test)):
                context.check_set(source, self.batch_size, what=f"{few.name} {part}")
        tables = {few.name: self._test_labels(few, context) for few in self.sets}
        for few in self.sets:
            if tuple(few.train.class_names) == context.class_names:
                context.log(
                    f"{context.name}/{few.name} has the classes of the pretraining: a "
                    "data-efficiency probe, not transfer"
                )
        of_model = context.make_backbone_step(
            features.of_model(context.backbone, self.output)
        )
        of_pixels = context.make_eval_step(features.raw_pixels)
        for few in self.sets:
            for source in (few.train, few.test):
                ops = few.ops(context)
                features.check(context, of_model, source, ops, self.batch_size)

        def score(step: Any, state: Any, kind: str) -> dict[str, float]:
            scores = {}
            for few in self.sets:
                ops = few.ops(context)
                train, test = (
                    features.extract(context, step, state, source, ops, self.batch_size)
                    for source in (few.train, few.test)
                )
                if kind == "accuracy":
                    unreadable = _count_unreadable(context, few, train, test)
                    scores[f"{few.name}/unreadable"] = float(unreadable)
                    self._say_short(context, few, train)
                test.labels = tables[few.name][test.labels]
                found = self._few_shot(train, test, len(few.train.class_names), kind)
                scores |= {f"{few.name}/{name}": x for name, x in found.items()}
            return scores

        def control_scores(state: Any) -> dict[str, float]:
            pixels = score(of_pixels, state, "control_raw_pixels")
            untrained = score(of_model, context.untrained_state(), "control_untrained")
            return pixels | untrained

        def run(state: Any) -> dict[str, float]:
            scores = score(of_model, state, "accuracy")
            if self.controls:
                protocol = self._protocol(context)
                scores |= controls.once(
                    context, protocol, lambda: control_scores(state)
                )
            return scores

        return run

    def _few_shot(
        self, train: Features, test: Features, num_classes: int, kind: str
    ) -> dict[str, float]:
        lists = [
            shuffled_classes(train.labels, num_classes, seed) for seed in self.seeds
        ]
        scores = {}
        for shots in self.shots:
            ridges, validation = [], []
            for images in lists:
                chosen = np.concatenate([of_class[:shots] for of_class in images])
                held = np.concatenate(
                    [
                        of_class[shots : shots + VALIDATION_PER_CLASS]
                        for of_class in images
                    ]
                )
                x, y = train.vectors, train.labels
                ridges.append(Ridge(x[chosen], y[chosen], num_classes))
                if len(held):
                    validation.append(ridges[-1].accuracies(x[held], y[held], L2_GRID))
            l2s = {"": self.l2}
            if validation:
                mean = np.mean(validation, axis=0)
                best = float(np.array(L2_GRID)[mean == mean.max()].max())
                l2s["_l2_chosen"] = best
                suffix = "" if kind == "accuracy" else f"_{kind}"
                scores[f"{shots}_shot/l2_chosen{suffix}"] = best
            accuracies = np.array(
                [
                    ridge.accuracies(test.vectors, test.labels, list(l2s.values()))
                    for ridge in ridges
                ]
            )
            for name, of_seeds in zip(l2s, accuracies.T, strict=True):
                scores[f"{shots}_shot/{kind}{name}"] = float(of_seeds.mean())
                if len(self.seeds) > 1:
                    sd = float(of_seeds.std(ddof=1))
                    scores[f"{shots}_shot/{kind}{name}_sd"] = sd
        return scores

    def _say_short(self, context: Context, few: FewShotSet, train: Features) -> None:
        names = few.train.class_names
        counts = np.bincount(train.labels, minlength=len(names))
        for shots in self.shots:
            short = [
                f"{n} ({c})" for n, c in zip(names, counts, strict=True) if c < shots
            ]
            if short:
                context.log(
                    f"{context.name}/{few.name}: {len(short)} of {len(names)} classes "
                    f"have fewer than {shots} images, {shots}_shot takes all they "
                    f"have: {some(short)}."
                )

    def _test_labels(self, few: FewShotSet, context: Context) -> np.ndarray:
        table = class_table(
            few.test.class_names,
            few.train.class_names,
            name=f"{few.name} test",
            ours_is=f"{few.name} train",
        )
        if table.message is not None:
            context.log(table.message)
        return table.indices

    def _protocol(self, context: Context) -> dict[str, Any]:
        """Returns all values that the controls depend on."""
        return {
            "sets": [
                {
                    "name": few.name,
                    "train": few.train.fingerprint,
                    "test": few.test.fingerprint,
                    "preprocess": repr(few.ops(context)),
                }
                for few in self.sets
            ],
            "shots": list(self.shots),
            "seeds": list(self.seeds),
            "l2": self.l2,
            "l2_grid": list(L2_GRID),
            "validation_per_class": VALIDATION_PER_CLASS,
            "raw_pixels_side": features.RAW_PIXELS_SIDE,
            "output": self.output,
            "model": repr(context.model),
            "seed": context.seed,
        }


def _count_unreadable(
    context: Context, few: FewShotSet, train: Features, test: Features
) -> int:
    count = train.unreadable + test.unreadable
    if count:
        context.log(
            f"{context.name}/{few.name}: {train.unreadable} of {len(few.train)} "
            f"training and {test.unreadable} of {len(few.test)} test images are "
            "unreadable and left out; tools/check_dataset.py lists them."
        )
    return count


def natural_sets(data_dir: str | None = None) -> tuple[FewShotSet, ...]:
    """Returns big_vision's six few-shot sets of natural and aerial images.

    Images are resized to exactly 256 x 256 px without antialiasing and cropped to 224.
    tensorflow_datasets must have prepared all sets, in `data_dir` or Tfds's default.
    """
    splits = {
        "caltech101": ("train", "test"),
        "cars196": ("train", "test"),
        "cifar100": ("train", "test"),
        "dtd": ("train", "test"),
        "oxford_iiit_pet": ("train", "test"),
        "uc_merced": ("train[:1000]", "train[1000:]"),
    }
    return tuple(_natural_set(name, *parts, data_dir) for name, parts in splits.items())


def _natural_set(name: str, train: str, test: str, data_dir: str | None) -> FewShotSet:
    # Any: pyright does not take a cached_property for a protocol's property.
    pool: Any = Tfds(dataset=name, split=train, data_dir=data_dir)
    held_out: Any = Tfds(dataset=name, split=test, data_dir=data_dir)
    return FewShotSet(
        name=name,
        train=pool,
        test=held_out,
        preprocess=(Decode(), Resize(size_px=256), CentralCrop(size_px=224)),
    )
