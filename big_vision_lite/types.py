"""The nouns of a run as protocols: plain callables, no base classes to inherit."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import numpy as np
import optax

Array = jax.Array
# One example on the host: encoded bytes or a numpy image, and its label.
Example = dict[str, Any]
# One global batch: "image" [B, H, W, C], "label" [B] or [B, C], and "valid" [B] in
# evaluation.
Batch = Mapping[str, Any]
# Nested dicts of arrays; the name of a leaf joins its keys by "/".
Params = Mapping[str, Any]
# Running statistics of batch norm are variables of this name beside the parameters.
STATISTICS = "batch_stats/"


@runtime_checkable
class Source(Protocol):
    """Labelled images by random access; the order is somebody else's business."""

    if TYPE_CHECKING:
        # Not at run time: up to Python 3.11 `isinstance` reads properties, which would
        # open a source just to look at its type.
        @property
        def class_names(self) -> tuple[str, ...]:
            """Names of the classes in the order of their labels."""
            ...

        @property
        def fingerprint(self) -> str:
            """A short hash of what the source holds, checked when a run resumes."""
            ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Returns {"image": encoded bytes or uint8 [H, W, C], "label": int}."""
        ...

    def name(self, index: int) -> str:
        """Says where example `index` comes from: a path, or the set and its index."""
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
class Model(Protocol):
    """A Linen module; called with `model.inputs(batch)` and `train=`, returns a dict.

    "tokens" [B, N, D] or "grid" [B, h, w, D], "pooled" [B, D], "logits" [B, C] when
    there is a head, "image" the scaled input.
    """

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Picks from the batch what `__call__` eats."""
        ...

    def init(self, *args: Any, **kwargs: Any) -> Any: ...

    def apply(self, *args: Any, **kwargs: Any) -> Any: ...


@runtime_checkable
class Stem(Protocol):
    """A Linen module before the patches: scaled images [B, H, W, C] to [B, h, w, D]."""

    def __call__(self, image: Array, train: bool) -> Array: ...


@runtime_checkable
class Forward(Protocol):
    """The model bound to parameters, random keys and mode: what an objective calls."""

    def __call__(
        self,
        *,
        method: str | None = None,
        capture: tuple[str, ...] = (),
        params: str = "online",
        **inputs: Any,
    ) -> dict[str, Any]: ...


@runtime_checkable
class Objective(Protocol):
    """A loss as a function of the batch: one value an example, and metrics alike.

    One whose values depend on the other examples of the batch (contrastive) says so
    with `needs_whole_batch: ClassVar[bool] = True`; it takes no micro-batches. One that
    trains logits says with `probabilities(logits: [B, C]) -> [B, C]` what they mean.
    """

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Array, dict[str, Array]]: ...


@runtime_checkable
class Schedule(Protocol):
    """A learning rate over the run."""

    peak: float

    def build(self, num_steps: int) -> Callable[[Any], Array]:
        """Returns the learning rate of update `step`, counted from 0."""
        ...


@runtime_checkable
class Optimizer(Protocol):
    """Builds the whole chain: clip, direction, multipliers, decay, schedule."""

    schedule: Schedule

    def build(self, num_steps: int) -> optax.GradientTransformation: ...


# Scores of one state, by name.
Runner = Callable[[Any], dict[str, float]]


@runtime_checkable
class Evaluator(Protocol):
    """Prepared once with a context, then run on many states."""

    every_steps: int

    def prepare(self, context: Any) -> Runner: ...
