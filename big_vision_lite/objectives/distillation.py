"""Distillation: a student learns what frozen teachers say of the same images."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.objectives.classification import as_distribution, is_correct
from big_vision_lite.objectives.collapse import entropy
from big_vision_lite.objectives.views import unit
from big_vision_lite.types import Batch, Forward, Logits, Objective


class Target(enum.StrEnum):
    """What of the teachers' logits is learnt.

    SOFT  the mean of their probabilities at the temperature
    HARD  the class that they find most probable (DeiT, arXiv:2012.12877)
    """

    SOFT = "soft"
    HARD = "hard"


@dataclasses.dataclass(kw_only=True)
class LogitDistillation(Objective):
    """Divergence of a Distilled model's student from its teachers' class probabilities.

    temperature^2 * KL(teachers at the temperature || student at it), in nats
    (arXiv:1503.02531); several teachers are averaged as probabilities. Student and
    teachers see the same pixels, mixed alike: with Mixup(num_classes=None) and many
    epochs this is "patient and consistent" (arXiv:2106.05237), which needs no labels.
    `label_weight` w takes (1 - w) of that and w of the cross-entropy of the batch's
    labels. Metrics: agreement, the share of images where student and teachers choose
    the same class, and teacher_entropy.
    """

    logits: ClassVar[Logits | None] = Logits.SOFTMAX
    temperature: float = 1.0
    target: Target = Target.SOFT
    label_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.label_weight <= 1:
            raise ValueError(
                f"LogitDistillation(temperature={self.temperature}, "
                f"label_weight={self.label_weight}): the temperature is above 0, the "
                "weight in 0..1."
            )

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        outputs = forward(image=batch["image"])
        logits = outputs["logits"].astype(jnp.float32)
        shares = []
        for name, teacher in teachers_of(outputs):
            theirs = teacher["logits"].astype(jnp.float32)
            if theirs.shape != logits.shape:
                raise ValueError(
                    f"{name} has {theirs.shape[-1]} classes, the student "
                    f"{logits.shape[-1]}; give the student's head as many, in the same "
                    "order, or distil features: FeatureDistillation."
                )
            shares.append(jax.nn.softmax(theirs / self.temperature))
        target = jnp.mean(jnp.stack(shares), axis=0)
        if self.target == Target.HARD:
            target = jax.nn.one_hot(target.argmax(axis=-1), target.shape[-1])
        log_shares = jax.nn.log_softmax(logits / self.temperature)
        cross = -(target * log_shares).sum(axis=-1)
        losses = self.temperature**2 * (cross - entropy(target))
        metrics = {
            "agreement": (logits.argmax(-1) == target.argmax(-1)).astype(jnp.float32),
            "teacher_entropy": entropy(target),
        }
        if self.label_weight:
            labels = as_distribution(batch["label"], logits.shape[-1])
            known = -(labels * jax.nn.log_softmax(logits)).sum(axis=-1)
            losses = (1 - self.label_weight) * losses + self.label_weight * known
            metrics["accuracy"] = is_correct(logits, labels)
        return losses, metrics


@dataclasses.dataclass(kw_only=True)
class FeatureDistillation(Objective):
    """Distance of a Distilled student's adapted features from its teachers' own.

    1 - cosine, the mean over the teachers (RADIO's loss of summaries,
    arXiv:2312.06709); the model has adaptors=True. Any backbone teaches any other, on
    images without labels. Metrics: the distance to each teacher.
    """

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        outputs = forward(image=batch["image"])
        distances = {}
        for name, teacher in teachers_of(outputs):
            adapted = name.replace("teacher", "adapted")
            if adapted not in outputs:
                raise ValueError(
                    "FeatureDistillation compares adapted features; use "
                    "--config.model.adaptors=true."
                )
            cosine = unit(outputs[adapted]) * unit(teacher["pooled"])
            distances[f"distance_{name}"] = 1 - cosine.sum(axis=-1)
        losses = jnp.mean(jnp.stack(list(distances.values())), axis=0)
        return losses, distances


def teachers_of(outputs: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Array]]]:
    """Returns the name and the outputs of each teacher.

    Raises:
        ValueError: the model has no teachers.
    """
    found = [(n, x) for n, x in outputs.items() if n.startswith("teacher_")]
    if not found:
        raise ValueError(
            f"The model gives {', '.join(sorted(outputs))}, no teachers; distillation "
            "takes model=Distilled(student=..., teachers=(...,))."
        )
    return sorted(found)
