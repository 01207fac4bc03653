"""Defines protocols of a run's components; plain callables and dataclasses fit.

Models and objectives inherit their protocol for its defaults; others need not.
"""

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Generic,
    Protocol,
    runtime_checkable,
)

import jax
import numpy as np
import optax

Array = jax.Array
# One example on the host: an encoded or numpy "image", a "label", "mask", "boxes",
# text, whatever the source has.
Example = dict[str, Any]
# One global batch of the numeric keys that the ops leave: "image" [B, H, W, C], "label"
# [B], [B, C] or tags int [B, K], ..., and "valid" [B] in evaluation.
Batch = Mapping[str, Any]
# Nested dicts of arrays; the name of a leaf joins its keys by "/".
Params = Mapping[str, Any]


class Logits(enum.StrEnum):
    """What the logits of a model mean; its objective says it, and weights carry it."""

    # One class an image.
    SOFTMAX = "softmax"
    # Each class by itself: several an image, or none.
    SIGMOID = "sigmoid"
    # Numbers, no classes: a regression, an embedding.
    NONE = "none"

    def outputs(self, logits: Array) -> Array:
        """Returns probabilities [B, C] of logits, or the numbers that they are."""
        match self:
            case Logits.SOFTMAX:
                return jax.nn.softmax(logits)
            case Logits.SIGMOID:
                return jax.nn.sigmoid(logits)
            case Logits.NONE:
                return logits


@runtime_checkable
class Source(Protocol):
    """A data set with random access to its examples; the pipeline chooses the order."""

    if TYPE_CHECKING:
        # Not at run time: up to Python 3.11 `isinstance` reads properties, which would
        # open a source just to look at its type.
        @property
        def class_names(self) -> tuple[str, ...]:
            """Returns class names in the order of their labels; () without labels."""
            ...

        @property
        def fingerprint(self) -> str:
            """Returns a short hash of the content, checked when a run resumes."""
            ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Returns {"image": encoded bytes or uint8 [H, W, C], ...} with its other keys.

        "label" is an int, float32 [C], or tags int32 [K] padded with -1, "mask" an
        encoded or integer image, "boxes" float32 [n, 4] in 0..1 (top, left, bottom,
        right).
        """
        ...

    def name(self, index: int) -> str:
        """Returns the origin of example `index`: a path, or data set and index."""
        ...


@runtime_checkable
class Op(Protocol):
    """One numpy transformation of one example on the host."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example: ...


@runtime_checkable
class DeviceOp(Protocol):
    """One transformation of the global batch inside the train step."""

    def __call__(self, batch: Batch, rng: Array) -> dict[str, Array]: ...


@runtime_checkable
class Family(Protocol):
    """Properties of a family of models that the program needs, each with a default."""

    # The published sizes that `of` takes: the table of tools/show_model.py.
    published: ClassVar[tuple[str, ...]] = ()
    # The field that holds the pretrained backbone, used by evaluators, fine-tuning,
    # `predict --embed` and export; "" if the model itself is the backbone.
    backbone: ClassVar[str] = ""
    # Modules that depend on the classes of the data: fresh for other classes.
    head_modules: ClassVar[tuple[str, ...]] = ("head",)
    # Patterns of parameter names from the pixels upwards, for layer-wise decay. Numbers
    # in a pattern's groups order the blocks; unmatched names lie above all blocks.
    layers: ClassVar[tuple[str, ...]] = ()
    # Fields that are not compared when weights are loaded into a model: they change no
    # feature, the weights are adapted to them, or the shapes of parameters show them.
    free_fields: ClassVar[tuple[str, ...]] = ("head", "dtype", "remat")
    # Parameters [rows, columns, D] that can be resized to another grid of patches.
    position_embeddings: ClassVar[tuple[str, ...]] = ()
    # Names of the random keys that modules ask for (`make_rng`), beside "params".
    random_keys: ClassVar[tuple[str, ...]] = ("dropout", "mask")
    # The kernel [h, w, C, D] applied to the pixels, and whether it cuts them into
    # patches: patches have no padding, and such a kernel can be resized.
    input_kernel: str | None = None
    reads_patches: bool = False
    # Whether kernels are standardised at use: their scale then changes no output.
    standardises_kernels: bool = False
    # Mean and standard deviation that scale the pixels, in units of 0..255; () without.
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    # "frozen" if batch norm only reads its running statistics.
    statistics: str = "batch"


