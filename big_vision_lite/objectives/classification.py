"""Softmax and sigmoid cross-entropy, for one or several labels per image."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from big_vision_lite.types import Batch, Forward, Logits, Objective


@dataclasses.dataclass(kw_only=True)
class SoftmaxClassification(Objective):
    """Softmax cross-entropy in nats, for one label per image.

    Labels are int [B], or float [B, C] that sum to 1 (mixup). `label_smoothing` spreads
    that fraction of every label evenly over all classes.
    """

    logits: ClassVar[Logits | None] = Logits.SOFTMAX
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} is not a share; use "
                "0 <= label_smoothing < 1, 0.1 for example."
            )

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        logits = _logits(forward, batch)
        labels = as_distribution(batch["label"], logits.shape[-1])
        smoothed = labels * (1 - self.label_smoothing)
        smoothed = smoothed + self.label_smoothing / logits.shape[-1]
        losses = -jnp.sum(smoothed * jax.nn.log_softmax(logits), axis=-1)
        return losses, {"accuracy": is_correct(logits, labels)}


@dataclasses.dataclass(kw_only=True)
class SigmoidClassification(Objective):
    """Binary cross-entropy in nats, summed over the classes (arXiv:2006.07159).

    Labels are int [B], or float [B, C] with a value in 0..1 per class. A prediction is
    correct when the most probable class is one of the image's.
    """

    logits: ClassVar[Logits | None] = Logits.SIGMOID

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        logits = _logits(forward, batch)
        labels = as_distribution(batch["label"], logits.shape[-1])
        present, absent = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        losses = -jnp.sum(labels * present + (1 - labels) * absent, axis=-1)
        return losses, {"accuracy": is_correct(logits, labels)}


def as_distribution(
    labels: Int[Array, " B"] | Float[Array, "B C"], num_classes: int
) -> Float[Array, "B {num_classes}"]:
    """Returns float32 labels [B, C]; integer labels become one-hot.

    Raises:
        ValueError: float labels have a number of classes other than the head's.
    """
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    if labels.shape[-1] != num_classes:
        raise ValueError(
            f"Labels have {labels.shape[-1]} classes, the model's head {num_classes}; "
            f"use --config.model.head.num_classes={labels.shape[-1]}."
        )
    return labels.astype(jnp.float32)


def is_correct(
    logits: Float[Array, "B C"], labels: Float[Array, "B C"]
) -> Float[Array, " B"]:
    """Returns 1.0 where the predicted class has the image's largest label above 0."""
    chosen = jnp.take_along_axis(labels, logits.argmax(-1, keepdims=True), axis=-1)
    largest = labels.max(axis=-1)
    return ((chosen[:, 0] == largest) & (largest > 0)).astype(jnp.float32)


def _logits(forward: Forward, batch: Batch) -> Float[Array, "B C"]:
    return forward(image=batch["image"])["logits"].astype(jnp.float32)
