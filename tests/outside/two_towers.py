"""Images and their captions, after SigLIP (arXiv:2303.15343), from outside."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_vision_lite.models.blocks.encoder import Encoder
from big_vision_lite.models.vit import ViT
from big_vision_lite.types import Model, Objective


class TwoTowers(nn.Module, Model, kw_only=True):
    """Unit vectors "image_embedding" and, where there is text, "text_embedding"."""

    backbone: ClassVar = "image_tower"

    image_tower: ViT
    width: int = 16
    vocabulary: int = 128

    def inputs(self, batch):
        text = {"text": batch["text"]} if "text" in batch else {}
        return {"image": batch["image"], **text}

    @nn.compact
    def __call__(self, image, text=None, *, train=False):
        pooled = self.image_tower(image, train=train)["pooled"]
        outputs = {
            "pooled": pooled,
            "image_embedding": _unit(nn.Dense(self.width, name="image_out")(pooled)),
        }
        if text is not None:
            x = nn.Embed(self.vocabulary, self.width, name="words")(text)
            x = Encoder(depth=1, mlp_dim=32, num_heads=2, name="text_tower")(x, train)
            outputs["text_embedding"] = _unit(
                nn.Dense(self.width, name="text_out")(x.mean(axis=1))
            )
            outputs["temperature"] = self.param(
                "temperature", nn.initializers.constant(jnp.log(10.0)), ()
            )
            outputs["bias"] = self.param("bias", nn.initializers.constant(-10.0), ())
        return outputs


@dataclasses.dataclass(kw_only=True)
class SigmoidContrast(Objective):
    """Binary cross-entropy of all pairs of the batch; rows of padding are no pairs."""

    needs_whole_batch: ClassVar = True

    def __call__(self, forward, batch, rng):
        outputs = forward(image=batch["image"], text=batch["text"])
        logits = outputs["image_embedding"] @ outputs["text_embedding"].T
        logits = logits * jnp.exp(outputs["temperature"]) + outputs["bias"]
        same = jnp.eye(len(logits))
        losses = -jax.nn.log_sigmoid(logits * (2 * same - 1))
        valid = batch.get("valid", jnp.ones(len(logits), bool))
        losses = jnp.where(valid[None, :], losses, 0).sum(axis=1)
        correct = logits.argmax(axis=1) == jnp.arange(len(logits))
        return losses, {"retrieved": correct}


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
