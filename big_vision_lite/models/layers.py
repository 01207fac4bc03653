"""What every model family shares: compute dtype, pixel scaling, norms."""

import dataclasses
import enum
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num


class Dtype(enum.StrEnum):
    """Compute dtype; parameters, norm statistics, pooled and logits stay float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Remat(enum.StrEnum):
    """What the backward pass recomputes instead of keeping it in memory."""

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


def layer_norm(dtype: Dtype, name: str, epsilon: float = 1e-6) -> nn.LayerNorm:
    """Returns the norm of transformers, with statistics in float32.

    The variance is E[x^2] - E[x]^2, in one pass. Measured, ViT-S/16 on XLA:CPU: with
    the two-pass form XLA fuses the sum of all earlier blocks into each later norm and
    computes it again there, at depth 12 1.7 times the time and 2.5 times the compile
    time; an optimization_barrier on the sum is dropped before fusion and changes
    nothing. tests/test_flops.py would see it.
    """
    return nn.LayerNorm(epsilon=epsilon, use_fast_variance=True, dtype=dtype, name=name)


class Dense(nn.Module, kw_only=True):
    """Returns x @ kernel + bias over the last axis of x, in the compute dtype."""

    features: int
    dtype: Dtype = Dtype.FLOAT32
    bias_init: Callable[..., Array] = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        bias = self.param("bias", self.bias_init, (self.features,))
        return add_bias(x.astype(self.dtype) @ kernel.astype(self.dtype), bias)


def add_bias(
    x: Float[Array, "*B D"], bias: Float[Array | np.ndarray, "..."]
) -> Float[Array, "*B D"]:
    """Adds a bias in float32 and returns the dtype of x.

    Its gradient, a sum over all rows, then is one in float32: in bfloat16 it would lose
    most rows, and takes XLA:TPU 1.8 times the cycles.
    """
    return (x.astype(jnp.float32) + bias).astype(x.dtype)


def rematerialised(block: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """Wraps a block class called as `block(...)(x, train)`."""
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
    """Raises ValueError for the first field with a value that its enum does not have.

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
