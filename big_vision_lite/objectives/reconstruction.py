"""Reconstruction of the pixels of masked patches (arXiv:2111.06377, section 3)."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.objectives.collapse import spread
from big_vision_lite.types import Batch, Forward, Objective

EPSILON = 1e-6


@dataclasses.dataclass(kw_only=True)
class MaskedReconstruction(Objective):
    """Mean squared error of a MaskedAutoencoder's pixels, over masked patches alone.

    With `norm_pix` each target patch is standardised by its own mean and deviation:
    (x - mean) / sqrt(variance + 1e-6), the variance with N - 1. 1 is then the loss of
    predicting the mean, whatever the images. Metrics: those of `collapse.spread`.
    """

    norm_pix: bool = True

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        outputs = forward(image=batch["image"])
        target, masked = outputs["patches"], outputs["masked"]
        if self.norm_pix:
            mean, deviation = patch_scale(target)
            target = (target - mean) / deviation
        error = jnp.square(outputs["reconstruction"] - target).mean(axis=-1)
        losses = (error * masked).sum(axis=1) / masked.sum(axis=1)
        return losses, spread(outputs["pooled"])

    def patches(self, outputs: Mapping[str, Array]) -> Float[Array, "B N P"]:
        """Returns the predicted patches in the units of the scaled image.

        With `norm_pix` mean and deviation of each patch, which the network does not
        predict, are the true ones.
        """
        predicted = outputs["reconstruction"]
        if not self.norm_pix:
            return predicted
        mean, deviation = patch_scale(outputs["patches"])
        return predicted * deviation + mean


def patch_scale(
    patches: Float[Array, "B N P"],
) -> tuple[Float[Array, "B N 1"], Float[Array, "B N 1"]]:
    """Returns each patch's mean and its deviation, sqrt(variance + 1e-6)."""
    mean = patches.mean(axis=-1, keepdims=True)
    variance = jnp.var(patches, axis=-1, keepdims=True, ddof=1)
    return mean, jnp.sqrt(variance + EPSILON)
