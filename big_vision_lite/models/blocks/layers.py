"""Layers that all model families share: pixel scaling, norms, dense, convolution."""

import dataclasses
import enum

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from big_vision_lite.runtime import layout


class Dtype(enum.StrEnum):
    """Compute dtype; parameters, norm statistics, "pooled", "logits" stay float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Remat(enum.StrEnum):
    """The activations that the backward pass recomputes instead of storing."""

    NONE = "none"
    # Keeps the results of matrix products with weights, recomputes the cheap rest.
    DOTS = "dots"
    # Keeps the input of every block and recomputes the block: +33 % of the FLOPs.
    FULL = "full"


def scale_pixels(
    image: Num[Array, "B H W C"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W C"]:
    """Returns (image - mean) / std in float32; all three are in units of 0..255.

    Raises:
        ValueError: integers other than uint8, `mean` or `std` for another number of
            channels, or `std` not positive.
    """
    if image.dtype != jnp.uint8 and not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(
            f"The model got an image of {image.dtype}; it takes uint8, or floats in "
            "the same units 0..255. Convert it with image.astype(np.uint8)."
        )
    channels = image.shape[-1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise ValueError(
                f"model.{name} has {len(values)} values for images of {channels} "
                f"channels; give 1 value or {channels}."
            )
    if min(std) <= 0:
        raise ValueError(f"model.std={std} must be positive; it divides the pixels.")
    scaled = image.astype(jnp.float32) - jnp.asarray(mean, jnp.float32)
    return scaled / jnp.asarray(std, jnp.float32)


def moments(
    x: Float[Array, "..."], axes: tuple[int, ...], shift: Array | float
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns mean and variance over `axes`, each axis left with size 1, in one pass.

    E[x^2] - E[x]^2 loses the variance if the mean is many deviations from 0 (off by
    3e-2 at 100). Subtracting a shift near the mean avoids that; the result is the same.
    """
    centred = x - shift
    mean = centred.mean(axes, keepdims=True)
    variance = jnp.square(centred).mean(axes, keepdims=True) - jnp.square(mean)
    # Rounding must not make it negative.
    return mean + shift, jnp.maximum(variance, 0)


def shift_of(
    x: Float[Array, "..."], axes: tuple[int, ...], known: Array | float = 0.0
) -> Array | float:
    """Returns a shift for `moments`: the first value of x, or `known` for bfloat16.

    With `known`, XLA:TPU sums in the kernel that computes x. Estimated for v5e (libtpu
    0.0.42.1), not run: the first value costs ViT-S/16 12 % more bytes, BiTV1 15 %.
    bfloat16 itself loses more: 0.3 deviations if the mean is 100 of them.
    """
    if x.dtype == jnp.bfloat16:
        return known
    first = x[tuple(slice(0, 1 if a in axes else None) for a in range(x.ndim))]
    # The moments do not depend on the shift, so it has no gradient.
    return jax.lax.stop_gradient(first)


def of_all(
    mean: Float[Array, "*parts"], variance: Float[Array, "*parts"], axis: int
) -> tuple[Float[Array, "*all"], Float[Array, "*all"]]:
    """Returns the moments of the union of equal parts from those of the parts."""
    whole = mean.mean(axis, keepdims=True)
    between = jnp.square(mean - whole).mean(axis)
    return whole.squeeze(axis), variance.mean(axis) + between


class LayerNorm(nn.Module, kw_only=True):
    """Layer norm per token: scale * (x - mean) / sqrt(variance + epsilon) + bias."""

    epsilon: float = 1e-6
    dtype: Dtype = Dtype.FLOAT32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        shift, x = shift_of(x, (x.ndim - 1,)), x.astype(jnp.float32)
        mean, variance = moments(x, (x.ndim - 1,), shift)
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale
        return ((x - mean) * factor + bias).astype(self.dtype)


