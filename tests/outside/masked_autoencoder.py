"""A masked autoencoder, after arXiv:2111.06377, as somebody outside would write it."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from big_vision_lite.models.blocks.encoder import Encoder
from big_vision_lite.models.blocks.patches import sincos
from big_vision_lite.models.vit import ViT
from big_vision_lite.types import Model, Objective


class MaskedAutoencoder(nn.Module, Model, kw_only=True):
    """Encodes a quarter of the patches, decodes all; "predicted" [B, N, P P C]."""

    backbone: ClassVar = "encoder"

    encoder: ViT
    decoder_width: int = 16
    keep: float = 0.25

    @nn.compact
    def __call__(self, image, *, train=False):
        batch, height, width, channels = image.shape
        patch = self.encoder.patch_size
        rows, columns = height // patch, width // patch
        number = rows * columns
        noise = jax.random.uniform(self.make_rng("mask"), (batch, number))
        order = jnp.argsort(noise, axis=1)
        visible = order[:, : int(self.keep * number)]
        encoded = self.encoder(image, train=train, visible=visible)

        x = nn.Dense(self.decoder_width, name="narrow")(encoded["tokens"])
        token = self.param(
            "missing", nn.initializers.normal(0.02), (1, 1, self.decoder_width)
        )
        missing = (batch, number - x.shape[1], self.decoder_width)
        x = jnp.concatenate([x, jnp.broadcast_to(token, missing)], axis=1)
        x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[:, :, None], axis=1)
        x = x + sincos(rows, columns, self.decoder_width)
        x = Encoder(depth=1, mlp_dim=32, num_heads=2, name="decoder")(x, train)
        seen = (jnp.arange(number) == visible[:, :, None]).any(axis=1)
        return {
            "predicted": nn.Dense(patch * patch * channels, name="pixels")(x),
            "masked": ~seen,
            "image": encoded["image"],
        }


@dataclasses.dataclass(kw_only=True)
class Reconstruction(Objective):
    """Mean squared error of the pixels of masked patches."""

    patch_size: int = 4

    def __call__(self, forward, batch, rng):
        outputs = forward(image=batch["image"])
        image, patch = outputs["image"], self.patch_size
        size, rows, columns, channels = (
            len(image),
            image.shape[1] // patch,
            image.shape[2] // patch,
            image.shape[3],
        )
        target = image.reshape(size, rows, patch, columns, patch, channels)
        target = target.swapaxes(2, 3).reshape(outputs["predicted"].shape)
        error = jnp.square(outputs["predicted"] - target).mean(axis=-1)
        masked = outputs["masked"]
        losses = (error * masked).sum(axis=1) / masked.sum(axis=1)
        return losses, {"masked": masked.mean(axis=1)}
