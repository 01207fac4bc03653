"""Batch norm over the global batch, parts of it, or with the statistics of weights."""

import enum
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite import layout
from big_vision_lite.models.layers import Dtype, moments, of_all, shift_of

EPSILON = 1e-5
# Of the old average; torch calls the rest, 0.1, momentum.
MOMENTUM = 0.9


class Statistics(enum.StrEnum):
    """What training normalises with; evaluation takes the running averages."""

    # Mean and variance of the batch, on all devices together.
    BATCH = "batch"
    # The running averages as they are; they stay so. For fine-tuning.
    FROZEN = "frozen"


class BatchNorm(nn.Module, kw_only=True):
    """Returns scale * (x - mean) / sqrt(variance + 1e-5) + bias (arXiv:1502.03167).

    With `statistics_groups` = G every one of G equal parts of the batch, its rows in
    order, is normalised by itself (ghost batch norm, arXiv:1705.08741), on any number
    of devices; with a multiple of the devices no statistics travel between them.

    The running averages, "batch_stats/.../mean" and ".../variance", move by 0.1 of the
    way to every batch: to the average of the parts' means and that of their variances,
    which training divides by (how the means differ is left out; torch, whose parts are
    its devices', keeps those of the first). The running variance is that of a sample,
    N / (N - 1) times the one that the N values of a part are normalised with, as in
    torch (Flax's own keeps the latter). All statistics are float32. `first_scale` is
    where every scale starts.
    """

    statistics: Statistics = Statistics.BATCH
    statistics_groups: int = 1
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
        if not train or self.statistics == Statistics.FROZEN:
            mean, variance = running_mean.value, running_variance.value
            factor = scale * jax.lax.rsqrt(variance + EPSILON)
            return (x * factor + (bias - mean * factor)).astype(self.dtype)

        groups = self.statistics_groups
        count = _values(x, groups)
        parts = _in_parts(x, groups)
        shift = shift_of(parts, (1, 2, 3), running_mean.value)
        parts = parts.astype(jnp.float32)
        mean, variance = group_moments(parts, groups, shift)
        sample = variance * (count / (count - 1))
        for running, new in ((running_mean, mean), (running_variance, sample)):
            new = jax.lax.stop_gradient(new.mean(axis=0))
            running.value = MOMENTUM * running.value + (1 - MOMENTUM) * new
        factor = scale * jax.lax.rsqrt(variance + EPSILON)
        factor, offset = (
            jnp.repeat(y, len(parts) // groups, axis=0)[:, None, None, None]
            for y in (factor, bias - mean * factor)
        )
        y = (parts * factor + offset).astype(self.dtype)
        return layout.pin_batch(y.reshape(x.shape))


def group_moments(
    parts: Float[Array, "P b H W C"], groups: int, shift: Array | float
) -> tuple[Float[Array, "G C"], Float[Array, "G C"]]:
    """Returns mean and variance of every group of parts, computed about `shift`.

    Every device finds those of its parts; one gather, of two numbers a channel, tells
    them to the others, and none where every group lies on one device.
    """
    found = (y.reshape(len(parts), -1) for y in moments(parts, (1, 2, 3), shift))
    if len(parts) == groups:
        mean, variance = found
        return mean, variance
    both = layout.gather(jnp.stack(list(found)))
    mean, variance = both.reshape(2, groups, len(parts) // groups, -1)
    return of_all(mean, variance, axis=1)


def _in_parts(x: Float[Array, "B H W C"], groups: int) -> Float[Array, "P b H W C"]:
    """Splits the rows so that no part lies on two devices or in two groups."""
    shards = layout.batch_shards()
    parts = math.lcm(groups, shards)
    if len(x) % parts == 0:
        return layout.pin_batch(x.reshape(parts, len(x) // parts, *x.shape[1:]))
    # A batch that the devices do not share evenly, as where only shapes are traced.
    return x.reshape(groups, len(x) // groups, *x.shape[1:])


def _values(x: Float[Array, "B H W C"], groups: int) -> int:
    """Returns how many values a channel of a group has; refuses one and fractions."""
    batch, height, width, _ = x.shape
    if batch % groups:
        raise ValueError(
            f"statistics_groups={groups} does not divide a batch of {batch} into equal "
            "parts. Use --config.model.statistics_groups="
            f"{max(g for g in range(1, groups) if batch % g == 0)}, or another "
            "--config.data.batch_size."
        )
    rows = batch // groups
    if rows * height * width == 1:
        group = "a batch" if groups == 1 else f"each of {groups} groups"
        raise ValueError(
            f"Batch norm got one value a channel: an image of {height}x{width} in "
            f"{group} of {rows} has no variance. Use a larger batch or image, fewer "
            "groups, or --config.model.statistics=frozen."
        )
    return rows * height * width
