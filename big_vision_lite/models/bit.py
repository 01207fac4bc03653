"""BiT ResNet: pre-activation, group norm, standardised weights (arXiv:1912.11370)."""

import enum
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import (
    Dtype,
    GroupNorm,
    Remat,
    check_choices,
    check_positive,
    convolve,
    rematerialised,
    scale_pixels,
)
from big_vision_lite.runtime import layout
from big_vision_lite.types import Model

# Units per stage, arXiv:1603.05027; R26 is from the hybrids of arXiv:2106.10270.
DEPTHS = {
    "R26": (2, 2, 2, 2),
    "R50": (3, 4, 6, 3),
    "R101": (3, 4, 23, 3),
    "R152": (3, 8, 36, 3),
}


class Stem(enum.StrEnum):
    """The layers before the first stage."""

    # 7x7 convolution and 3x3 max-pooling, both with stride 2.
    LARGE = "large"
    # 3x3 convolution with stride 2: for images of 32 to 64 px.
    MEDIUM = "medium"
    # 3x3 convolution with stride 1: for images of 8 to 32 px.
    SMALL = "small"


class Block(enum.StrEnum):
    """The kind of residual unit."""

    # 1x1 to `width`, 3x3, 1x1 to 4 * `width` channels.
    BOTTLENECK = "bottleneck"
    # Two 3x3 convolutions of `width` channels.
    BASIC = "basic"


class PoolPadding(enum.StrEnum):
    """The padding of the large stem's max-pooling."""

    # The published BiT weights were trained with zeros.
    ZEROS = "zeros"
    # big_vision's bit_paper.
    NEGATIVE_INFINITY = "negative_infinity"


def standardise(kernel: Float[Array, "kh kw I O"]) -> Float[Array, "kh kw I O"]:
    """Returns weights with mean 0 and variance 1 in each output channel.

    Uses the population variance; eps = 1e-10 is inside the square root.
    """
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    return kernel * jax.lax.rsqrt(jnp.square(kernel).mean(axis=(0, 1, 2)) + 1e-10)


class StandardisedConv(nn.Module, kw_only=True):
    """A convolution without bias that standardises its weights in float32."""

    channels: int
    size: int
    stride: int = 1
    dtype: Dtype = Dtype.FLOAT32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel = standardise(kernel).astype(self.dtype)
        x = x.astype(self.dtype)
        # Equal padding on both sides at every size, unlike "SAME".
        padding = (self.size // 2, self.size // 2)
        return convolve(x, kernel, self.stride, (padding, padding))


class Unit(nn.Module, kw_only=True):
    """One residual unit: x + f(relu(norm(x)))."""

    block: Block
    width: int
    stride: int
    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W I"], train: bool = False
    ) -> Float[Array, "B h w O"]:
        def conv(
            name: str, y: Array, channels: int, size: int, stride: int = 1
        ) -> Array:
            return StandardisedConv(
                channels=channels,
                size=size,
                stride=stride,
                dtype=self.dtype,
                name=name,
            )(y)

        def norm_relu(name: str, y: Array) -> Array:
            return nn.relu(group_norm(self.groups, self.dtype, name)(y))

        u = norm_relu("gn1", x)
        if self.block == Block.BASIC:
            channels = self.width
            y = conv("conv1", u, self.width, 3, self.stride)
            y = conv("conv2", norm_relu("gn2", y), channels, 3)
        else:
            channels = 4 * self.width
            y = conv("conv1", u, self.width, 1)
            y = conv("conv2", norm_relu("gn2", y), self.width, 3, self.stride)
            y = conv("conv3", norm_relu("gn3", y), channels, 1)
        if self.stride > 1 or x.shape[-1] != channels:
            x = conv("conv_proj", u, channels, 1, self.stride)
        return layout.pin_batch(x + y)


class Stage(nn.Module, kw_only=True):
    """A sequence of units of one width; the first may halve the image."""

    units: int
    block: Block
    width: int
    stride: int
    groups: int
    dtype: Dtype
    remat: Remat

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"], train: bool) -> Array:
        unit = rematerialised(Unit, self.remat)
        for index in range(self.units):
            x = unit(
                block=self.block,
                width=self.width,
                stride=self.stride if index == 0 else 1,
                groups=self.groups,
                dtype=self.dtype,
                name=f"unit{index + 1:02d}",
            )(x, train)
        return x


