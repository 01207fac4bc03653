"""Chooses fine-tuning settings by data set size and image size: BiT-HyperRule.

After arXiv:1912.11370, section 3.3, and the code published with it.
"""

import dataclasses
import math
from typing import Any, SupportsIndex

import numpy as np

from big_vision_lite import schedules
from big_vision_lite.config import Checkpoints, Init, TrainConfig
from big_vision_lite.data.ops import (
    Decode,
    FlipLeftRight,
    Orientation,
    RandomCrop,
    Resize,
    UndecodableImage,
)
from big_vision_lite.data.ops.decode import decode
from big_vision_lite.data.ops.device import Mixup, Partner
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.objectives.regression import Regression
from big_vision_lite.recipes import serialize
from big_vision_lite.runs import load
from big_vision_lite.runs.load import Pretrained
from big_vision_lite.runtime.sharding import Mesh
from big_vision_lite.training.optimizers import SGD
from big_vision_lite.types import Evaluator, Example, Model, Objective, Op, Source

# Images of fewer pixels than this are small: resized to 160, cropped to 128.
SMALL_AREA_PX = 96 * 96
SMALL_CROP_PX, LARGE_CROP_PX = 128, 480
# Crop to resize, as published; 384 of 448 is the paper's for all but R152x4.
RESIZE_PX = {128: 160, 384: 448, 480: 512}
# Mixup is used from this many images on.
MIXUP_FROM_EXAMPLES, MIXUP_ALPHA = 20_000, 0.1
# The number of images, spread over the set, in the median area.
AREA_SAMPLE = 64


@dataclasses.dataclass(kw_only=True)
class HyperRule:
    """Fine-tuning by SGD with momentum 0.9, no weight decay, no clipping, a zero head.

    Size: images with a median area below 96 x 96 px are resized to 160 px and cropped
    to 128, others to 512 and 480. `size_px` sets another crop; the resize is then 5/4
    of it below 128 px, else 7/6. Resizing to a square does not keep the aspect ratio;
    evaluation resizes straight to the crop. Length: 500 steps below 20,000 training
    images, 10,000 below 500,000, else 20,000; `num_steps` sets another one, with
    warm-up and drops at the same fractions. Mixup of 0.1 from 20,000 images on. The
    learning rate `peak` is not scaled by the batch size; the published pair for a small
    machine is 0.001 at 128. Set `flip=False` if left and right have a meaning (letters,
    digits). `ops` and `preprocess`, given together, replace the ops from files to the
    model.
    """

    size_px: int | None = None
    num_steps: int | None = None
    peak: float = 0.003
    batch_size: int = 512
    flip: bool = True
    ops: tuple[Op, ...] | None = None
    preprocess: tuple[Op, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 5:
            raise ValueError(
                f"HyperRule: num_steps={self.num_steps} has no room for a warm-up and "
                "three drops; use 5 or more, or none for the rule's."
            )
        if self.batch_size < 1 or (self.size_px is not None and self.size_px < 1):
            raise ValueError(
                f"HyperRule: batch_size={self.batch_size} and size_px={self.size_px} "
                "must be at least 1; size_px=none follows the rule."
            )
        if (self.ops is None) != (self.preprocess is None):
            raise ValueError(
                "HyperRule: ops and preprocess go together, so that training and "
                "evaluation see images of one size; give both or neither."
            )
        if self.ops is not None and (self.size_px is not None or not self.flip):
            raise ValueError(
                "HyperRule: size_px and flip do nothing when ops are given; write them "
                "into the ops, and use size_px=none, flip=true."
            )

    def config(
        self,
        model: Any,
        train: Source,
        evaluators: dict[str, Evaluator],
        pretrained_preprocess: tuple[Op, ...],
        *,
        init: tuple[Init, ...],
        objective: Objective | None = None,
        seed: int = 0,
        fsdp: int = 1,
    ) -> TrainConfig:
        """Returns the config that trains `model` with a new head for `train`'s classes.

        Images get the channels that `pretrained_preprocess` gives the first image, and
        are turned as it turns them. Without an `objective`, each has one class
        (softmax); numbers are not mixed.

        Raises:
            ValueError: no image can be read, or the model has no field for a head.
        """
        num_classes, examples = len(train.class_names), len(train)
        ops, preprocess = self._ops(train, pretrained_preprocess)
        num_steps, schedule = self.schedule(examples)
        device_ops = ()
        objective = objective or SoftmaxClassification()
        mixes = not isinstance(objective, Regression)
        if mixes and examples >= MIXUP_FROM_EXAMPLES:
            mixup = Mixup(
                num_classes=num_classes,
                alpha=MIXUP_ALPHA,
                partner=Partner.REVERSE,
                fold_lambda=False,
            )
            device_ops = (mixup,)
        source = train
        if examples < self.batch_size:
            source = Repeated(
                source=train, times=math.ceil(self.batch_size / max(1, examples))
            )
        return TrainConfig(
            seed=seed,
            num_steps=num_steps,
            model=with_head(model, num_classes),
            objective=objective,
            data=Stream(
                source=source,
                ops=ops,
                device_ops=device_ops,
                batch_size=self.batch_size,
            ),
            preprocess=preprocess,
            optimizer=SGD(
                schedule=schedule, momentum=0.9, weight_decay=0.0, clip_norm=None
            ),
            evaluators=evaluators,
            init=init,
            mesh=Mesh(fsdp=fsdp),
            checkpoints=Checkpoints(every_steps=min(1000, math.ceil(num_steps / 5))),
        )

    def from_scratch(self, config: TrainConfig) -> TrainConfig:
        """Returns the same training from random parameters."""
        return dataclasses.replace(config, init=())

    def schedule(self, num_examples: int) -> tuple[int, schedules.StepDrops]:
        """Returns the number of steps and the learning-rate schedule for a set size."""
        steps = schedules.bit_hyperrule_steps(num_examples)
        if self.num_steps is None:
            return steps[-1], schedules.bit_hyperrule(num_examples, self.peak)
        warmup, *drops = (round(s * self.num_steps / steps[-1]) for s in steps[:-1])
        return self.num_steps, schedules.StepDrops(
            peak=self.peak, warmup_steps=warmup, drop_steps=tuple(drops)
        )

    def _ops(
        self, train: Source, pretrained: tuple[Op, ...]
    ) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
        if self.ops is not None and self.preprocess is not None:
            return self.ops, self.preprocess
        channels = input_shape(train, pretrained)[-1]
        found = [op.orientation for op in pretrained if isinstance(op, Decode)]
        decode = Decode(channels=channels, orientation=(*found, Orientation.IGNORE)[0])
        crop = self.size_px or crop_by_area(train)
        flip = (FlipLeftRight(),) if self.flip else ()
        ops = (
            decode,
            Resize(size_px=resize_of(crop)),
            RandomCrop(size_px=crop),
            *flip,
        )
        return ops, (decode, Resize(size_px=crop))


@dataclasses.dataclass(kw_only=True)
class Repeated:
    """A source that repeats another `times` times, for sets smaller than one batch."""

    source: Source
    times: int

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}x{self.times}"

    def __len__(self) -> int:
        return len(self.source) * self.times

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self.source[range(len(self))[index] % len(self.source)]

    def name(self, index: SupportsIndex) -> str:
        """Returns the origin of the example."""
        return self.source.name(range(len(self))[index] % len(self.source))


