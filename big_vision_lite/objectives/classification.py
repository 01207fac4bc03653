"""Softmax and sigmoid cross-entropy, for one or several labels per image."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from big_vision_lite.messages import some
from big_vision_lite.types import Batch, Forward, Logits, Objective


@dataclasses.dataclass(kw_only=True)
class SoftmaxClassification(Objective):
    """Softmax cross-entropy in nats, for one label per image.

    Labels are int [B], or float [B, C] that sum to 1 (mixup). `label_smoothing` spreads
    that fraction of every label evenly over all classes. `class_weights`, one a class,
    multiply the terms of the loss; `balanced` gives those that make up for unequal
    classes. `share_labels` is for several labels an image, float [B, C] of 0 and 1, or
    int [B, K], tags padded with -1: each of its k labels becomes 1 / k
    (arXiv:1805.00932: noisy tags); an image without any has no loss, and
    the metric "unlabelled" is their share.
    """

    logits: ClassVar[Logits | None] = Logits.SOFTMAX
    label_smoothing: float = 0.0
    share_labels: bool = False
    class_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_weights(self.class_weights)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing={self.label_smoothing} is not a share; use "
                "0 <= label_smoothing < 1, 0.1 for example."
            )

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        logits = _logits(forward, batch)
        total, metrics = jnp.ones(()), {}
        if not self.share_labels:
            labels = as_distribution(batch["label"], logits.shape[-1])
        else:
            labels = presence(batch["label"], logits.shape[-1])
            count = labels.sum(axis=-1, keepdims=True)
            labels, total = labels / jnp.maximum(count, 1e-6), count > 0
            metrics["unlabelled"] = 1.0 - total[:, 0]
        smoothed = labels * (1 - self.label_smoothing)
        smoothed = smoothed + total * self.label_smoothing / logits.shape[-1]
        weighted = _weighted(smoothed, self.class_weights)
        losses = -jnp.sum(weighted * jax.nn.log_softmax(logits), axis=-1)
        return losses, {"accuracy": is_correct(logits, labels), **metrics}

    @classmethod
    def balanced(cls, counts: Int[np.ndarray, " C"], names: Sequence[str]) -> Objective:
        """Returns the objective in which all classes of the training set weigh alike.

        Class c of `counts[c]` of N images weighs N / (C * counts[c]), so that the mean
        weight of an image is 1 (scikit-learn's and Keras's "balanced").

        Raises:
            ValueError: a class has no image.
        """
        _check_counts(counts, names)
        return cls(class_weights=tuple((counts.mean() / counts).tolist()))


@dataclasses.dataclass(kw_only=True)
class SigmoidClassification(Objective):
    """Binary cross-entropy in nats, summed over the classes (arXiv:2006.07159).

    Labels are int [B], or float [B, C] with a value in 0..1 per class. A prediction is
    correct when the most probable class is one of the image's. `class_weights`, one a
    class, multiply the loss of the classes that an image has, not of those that it
    lacks (PyTorch's pos_weight). Of tags, int [B, K] padded with -1, an image without
    any has no loss, because nobody said what it does not show; the metric "unlabelled"
    is their share.
    """

    logits: ClassVar[Logits | None] = Logits.SIGMOID
    class_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_weights(self.class_weights)

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        logits = _logits(forward, batch)
        labels = presence(batch["label"], logits.shape[-1])
        present, absent = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        weighted = _weighted(labels, self.class_weights)
        losses = -jnp.sum(weighted * present + (1 - labels) * absent, axis=-1)
        metrics = {"accuracy": is_correct(logits, labels)}
        if are_tags(batch["label"]):
            labelled = labels.any(axis=-1)
            losses = losses * labelled
            metrics["unlabelled"] = 1.0 - labelled
        return losses, metrics

    @classmethod
    def balanced(
        cls, counts: Int[np.ndarray, " C"], names: Sequence[str], num_images: int
    ) -> Objective:
        """Returns the objective in which images with and without a class weigh alike.

        Class c, which `counts[c]` of N images have, weighs (N - counts[c]) / counts[c].

        Raises:
            ValueError: a class has no image, or all.
        """
        _check_counts(counts, names)
        everywhere = [n for n, c in zip(names, counts, strict=True) if c == num_images]
        if everywhere:
            raise ValueError(
                f"All {num_images:,} training images have {some(everywhere)}, so there "
                "is nothing to weigh; leave such a class out, or class_weights."
            )
        return cls(class_weights=tuple(((num_images - counts) / counts).tolist()))


def are_tags(labels: Array | np.ndarray) -> bool:
    """Returns whether labels are a few tags an image: int [B, K], padded with -1."""
    return labels.ndim == 2 and jnp.issubdtype(labels.dtype, jnp.integer)


def presence(labels: Array, num_classes: int) -> Float[Array, "B {num_classes}"]:
    """Returns float32 labels [B, C] of tags, too: 1.0 for each that an image has.

    Raises:
        ValueError: float labels have a number of classes other than the head's.
    """
    if not are_tags(labels):
        return as_distribution(labels, num_classes)
    # Tag by tag, which XLA fuses: [B, K, C] would be K times the logits.
    found = jnp.zeros((len(labels), num_classes), bool)
    for tag in labels.T:
        found |= tag[:, None] == jnp.arange(num_classes)
    return found.astype(jnp.float32)


def as_distribution(
    labels: Int[Array, " B"] | Int[Array, "B K"] | Float[Array, "B C"],
    num_classes: int,
) -> Float[Array, "B {num_classes}"]:
    """Returns float32 labels [B, C]; integer labels become one-hot.

    Raises:
        ValueError: float labels have a number of classes other than the head's, or
            labels are tags, whose sum is not 1.
    """
    if are_tags(labels):
        raise ValueError(
            f"Labels of shape {labels.shape} are several tags an image; use "
            "SoftmaxClassification(share_labels=True), which gives each of k tags "
            "1 / k, or SigmoidClassification()."
        )
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


def _weighted(
    labels: Float[Array, "B C"], weights: tuple[float, ...]
) -> Float[Array, "B C"]:
    if not weights:
        return labels
    if len(weights) != labels.shape[-1]:
        raise ValueError(
            f"class_weights has {len(weights)} numbers for {labels.shape[-1]} classes; "
            "give one a class, in their order, or none."
        )
    return labels * jnp.float32(weights)


def _check_weights(weights: tuple[float, ...]) -> None:
    wrong = [w for w in weights if not 0 <= w < math.inf]
    if wrong or (weights and not any(weights)):
        raise ValueError(
            f"class_weights={some(map(str, weights))}: weights are finite numbers from "
            "0, not all 0, one a class; 1.0 changes nothing."
        )


def _check_counts(counts: Int[np.ndarray, " C"], names: Sequence[str]) -> None:
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"No training image has {some(empty)}, so no weight balances the classes; "
            "leave such a class out, or give class_weights as a list."
        )


def _logits(forward: Forward, batch: Batch) -> Float[Array, "B C"]:
    return forward(image=batch["image"])["logits"].astype(jnp.float32)