class GroupNorm(nn.Module, kw_only=True):
    """Group norm of an image over H, W and a group of channels (arXiv:1803.08494).

    `first_scale` is the initial value of every scale.
    """

    groups: int
    epsilon: float
    first_scale: float = 1.0
    dtype: Dtype = Dtype.FLOAT32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.constant(self.first_scale), shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        shift, x = shift_of(x, (1, 2)), x.astype(jnp.float32)
        # Per channel, then per group: the large array keeps its four axes.
        parts = [
            y.reshape(len(x), self.groups, shape[0] // self.groups)
            for y in moments(x, (1, 2), shift)
        ]
        mean, variance = (
            jnp.repeat(y, shape[0] // self.groups, axis=-1)[:, None, None]
            for y in of_all(*parts, axis=-1)
        )
        factor = scale * jax.lax.rsqrt(variance + self.epsilon)
        return (x * factor + (bias - mean * factor)).astype(self.dtype)


def layer_norm(dtype: Dtype, name: str, epsilon: float = 1e-6) -> LayerNorm:
    """Returns a named layer norm, with statistics in float32."""
    return LayerNorm(epsilon=epsilon, dtype=dtype, name=name)


class Dense(nn.Module, kw_only=True):
    """Dense layer: x @ kernel + bias over the last axis of x, in the compute dtype.

    Biases start normally distributed, with standard deviation `bias_deviation`.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype = Dtype.FLOAT32
    bias_deviation: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        start = nn.initializers.normal(self.bias_deviation)
        return add_bias(y, self.param("bias", start, (self.features,)))


def convolve(
    x: Float[Array, "B H W I"],
    kernel: Float[Array, "h w J O"],
    stride: int,
    padding: tuple[tuple[int, int], tuple[int, int]] | str,
    groups: int = 1,
) -> Float[Array, "B y x O"]:
    """Returns the convolution of x; each of `groups` reads J = I / groups channels.

    Also for 1x1 kernels: as matrix products, XLA:GPU lays activations out by channels
    and moves 1.32 times the bytes in a step of BiT-R50x1 on an H100.
    """
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def product(
    x: Float[Array | np.ndarray, "*B I"], kernel: Float[Array | np.ndarray, "I O"]
) -> Float[Array, "*B O"]:
    """Returns x @ kernel as a product of two matrices, whatever the axes of x.

    The kernel's gradient then is one, too; with more axes, XLA:CPU transposes x and
    recomputes all that led to it. XLA:TPU compiles both forms to the same program,
    except where parameters are gathered by hand: there x keeps its axes, or a step of
    ViT-S/16 on a v5e (fsdp=8, 4 micro-batches) would move 1.06 times the bytes.
    """
    if layout.gathers_by_hand():
        return jnp.matmul(x, kernel)
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], -1)


def add_bias(
    x: Float[Array, "*B D"], bias: Float[Array | np.ndarray, "..."]
) -> Float[Array, "*B D"]:
    """Adds a bias in float32 and returns the dtype of x.

    The bias's gradient is then summed over all rows in float32: in bfloat16 the sum
    would lose most rows, and take XLA:TPU 1.8 times the cycles.
    """
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


def rematerialised(block: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """Wraps a block class, called as `block(...)(x, train)`, in `nn.remat`."""
    match remat:
        case Remat.NONE:
            return block
        case Remat.DOTS:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        case Remat.FULL:
            policy = jax.checkpoint_policies.nothing_saveable
    return nn.remat(block, policy=policy, static_argnums=(2,))


def check_rate(name: str, rate: float) -> None:
    """Raises ValueError unless 0 <= rate < 1."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name}={rate} is not a probability; use 0 <= {name} < 1.")


def check_positive(**numbers: int) -> None:
    """Raises ValueError for the first number below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number}: must be at least 1.")


def check_choices(module: nn.Module) -> None:
    """Raises ValueError for the first field whose value is not one of its enum.

    Fields are recognised by a default that is a member of a StrEnum.
    """
    for field in dataclasses.fields(module):
        if not isinstance(field.default, enum.StrEnum):
            continue
        value, choices = getattr(module, field.name), list(type(field.default))
        if value not in choices:
            raise ValueError(
                f'{field.name}="{value}" is not known; use one of {", ".join(choices)}.'
            )