def start(path: str, model: Model, part: str = "") -> tuple[Init, ...]:
    """Returns an init from `path` with a new head, even for the same classes."""
    drop = f"({'|'.join(model.head_modules)})/.*"
    return (Init(path=path, part=part, drop=drop),)


def with_head(model: Any, num_classes: int) -> Any:
    """Returns `model` with a new linear head and no dropout, as BiT fine-tunes.

    Raises:
        ValueError: the model has no field `head`.
    """
    fields = {f.name: getattr(model, f.name) for f in serialize.fields(model)}
    if "head" not in fields:
        raise ValueError(
            f"{type(model).__name__} has no field head, so that it cannot be given one "
            f"for {num_classes} classes; fine-tune a model that has one."
        )
    off = {name: 0.0 for name in ("dropout", "stochastic_depth") if name in fields}
    return type(model)(**fields | off | {"head": Classifier(num_classes=num_classes)})


def input_shape(source: Source, preprocess: tuple[Op, ...]) -> tuple[int, ...]:
    """Returns the shape [H, W, C] that `preprocess` gives the first readable image."""
    reason = "there is none"
    for index in range(min(len(source), AREA_SAMPLE)):
        example = source[index]
        try:
            for op in preprocess:
                example = op(example, np.random.default_rng(0))
        except UndecodableImage as error:
            reason = f"{source.name(index)}: {error}"
            continue
        return tuple(example["image"].shape)
    raise ValueError(
        f"Not one of the first {AREA_SAMPLE} images can be read ({reason}); look at "
        "them with tools/check_dataset.py."
    )


def crop_by_area(source: Source) -> int:
    """Returns the rule's crop in px, by the median area of images spread over a set."""
    chosen = np.linspace(0, len(source) - 1, min(len(source), AREA_SAMPLE), dtype=int)
    areas = []
    for index in chosen.tolist():
        try:
            height, width, _ = decode(source[index]["image"]).shape
        except UndecodableImage:
            continue
        areas.append(height * width)
    if not areas:
        raise ValueError(
            f"Not one of {len(chosen)} images, the first {source.name(0)}, can be "
            "read; look at them with tools/check_dataset.py."
        )
    small = np.median(areas) < SMALL_AREA_PX
    return SMALL_CROP_PX if small else LARGE_CROP_PX


def read_run(path: str, allow_module: str = "", part: str = "") -> Pretrained:
    """Returns backbone and preprocessing of a run, a step folder or foreign weights.

    `part` is one of several models in a file of another library.

    Raises:
        FileNotFoundError: `path` holds none of these.
        ValueError: the weights are damaged or in no known format.
    """
    # The training looks the folder up again, and logs it then.
    place = load.locate(path, log=lambda _: None, part=part)
    return place.pretrained([allow_module] if allow_module else [])


def parse_size(word: str, train: Source, pretrained: Pretrained) -> int | None:
    """Returns the crop in px for "keep" or a number, None for "rule".

    "keep" is the input size at which the pretrained model was trained.

    Raises:
        ValueError: another word, or "keep" if that input is not square.
    """
    if word == "rule":
        return None
    if word != "keep":
        if word.isdecimal() and int(word):
            return int(word)
        raise ValueError(f'size="{word}": use rule, keep, or a number of pixels.')
    height, width, _ = input_shape(train, pretrained.preprocess)
    if height != width:
        raise ValueError(
            f"size=keep: the run was trained at {height} x {width} px, and the rule is "
            f"for squares; use size={min(height, width)}."
        )
    return height


def resize_of(crop_px: int) -> int:
    """Returns the resize in px before a random crop: as published, else by ratio."""
    ratio = 5 / 4 if crop_px < SMALL_CROP_PX else 7 / 6
    return RESIZE_PX.get(crop_px, round(crop_px * ratio))
