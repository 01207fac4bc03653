"""Batch norm over the global batch, over parts of it, or with frozen statistics."""

import enum
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.models.blocks.layers import Dtype, moments, of_all, shift_of
from big_vision_lite.runtime import layout

EPSILON = 1e-5


class Statistics(enum.StrEnum):
    """The statistics used in training; evaluation uses the running averages."""

    # Mean and variance of the batch over all devices, or of `statistics_groups`.
    BATCH = "batch"
    # The running averages, left unchanged; for fine-tuning.
    FROZEN = "frozen"


class BatchNorm(nn.Module, kw_only=True):
    """Batch norm: scale * (x - mean) / sqrt(variance + 1e-5) + bias (arXiv:1502.03167).

    With `statistics_groups` = G, each of G equal parts of consecutive rows of the batch
    is normalised separately (ghost batch norm, arXiv:1705.08741), on any number of
    devices; if G is a multiple of that number, devices exchange no statistics.

    The running averages, "batch_stats/.../mean" and ".../variance", move by 0.1 of the
    way to every batch: to the average of the parts' means and that of their variances.
    The variance between the parts' means is left out, as in training. (torch, whose
    parts are its devices' batches, keeps the statistics of the first.) The running
    variance is the sample variance, N / (N - 1) times the one that normalises the N
    values of a part, as in torch; Flax keeps the latter. All statistics are float32.
    `momentum` is the weight of the old average; torch calls the rest, 0.1, momentum.
    `first_scale` is the initial value of every scale.
    """

    statistics: Statistics = Statistics.BATCH
    statistics_groups: int = 1
    momentum: float = 0.9
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
        mean, variance = group_moments(x, groups, running_mean.value)
        x = x.astype(jnp.float32)
        sample = variance * (count / (count - 1))
        for running, new in ((running_mean, mean), (running_variance, sample)):
            new = jax.lax.stop_gradient(new.mean(axis=0))
            running.value = self.momentum * running.value + (1 - self.momentum) * new
        factor = scale * jax.lax.rsqrt(variance + EPSILON)
        factor, offset = (_for_rows(y, len(x)) for y in (factor, bias - mean * factor))
        return (x * factor + offset).astype(self.dtype)


def group_moments(
    x: Float[Array, "B H W C"], groups: int, running_mean: Float[Array, " C"]
) -> tuple[Float[Array, "G C"], Float[Array, "G C"]]:
    """Returns mean and variance of groups of rows; `moments` explains the shifts."""
    if groups == 1 and x.dtype == jnp.bfloat16:
        # With one shift for all rows, one sum over all devices. Per image, as below,
        # XLA:TPU moves 1.1 % more bytes in a step (estimated for v5e).
        found = moments(x.astype(jnp.float32), (0, 1, 2), running_mean)
        return found[0].reshape(1, -1), found[1].reshape(1, -1)
    # Per image first: split into groups, x would lose the TPU's layout.
    shift = shift_of(x, (1, 2), running_mean)
    mean, variance = moments(x.astype(jnp.float32), (1, 2), shift)
    # Then per part (on one device, in one group), then per group: with one gather of
    # two numbers per channel, or none if every group is a part.
    parts = math.lcm(groups, layout.batch_shards())
    if len(x) % parts:
        # The batch does not divide over the devices, as when only shapes are traced.
        parts = groups
    mean, variance = of_all(*(_split(y, parts) for y in (mean, variance)), axis=1)
    if parts == groups:
        return mean, variance
    both = layout.gather(jnp.stack([mean, variance]))
    return of_all(*both.reshape(2, groups, parts // groups, -1), axis=1)


def _split(y: Float[Array, "B 1 1 C"], parts: int) -> Float[Array, "P b C"]:
    y = y.reshape(parts, len(y) // parts, -1)
    return layout.pin_batch(y) if parts % layout.batch_shards() == 0 else y


def _for_rows(y: Float[Array, "G C"], rows: int) -> Float[Array, "#B 1 1 C"]:
    """Repeats the values of each group for all its rows of the batch."""
    y = y[:, None, None]
    return y if len(y) == 1 else layout.pin_batch(jnp.repeat(y, rows // len(y), axis=0))


def _values(x: Float[Array, "B H W C"], groups: int) -> int:
    """Returns the values per channel of a group; ValueError for 1 or a fraction."""
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
