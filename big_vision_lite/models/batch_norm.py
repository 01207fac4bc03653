"""Batch norm over the global batch, or with the statistics that the weights bring."""

import enum

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.models.layers import Dtype

EPSILON = 1e-5
# Of the old average; torch calls the rest, 0.1, momentum.
MOMENTUM = 0.9


class Statistics(enum.StrEnum):
    """What training normalises with; evaluation takes the running averages."""

    # Mean and variance of the whole batch, on all devices together.
    BATCH = "batch"
    # The running averages as they are; they stay so. For fine-tuning.
    FROZEN = "frozen"


class BatchNorm(nn.Module, kw_only=True):
    """Returns scale * (x - mean) / sqrt(variance + 1e-5) + bias (arXiv:1502.03167).

    The running averages, "batch_stats/.../mean" and ".../variance", move by 0.1 of the
    way to every batch; the running variance is that of a sample, N / (N - 1) times the
    one that the batch is normalised with, as in torch (Flax's own keeps the latter).
    All statistics are float32. `first_scale` is where every scale starts.
    """

    statistics: Statistics = Statistics.BATCH
    first_scale: float = 1.0
    dtype: Dtype = Dtype.FLOAT32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], train: bool = False
    ) -> Float[Array, "B H W C"]:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.constant(self.first_scale), shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable(
            "batch_stats", "mean", jnp.zeros, shape, jnp.float32
        )
        running_variance = self.variable(
            "batch_stats", "variance", jnp.ones, shape, jnp.float32
        )
        mean, variance = running_mean.value, running_variance.value
        if train and self.statistics == Statistics.BATCH:
            count = x.size // x.shape[-1]
            if count == 1:
                raise ValueError(
                    "Batch norm got one value a channel: an image of "
                    f"{x.shape[1]}x{x.shape[2]} in a batch of {x.shape[0]} has no "
                    "variance. Use a larger batch or image, or "
                    "--config.model.statistics=frozen."
                )
            # In a jitted step x is the global batch, wherever its rows lie.
            mean = x.mean(axis=(0, 1, 2), dtype=jnp.float32)
            square = jnp.square(x.astype(jnp.float32)).mean(axis=(0, 1, 2))
            # In one pass over x; rounding must not make it negative.
            variance = jnp.maximum(square - jnp.square(mean), 0)
            sample = variance * (count / (count - 1))
            for running, new in ((running_mean, mean), (running_variance, sample)):
                new = jax.lax.stop_gradient(new)
                running.value = MOMENTUM * running.value + (1 - MOMENTUM) * new
        factor = scale * jax.lax.rsqrt(variance + EPSILON)
        return (x * factor + (bias - mean * factor)).astype(self.dtype)
