"""Defines `TrainConfig`, which a recipe returns and a run folder records."""

import dataclasses
import enum

from flax import linen as nn

from big_vision_lite.data.ops import Decode, DecodeInceptionCrop
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.runtime import files
from big_vision_lite.runtime.sharding import Mesh, ShardingRule
from big_vision_lite.runtime.startup import Platform
from big_vision_lite.schedules import Average
from big_vision_lite.types import (
    Evaluator,
    Model,
    Objective,
    Op,
    Optimizer,
    members,
)


class PositionResize(enum.StrEnum):
    """The treatment of learned position embeddings on another grid than the model's."""

    BILINEAR = "bilinear"
    ERROR = "error"


class MatchClasses(enum.StrEnum):
    """The pairing of a data set's classes with those of a model."""

    BY_NAME = "by_name"
    # For the same classes under other names ("tench", "n01440764"), or under none.
    IN_ORDER = "in_order"


@dataclasses.dataclass(kw_only=True)
class Init:
    """The checkpoint to start from: a run, a step folder or foreign weights.

    The checkpoint's `backbone` is copied into this model's backbone; between models of
    the same class, all parameters are copied. `part` takes another module of the
    checkpoint ("encoder"), or of a file of another library one of several models
    ("teacher"); `into` fills another module of this model.

    Parameters matching `drop` keep their fresh values. None drops only the head, and
    only if its classes differ; "" drops nothing, and a head of other classes is then an
    error. With match_classes="in_order" the head is kept if it has as many classes,
    whatever their names. `rename` holds "old=>new" pairs: regular expressions applied
    to the checkpoint's names before comparison.
    """

    path: str = ""
    into: str = ""
    part: str = ""
    drop: str | None = None
    rename: tuple[str, ...] = ()
    position_resize: PositionResize = PositionResize.BILINEAR
    match_classes: MatchClasses = MatchClasses.BY_NAME

    def __post_init__(self):
        files.check_name(self.path)
        for pair in self.rename:
            if "=>" not in pair:
                raise ValueError(
                    f'init.rename: "{pair}" is not of the form "old=>new", for '
                    'example "backbone/=>encoder/".'
                )


@dataclasses.dataclass(kw_only=True)
class Checkpoints:
    """The save interval, and the number of checkpoints to keep.

    The newest `keep_latest` steps stay, and every step that is a multiple of
    `keep_every_steps` (0: none) stays for good.
    """

    every_steps: int = 1000
    keep_latest: int = 2
    keep_every_steps: int = 0

    def __post_init__(self):
        if self.every_steps < 1 or self.keep_latest < 1 or self.keep_every_steps < 0:
            raise ValueError(
                f"checkpoints: every_steps={self.every_steps} and keep_latest="
                f"{self.keep_latest} must be at least 1, keep_every_steps="
                f"{self.keep_every_steps} at least 0."
            )


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """The complete configuration of one training run.

    The length is `num_epochs` or `num_steps`; `num_steps` wins when both are set.
    `preprocess` holds the deterministic ops from file bytes to model input, used by
    predict and by default in every evaluator. `freeze` holds patterns of parameter
    names that are not trained; `ema` adds an exponential moving average of the
    parameters. `profile_steps` is empty or (first, last), the steps traced for
    TensorBoard's profiler.
    """

    model: Model
    objective: Objective
    data: Stream
    preprocess: tuple[Op, ...]
    optimizer: Optimizer
    evaluators: dict[str, Evaluator] = dataclasses.field(default_factory=dict)
    seed: int = 0
    num_epochs: float | None = None
    num_steps: int | None = None
    init: tuple[Init, ...] = ()
    freeze: tuple[str, ...] = ()
    ema: Average | None = None
    micro_batches: int = 1
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    sharding: tuple[ShardingRule, ...] = dataclasses.field(
        default_factory=lambda: (ShardingRule(pattern=".*"),)
    )
    checkpoints: Checkpoints = dataclasses.field(default_factory=Checkpoints)
    log_every_steps: int = 50
    platform: Platform | None = None
    deterministic: bool = False
    profile_steps: tuple[int, ...] = ()

    def __post_init__(self):
        if not isinstance(self.model, nn.Module):
            raise ValueError(
                f"model is a {type(self.model).__name__}, not a Linen module."
            )
        for name, kind in (("model", Model), ("objective", Objective)):
            component = getattr(self, name)
            missing = [m for m in members(kind) if not hasattr(component, m)]
            if missing:
                raise ValueError(
                    f"{name}: {type(component).__name__} says nothing of "
                    f"{', '.join(missing)}. Inherit the defaults: class "
                    f"{type(component).__name__}(..., {kind.__name__}) with "
                    f"{kind.__name__} from big_vision_lite.types."
                )
        if self.num_epochs is None and self.num_steps is None:
            raise ValueError("num_epochs and num_steps are both none; set one.")
        for name in ("num_epochs", "num_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0.")
        # Not in Init itself: --config.init.path=RUN fills an empty one.
        if not isinstance(self.init, tuple):
            raise ValueError(
                f"init is a {type(self.init).__name__}; give a tuple of checkpoints to "
                'start from: init=(Init(path="RUN"),)'
            )
        for index, init in enumerate(self.init):
            name = "init" if len(self.init) == 1 else f"init[{index}]"
            if not init.path:
                raise ValueError(
                    f"{name}.path is empty: give the run to start from with "
                    f"--config.{name}.path=RUN, or none with --config.init=none."
                )
        for name in ("log_every_steps", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least 1, for example "
                    f"--config.{name}=1."
                )
        if self.data.batch_size % self.micro_batches:
            size = self.data.batch_size
            parts = [n for n in range(1, size + 1) if size % n == 0]
            nearest = sorted(parts, key=lambda n: abs(n - self.micro_batches))[:2]
            raise ValueError(
                f"data.batch_size={size} does not divide into micro_batches="
                f"{self.micro_batches} equal parts; use --config.micro_batches="
                f"{' or '.join(str(n) for n in sorted(nearest))}."
            )
        turned = {
            op.orientation
            for op in (*self.data.ops, *self.preprocess)
            if isinstance(op, Decode | DecodeInceptionCrop)
        }
        if len(turned) > 1:
            raise ValueError(
                "data.ops and preprocess read EXIF's orientation differently: give "
                "both orientation=ignore or both apply, for example with "
                "--config.data.ops[0].orientation=apply "
                "--config.preprocess[0].orientation=apply."
            )
        steps = self.profile_steps
        if len(steps) not in (0, 2) or (steps and not 1 <= steps[0] <= steps[1]):
            raise ValueError(
                f"profile_steps={steps} must be empty or (first, last), counted from "
                "1, for example --config.profile_steps='(20, 25)'."
            )
        for name in self.evaluators:
            if not name.isidentifier():
                raise ValueError(
                    f'evaluators: "{name}" must be an identifier, so that flags reach '
                    "it: letters, digits and _."
                )

    def length_note(self) -> str | None:
        """Returns a note that `num_steps` wins if both lengths are set, else None."""
        if self.num_steps is None or self.num_epochs is None:
            return None
        return (
            f"num_steps={self.num_steps} counts, num_epochs={self.num_epochs:g} does "
            "not: both are set. For the epochs add --config.num_steps=none"
        )

    def resolve_steps(self, num_examples: int) -> int:
        """Returns `num_steps`, else the steps in `num_epochs` over `num_examples`."""
        if self.num_steps is not None:
            return self.num_steps
        assert self.num_epochs is not None, "checked by the constructor"
        steps = self.num_epochs * num_examples / self.data.batch_size
        return max(1, round(steps))