@runtime_checkable
class Model(Family, Protocol):
    """A Linen module; called with `model.inputs(batch)` and `train=`, returns a dict.

    "grid" [B, h, w, D] (of text "tokens" [B, N, D]), "pooled" [B, E], which the head
    and every evaluator read, "logits" [B, C] when there is a head, "image" the scaled
    input. A class takes the defaults of `Family` by inheriting: `class MyModel(
    nn.Module, Model)`.
    """

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Returns the keyword arguments of `__call__` from the batch."""
        return {"image": batch["image"]}

    def notes(self, batch: Batch) -> list[str]:
        """Returns sentences on what the model does to such a batch; a run prints them.

        `batch` may hold shapes in place of arrays.
        """
        return []

    def init(self, *args: Any, **kwargs: Any) -> Any: ...

    def apply(self, *args: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class Stem(Protocol):
    """A Linen module before the patches: scaled images [B, H, W, C] to [B, h, w, D].

    `input_kernel` names its kernel [h, w, C, D] on the image.
    """

    input_kernel: str
    standardises_kernels: bool

    def __call__(self, image: Array, train: bool) -> Array: ...


@runtime_checkable
class Forward(Protocol):
    """The model bound to parameters, random keys and mode, as objectives call it.

    `progress` is the fraction of the run that is done, float32 in 0..1.
    """

    if TYPE_CHECKING:
        # Not at run time: a plain function serves objectives that do not ask for it.
        @property
        def progress(self) -> Array: ...

    def __call__(
        self,
        *,
        method: str | None = None,
        capture: tuple[str, ...] = (),
        params: str = "online",
        statistics: str = "running",
        **inputs: Any,
    ) -> dict[str, Any]: ...


@runtime_checkable
class Objective(Protocol):
    """A loss: maps the model and a batch to one loss per example, and metrics.

    Losses are [B]; a metric is [B], or [] for a number of the whole batch. A class
    takes the defaults below by inheriting: `class MyObjective(Objective)`.
    """

    # Whether an example's loss depends on the rest of the batch (contrastive): then the
    # batch cannot be split into micro-batches.
    needs_whole_batch: ClassVar[bool] = False
    # What the model's logits mean; None where the objective does not look at any.
    logits: ClassVar[Logits | None] = None

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Array, dict[str, Array]]: ...

    def predictions(self, logits: Array) -> Array:
        """Returns the numbers of a regression in their own units: the logits, here."""
        return logits


@runtime_checkable
class Schedule(Protocol):
    """A learning rate as a function of the step."""

    peak: float

    def build(self, num_steps: int) -> Callable[[Any], Array]:
        """Returns the learning rate of update `step`, counted from 0."""
        ...


@runtime_checkable
class Optimizer(Protocol):
    """A builder of optax chains: clipping, direction, multipliers, decay, schedule."""

    schedule: Schedule

    def build(
        self, num_steps: int, layers: Sequence[str] = ()
    ) -> optax.GradientTransformation:
        """Returns the optax chain for `num_steps` updates of a model with `layers`."""
        ...


# Maps a train state to its scores by name: finite numbers of Python, numpy or JAX. A
# share in 0..1 is shown in percent if its name ends with "accuracy", "recall" or
# "precision"; "<score>_sd" is the spread of <score>, "control_..." a control beside it.
Runner = Callable[[Any], dict[str, Any]]


@runtime_checkable
class Evaluator(Protocol):
    """An evaluator: prepared once with a context, then called on many states.

    `context` is `Context` of runs/evaluations.py: the model, its classes, the batches.
    """

    every_steps: int

    def prepare(self, context: Any) -> Runner: ...


def members(protocol: type) -> list[str]:
    """Returns the names of a protocol's fields and methods, inherited ones included."""
    declared = {
        name
        for kind in protocol.__mro__
        if kind not in (Protocol, Generic, object)
        for name in (*vars(kind).get("__annotations__", ()), *vars(kind))
    }
    return sorted(n for n in declared if not n.startswith("_") or n == "__call__")


def backbone_of(model: Model) -> tuple[str, Model]:
    """Returns the path of a model's backbone ("encoder", "" for all) and the backbone.

    Raises:
        ValueError: the field named by the model's `backbone` holds no model.
    """
    path: list[str] = []
    while model.backbone:
        inner = getattr(model, model.backbone, None)
        if not isinstance(inner, Model):
            raise ValueError(
                f'{type(model).__name__}.backbone is "{model.backbone}", but that '
                f"field holds {type(inner).__name__}, no model. Name the field of the "
                "pretrained part, whose class inherits big_vision_lite.types.Model."
            )
        path.append(model.backbone)
        model = inner
    return "/".join(path), model


def layers_of(model: Model) -> tuple[str, ...]:
    """Returns the backbone's `layers` as patterns of the whole model's names."""
    path, part = backbone_of(model)
    return tuple(
        f"{path}/(?:{pattern})" if path else pattern for pattern in part.layers
    )