class BiT(nn.Module, Model, kw_only=True):
    """BiT; returns "grid" [B, h, w, D], "pooled", "image"; with a head, "logits".

    `stages` holds the number of units per stage. Stage k, counted from 0, has
    `width * 2**k` channels, 4 times that after a bottleneck; every stage but the first
    halves the grid. "pooled" is the mean of the grid. Group norm has `groups` groups.
    `mean` and `std` are in units of 0..255, one value or one per channel.
    """

    published: ClassVar = ("R50x1", "R101x1", "R50x3", "R101x3", "R152x2", "R152x4")
    layers: ClassVar = ("stem/.*", r"block(\d+)/unit(\d+)/.*")
    free_fields: ClassVar = ("head", "dtype", "remat", "stages", "width")
    input_kernel = "stem/kernel"
    standardises_kernels = True

    stages: tuple[int, ...]
    width: int
    block: Block = Block.BOTTLENECK
    stem: Stem = Stem.LARGE
    pool_padding: PoolPadding = PoolPadding.ZEROS
    groups: int = 32
    head: Classifier | None = None
    dtype: Dtype = Dtype.FLOAT32
    remat: Remat = Remat.NONE
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(width=self.width, groups=self.groups)
        if not self.stages or min(self.stages) < 1:
            raise ValueError(
                f"stages={self.stages} must hold the number of units of every stage, "
                "each at least 1, like (3, 4, 6, 3)."
            )
        # All normalised channel counts are multiples of the width.
        if self.width % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide width={self.width}; use a "
                f"multiple of {self.groups} as width, or groups="
                f"{max(g for g in range(1, self.groups) if self.width % g == 0)}."
            )
        super().__post_init__()

    @classmethod
    def of(cls, size: str, **overrides: object) -> "BiT":
        """Builds a published size: BiT.of("R50x1", head=...), or "small".

        R26, R50, R101 and R152 take any width factor. "small" is made for images of
        8 to 32 px: three stages of one basic unit, 0.3 M parameters.
        """
        if size == "small":
            small = dict(
                stages=(1, 1, 1),
                width=32,
                block=Block.BASIC,
                stem=Stem.SMALL,
                groups=8,
            )
            return cls(**{**small, **overrides})
        depth, _, factor = size.partition("x")
        if depth not in DEPTHS or not factor.isdecimal() or not int(factor):
            raise ValueError(
                f'No BiT is called "{size}"; write DEPTHxFACTOR with a depth of '
                f'{", ".join(DEPTHS)}, like "R50x1", or "small".'
            )
        fields = dict(stages=DEPTHS[depth], width=64 * int(factor))
        return cls(**{**fields, **overrides})

    @nn.compact
    def __call__(
        self, image: Num[Array, "B H W C"], *, train: bool = False
    ) -> dict[str, Array]:
        image = scale_pixels(image, self.mean, self.std)
        x = StandardisedConv(
            channels=self.width,
            size=7 if self.stem == Stem.LARGE else 3,
            stride=1 if self.stem == Stem.SMALL else 2,
            dtype=self.dtype,
            name="stem",
        )(image)
        if self.stem == Stem.LARGE:
            x = max_pool(x, self.pool_padding)
        x = layout.pin_batch(x)
        for index, units in enumerate(self.stages):
            x = Stage(
                units=units,
                block=self.block,
                width=self.width * 2**index,
                stride=1 if index == 0 else 2,
                groups=self.groups,
                dtype=self.dtype,
                remat=self.remat,
                name=f"block{index + 1}",
            )(x, train)
        x = nn.relu(group_norm(self.groups, self.dtype, "norm")(x))
        pooled = x.mean(axis=(1, 2), dtype=jnp.float32)
        outputs = {"image": image, "grid": x, "pooled": pooled}
        if self.head is not None:
            outputs |= self.head(pooled)
        return outputs


def group_norm(groups: int, dtype: Dtype, name: str) -> GroupNorm:
    """Returns BiT's group norm: eps 1e-5, float32 statistics over H, W and a group."""
    return GroupNorm(groups=groups, epsilon=1e-5, dtype=dtype, name=name)


def max_pool(
    x: Float[Array, "B H W C"], padding: PoolPadding
) -> Float[Array, "B h w C"]:
    """Applies 3x3 max-pooling with stride 2 and one pixel of padding on each side."""
    around = 0.0 if padding == PoolPadding.ZEROS else -jnp.inf
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=around)
    return nn.max_pool(x, (3, 3), strides=(2, 2))
