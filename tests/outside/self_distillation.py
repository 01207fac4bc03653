"""A student and its average as the teacher, after arXiv:2104.14294, from outside."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_vision_lite.models.vit import ViT
from big_vision_lite.types import Model, Objective


class Student(nn.Module, Model, kw_only=True):
    """A ViT and prototypes; "centre" is a running mean of the teacher's scores."""

    backbone: ClassVar = "encoder"

    encoder: ViT
    prototypes: int = 16

    def setup(self):
        self.projector = nn.Dense(self.prototypes)
        self.centre = self.variable(
            "centres", "centre", jnp.zeros, (self.prototypes,), jnp.float32
        )

    def __call__(self, image, *, train=False):
        pooled = self.encoder(image, train=train)["pooled"]
        return {
            "pooled": pooled,
            "scores": self.projector(pooled),
            "centre": self.centre.value,
        }

    def observe(self, scores, *, train=False):
        """Moves the centre a tenth of the way to the mean of the scores."""
        if train:
            self.centre.value = 0.9 * self.centre.value + 0.1 * scores.mean(axis=0)
        return {}


@dataclasses.dataclass(kw_only=True)
class SelfDistillation(Objective):
    """Cross-entropy of the student's view against the teacher's other view."""

    def __call__(self, forward, batch, rng):
        first, second = batch["views"][:, 0], batch["views"][:, 1]
        teacher = forward(image=first, params="ema")
        student = forward(image=second)
        temperature = 0.04 + 0.03 * forward.progress
        target = jax.nn.softmax((teacher["scores"] - teacher["centre"]) / temperature)
        losses = -(target * jax.nn.log_softmax(student["scores"] / 0.1)).sum(axis=-1)
        forward(method="observe", scores=teacher["scores"])
        return losses, {"temperature": temperature}
