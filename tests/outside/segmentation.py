"""A class for every pixel: a mask that moves with its image, from outside."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from big_vision_lite.models.vit import ViT
from big_vision_lite.types import Model, Objective


class Segmenter(nn.Module, Model, kw_only=True):
    """A linear layer on the grid of a ViT; "mask_logits" [B, H, W, classes]."""

    backbone: ClassVar = "encoder"

    encoder: ViT
    num_classes: int = 2

    @nn.compact
    def __call__(self, image, *, train=False):
        grid = self.encoder(image, train=train)["grid"]
        logits = nn.Dense(self.num_classes, name="classes")(grid)
        shape = (*image.shape[:3], self.num_classes)
        return {"mask_logits": jax.image.resize(logits, shape, "bilinear")}


@dataclasses.dataclass(kw_only=True)
class PixelClassification(Objective):
    """Cross-entropy of every pixel, in nats."""

    def __call__(self, forward, batch, rng):
        logits = forward(image=batch["image"])["mask_logits"]
        mask = batch["mask"].reshape(logits.shape[:3])
        log_p = jax.nn.log_softmax(logits)
        losses = -jnp.take_along_axis(log_p, mask[..., None], axis=-1)[..., 0]
        correct = logits.argmax(axis=-1) == mask
        return losses.mean(axis=(1, 2)), {"accuracy": correct.mean(axis=(1, 2))}


@dataclasses.dataclass(kw_only=True)
class IntersectionOverUnion:
    """The mean over classes of intersection over union, from a confusion matrix."""

    source: object
    num_classes: int = 2
    every_steps: int = 2
    batch_size: int = 8

    def prepare(self, context):
        def confusion(forward, batch, rng):
            logits = forward(image=batch["image"])["mask_logits"]
            mask = batch["mask"].reshape(logits.shape[:3])
            both = mask * self.num_classes + logits.argmax(axis=-1)
            counts = jnp.zeros((len(mask), self.num_classes**2), jnp.int32)
            rows = jnp.arange(len(mask))[:, None]
            counts = counts.at[rows, both.reshape(len(mask), -1)].add(1)
            return {"counts": counts.reshape(-1, self.num_classes, self.num_classes)}

        step = context.make_eval_step(confusion)
        where = (self.source, context.preprocess, self.batch_size)
        context.check_step(step, *where, keys=("mask",))

        def run(state):
            counts = context.sums(step, state, *where)["counts"]
            hits = np.diagonal(counts)
            union = counts.sum(axis=0) + counts.sum(axis=1) - hits
            return {
                "mean_iou": (hits / np.maximum(union, 1)).mean(),
                "pixels": counts.sum(),
            }

        return run
