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


class Distance(enum.StrEnum):
    """How features of student and teacher are compared.

    COSINE  1 - cosine of adapted and teacher's features (arXiv:2312.06709)
    PHI_S   mean square over the dimensions, to the teacher's features standardised by
            PHI-S (arXiv:2410.01680): no teacher outweighs another by its scale; the
            model has standardise_steps
    """

    COSINE = "cosine"
    PHI_S = "phi_s"


@dataclasses.dataclass(kw_only=True)
class LogitDistillation(Objective):
    """Divergence of a Distilled model's student from its teachers' class probabilities.

    temperature^2 * KL(teachers at the temperature || student at it), in nats
    (arXiv:1503.02531); several teachers are averaged as probabilities. Student and
    teachers see the same pixels, mixed alike: with Mixup(num_classes=None) and many
    epochs this is "patient and consistent" (arXiv:2106.05237), which needs no labels.
    `label_weight` w takes (1 - w) of that and w of the cross-entropy of the batch's
    labels. A student ViT with distillation_token learns from the teachers by that
    token's head and from labels by the class token's: with target=hard and label_weight
    0.5 this is DeiT's loss (arXiv:2012.12877, section 4). Metrics: agreement, the share
    of images where student and teachers choose the same class, and teacher_entropy.
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
        taught, labelled = logits, logits
        if "distillation_logits" in outputs:
            taught = outputs["distillation_logits"].astype(jnp.float32)
            labelled = outputs["class_logits"].astype(jnp.float32)
            if not self.label_weight:
                raise ValueError(
                    "The student's class token learns from labels alone, and "
                    "label_weight=0.0 gives it none; use "
                    "--config.objective.label_weight=0.5 and a source with labels, or "
                    "a student with distillation_token=false."
                )
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
        log_shares = jax.nn.log_softmax(taught / self.temperature)
        cross = -(target * log_shares).sum(axis=-1)
        losses = self.temperature**2 * (cross - entropy(target))
        metrics = {
            "agreement": (logits.argmax(-1) == target.argmax(-1)).astype(jnp.float32),
            "teacher_entropy": entropy(target),
        }
        if self.label_weight:
            labels = as_distribution(batch["label"], logits.shape[-1])
            known = -(labels * jax.nn.log_softmax(labelled)).sum(axis=-1)
            losses = (1 - self.label_weight) * losses + self.label_weight * known
            metrics["accuracy"] = is_correct(logits, labels)
        return losses, metrics


@dataclasses.dataclass(kw_only=True)
class FeatureDistillation(Objective):
    """Distance of a Distilled student's adapted features from its teachers' own.

    The mean of `distance` over the teachers; the model has adaptors=True. Any backbone
    teaches any other, on images without labels. Metrics: the distance to each teacher.
    """

    distance: Distance = Distance.COSINE

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        outputs = forward(image=batch["image"])
        distances = {}
        for name, teacher in teachers_of(outputs):
            adapted = adapted_to(outputs, name, self)
            if self.distance == Distance.COSINE:
                apart = 1 - (unit(adapted) * unit(teacher["pooled"])).sum(axis=-1)
            else:
                standard = name.replace("teacher", "standard")
                if standard not in outputs:
                    raise ValueError(
                        "distance=phi_s compares standardised features; use "
                        "--config.model.standardise_steps=50, the number of batches to "
                        "measure them on, or distance=cosine."
                    )
                square = jnp.square(adapted.astype(jnp.float32) - outputs[standard])
                apart = square.mean(axis=-1)
            distances[f"distance_{name}"] = apart
        losses = jnp.mean(jnp.stack(list(distances.values())), axis=0)
        return losses, distances


@dataclasses.dataclass(kw_only=True)
class QueueDistillation(Objective):
    """A Distilled student is as like to the images of a queue as its teacher is.

    The cosines of a teacher's features with those that it gave to the last images, the
    model's queue_length, over `temperature` are logits of as many pseudo-classes; the
    loss is the cross-entropy of the student's to the teacher's, in nats, the mean over
    the teachers (after arXiv:2101.04731, there with two temperatures). The queue holds
    this batch, too. Where features alone would be copied, here their neighbourhoods
    are. The model has adaptors=True. Metrics: teacher_entropy over the queue, and
    distance_<teacher>, 1 - cosine.
    """

    temperature: float = 0.07

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(
                f"QueueDistillation(temperature={self.temperature}) must be above 0."
            )

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        outputs = forward(image=batch["image"])
        losses, entropies, distances = [], [], {}
        for name, teacher in teachers_of(outputs):
            queue = name.replace("teacher", "queue")
            if queue not in outputs:
                raise ValueError(
                    "QueueDistillation compares images with a queue of them; use "
                    "--config.model.queue_length=8192, at most the number of images."
                )
            student = unit(adapted_to(outputs, name, self))
            theirs = unit(teacher["pooled"])
            empty = jnp.arange(len(outputs[queue])) >= outputs[f"{queue}_filled"]

            def logits(x: Array, rows: Array, empty: Array) -> Array:
                return jnp.where(empty, -1e9, x @ rows.T / self.temperature)

            target = jax.nn.softmax(logits(theirs, outputs[queue], empty))
            log_shares = jax.nn.log_softmax(logits(student, outputs[queue], empty))
            losses.append(-(target * log_shares).sum(axis=-1))
            entropies.append(entropy(target))
            distances[f"distance_{name}"] = 1 - (student * theirs).sum(axis=-1)
        metrics = {"teacher_entropy": jnp.mean(jnp.stack(entropies), axis=0)}
        return jnp.mean(jnp.stack(losses), axis=0), metrics | distances


def adapted_to(
    outputs: Mapping[str, Any], teacher: str, objective: Objective
) -> Float[Array, "B D"]:
    """Returns the student's features in the space of a teacher's.

    Raises:
        ValueError: the model has no adaptors.
    """
    adapted = teacher.replace("teacher", "adapted")
    if adapted not in outputs:
        raise ValueError(
            f"{type(objective).__name__} compares adapted features; use "
            "--config.model.adaptors=true."
        )
    return outputs[adapted]


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
