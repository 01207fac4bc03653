"""A recipe for labelled images of one's own: fine-tuned, or from scratch."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

from big_vision_lite.config import TrainConfig
from big_vision_lite.data.ops import (
    CentralCrop,
    Decode,
    DecodeInceptionCrop,
    FlipLeftRight,
    Orientation,
    ResizeSmall,
)
from big_vision_lite.data.ops.device import Mixup
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.models.bit import BiT
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.objectives.regression import Regression
from big_vision_lite.runs.hyperrule import HyperRule, parse_size, read_run, start
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW
from big_vision_lite.types import Evaluator, Objective, Source

# The largest size at which the small network sees the whole of an object.
SMALL_NETWORK_PX = 64


class ClassWeights(enum.StrEnum):
    """How much the classes weigh in the loss.

    EQUAL     1 each: a class of more images counts for more
    BALANCED  so that each class of the training images counts alike
    """

    EQUAL = "equal"
    BALANCED = "balanced"


# What such recipes take, beside what names their set; 0 and "" choose.
ARGUMENTS: dict[str, Any] = {
    "init": "",
    "size": 0,
    "batch": 0,
    "epochs": 0.0,
    "steps": 0,
    "flip": True,
    "orientation": Orientation.IGNORE,
    "split_seed": 0,
    "allow_module": "",
    "part": "",
}

# Maps the interval in steps to an evaluator for each held-out split.
Scored = Callable[[int], dict[str, Evaluator]]


def recipe(
    chosen: Any, train: Source, objective: Objective, scored: Scored
) -> TrainConfig:
    """Returns the recipe for `chosen`, a namespace of `ARGUMENTS`.

    Raises:
        FileNotFoundError, ValueError: there are no such weights, or arguments do not
            go together.
    """
    if chosen.init:
        return from_checkpoint(chosen, train, objective, scored)
    return from_scratch(chosen, train, objective, scored)


def from_checkpoint(
    chosen: Any, train: Source, objective: Objective, scored: Scored
) -> TrainConfig:
    """Fine-tunes by the rule at batch 128, whose learning rate is 0.001."""
    if chosen.epochs:
        raise ValueError("epochs is for training from scratch; with init use steps.")
    pretrained = read_run(chosen.init, chosen.allow_module, chosen.part)
    batch_size = chosen.batch or 128
    rule = HyperRule(
        size_px=parse_size(str(chosen.size or "keep"), train, pretrained),
        num_steps=chosen.steps or None,
        peak=0.003 if batch_size >= 512 else 0.001,
        batch_size=batch_size,
        flip=chosen.flip,
    )
    num_steps, _ = rule.schedule(len(train))
    preprocess = pretrained.preprocess
    if chosen.orientation is Orientation.APPLY:
        preprocess = tuple(
            dataclasses.replace(op, orientation=chosen.orientation)
            if isinstance(op, Decode)
            else op
            for op in preprocess
        )
    return rule.config(
        pretrained.model,
        train,
        scored(max(10, num_steps // 10)),
        preprocess,
        objective=objective,
        init=start(chosen.init, pretrained.model, chosen.part),
    )


def from_scratch(
    chosen: Any, train: Source, objective: Objective, scored: Scored
) -> TrainConfig:
    """Trains a small network on crops with mixup, what little data needs."""
    if chosen.steps or chosen.allow_module or chosen.part:
        raise ValueError("steps, part and allow_module go with init; use epochs.")
    size, num_classes = chosen.size or 64, len(train.class_names)
    # A power of two, for any number of devices.
    fitting = 1 << (len(train).bit_length() - 1)
    batch_size = chosen.batch or min(128, fitting)
    epochs = chosen.epochs or 100.0
    num_steps = max(1, round(epochs * len(train) / batch_size))
    head = Classifier(num_classes=num_classes)
    flip = (FlipLeftRight(),) if chosen.flip else ()
    decode = {"orientation": chosen.orientation}
    mixes = not isinstance(objective, Regression)
    return TrainConfig(
        num_epochs=epochs,
        model=BiT.of("small" if size <= SMALL_NETWORK_PX else "R26x1", head=head),
        objective=objective,
        data=Stream(
            source=train,
            ops=(DecodeInceptionCrop(**decode, size_px=size, area_min=0.25), *flip),
            device_ops=(Mixup(num_classes=num_classes, alpha=0.2),) if mixes else (),
            batch_size=batch_size,
        ),
        preprocess=(
            Decode(**decode),
            ResizeSmall(size_px=round(size * 8 / 7)),
            CentralCrop(size_px=size),
        ),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=1e-3, warmup_steps=num_steps // 20),
            weight_decay=1e-4,
        ),
        evaluators=scored(max(10, num_steps // 20)),
    )
