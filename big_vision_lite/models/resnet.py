"""ResNet v1.5 with batch norm, ResNeXt and Wide ResNet.

arXiv:1512.03385 with the stride on the 3x3 convolution instead of the 1x1 before it, as
in torchvision; arXiv:1611.05431; arXiv:1605.07146.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from big_vision_lite.models.bit import Block, Stem
from big_vision_lite.models.blocks.batch_norm import BatchNorm, Statistics
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import (
    Dtype,
    Remat,
    check_choices,
    check_positive,
    convolve,
    rematerialised,
    scale_pixels,
)
from big_vision_lite.runtime import layout
from big_vision_lite.types import Model

# Units per stage: arXiv:1512.03385, Table 1. All families share those of bottlenecks.
BASIC = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3)}
BOTTLENECK = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}
# Groups of the 3x3 convolution and channels per group in the first stage.
GROUPS = {
    # arXiv:1611.05431, Tables 1 and 4.
    "50_32x4d": (32, 4),
    "101_64x4d": (64, 4),
    # arXiv:1805.00932, Section 2.2; torchvision has 32x8d, too.
    "101_32x8d": (32, 8),
    "101_32x16d": (32, 16),
    "101_32x32d": (32, 32),
    "101_32x48d": (32, 48),
}
# Wide ResNet, arXiv:1605.07146, Table 8: inner channels twice ResNet's. torchvision
# has no source for 101_2.
WIDE = {"50_2": (1, 128), "101_2": (1, 128)}
SIZES = (
    *(f"R{depth}" for depth in (*BASIC, *BOTTLENECK)),
    *(f"X{size}" for size in GROUPS),
    *(f"W{size}" for size in WIDE),
)
# fan_out, and 2 for ReLU: arXiv:1502.01852, equation 14.
HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module, kw_only=True):
    """A convolution without bias, with equal padding on both sides."""

    channels: int
    size: int
    stride: int = 1
    groups: int = 1
    dtype: Dtype = Dtype.FLOAT32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        inputs = x.shape[-1] // self.groups
        kernel = self.param("kernel", HE, (self.size, self.size, inputs, self.channels))
        x, kernel = x.astype(self.dtype), jnp.asarray(kernel, self.dtype)
        # torch's padding; "SAME" differs at even sizes.
        padding = (self.size // 2, self.size // 2)
        return convolve(x, kernel, self.stride, (padding, padding), self.groups)


class Unit(nn.Module, kw_only=True):
    """One residual unit: relu(x + f(x))."""

    block: Block
    channels: int
    inner: int
    stride: int
    groups: int
    last_scale: float
    statistics: Statistics
    statistics_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W I"], train: bool = False
    ) -> Float[Array, "B h w O"]:
        def conv_norm(
            y: Array,
            name: str,
            channels: int,
            size: int,
            stride: int = 1,
            groups: int = 1,
            first_scale: float = 1.0,
        ) -> Array:
            y = Conv(
                channels=channels,
                size=size,
                stride=stride,
                groups=groups,
                dtype=self.dtype,
                name=f"conv{name}",
            )(y)
            return BatchNorm(
                statistics=self.statistics,
                statistics_groups=self.statistics_groups,
                first_scale=first_scale,
                dtype=self.dtype,
                name=f"norm{name}",
            )(y, train)

        stride, last = self.stride, self.last_scale
        if self.block == Block.BASIC:
            y = nn.relu(conv_norm(x, "1", self.inner, 3, stride))
            y = conv_norm(y, "2", self.channels, 3, first_scale=last)
        else:
            y = nn.relu(conv_norm(x, "1", self.inner, 1))
            y = nn.relu(conv_norm(y, "2", self.inner, 3, stride, self.groups))
            y = conv_norm(y, "3", self.channels, 1, first_scale=last)
        if stride > 1 or x.shape[-1] != self.channels:
            x = conv_norm(x, "_proj", self.channels, 1, stride)
        return layout.pin_batch(nn.relu(x + y))


class Stage(nn.Module, kw_only=True):
    """A sequence of units of one width; the first may halve the image."""

    units: int
    block: Block
    channels: int
    inner: int
    stride: int
    groups: int
    last_scale: float
    statistics: Statistics
    statistics_groups: int
    dtype: Dtype
    remat: Remat

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"], train: bool) -> Array:
        unit = rematerialised(Unit, self.remat)
        for index in range(self.units):
            x = unit(
                block=self.block,
                channels=self.channels,
                inner=self.inner,
                stride=self.stride if index == 0 else 1,
                groups=self.groups,
                last_scale=self.last_scale,
                statistics=self.statistics,
                statistics_groups=self.statistics_groups,
                dtype=self.dtype,
                name=f"unit_{index + 1:02d}",
            )(x, train)
        return x


class ResNet(nn.Module, Model, kw_only=True):
    """ResNet; returns "grid" [B, h, w, D], "pooled", "image"; with a head, "logits".

    `stages` holds the number of units per stage. Stage k, counted from 0, has
    `width * 2**k` channels, 4 times that after a bottleneck; every stage but the first
    halves the grid. A bottleneck's 3x3 convolution has `groups` groups of
    `width_per_group * 2**k * width / 64` channels each. "pooled" is the mean of the
    grid. `last_scale` is the initial scale of the last norm in a unit: 0 makes every
    unit start as the identity (arXiv:1706.02677, 5.1); torchvision starts at 1.
    Training computes batch statistics in `statistics_groups` equal groups of the batch:
    with 1, devices synchronise in every norm; with a multiple of their number, only for
    gradients, but a GPU moves more bytes (R50 on 8 H100: 69.5 GB per device instead of
    55.3, by XLA:GPU; compiled, not run). `mean` and `std` are in units of 0..255, one
    value or one per channel.
    """

    published: ClassVar = SIZES
    layers: ClassVar = ("stem(?:_norm)?/.*", r"stage_(\d+)/unit_(\d+)/.*")
    free_fields: ClassVar = (
        *("head", "dtype", "remat", "stages", "width"),
        *("statistics", "statistics_groups", "last_scale"),
    )
    input_kernel = "stem/kernel"

    stages: tuple[int, ...]
    width: int = 64
    stem_width: int = 64
    block: Block = Block.BOTTLENECK
    stem: Stem = Stem.LARGE
    groups: int = 1
    width_per_group: int = 64
    last_scale: float = 0.0
    statistics: Statistics = Statistics.BATCH
    statistics_groups: int = 1
    head: Classifier | None = None
    dtype: Dtype = Dtype.FLOAT32
    remat: Remat = Remat.NONE
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(
            width=self.width,
            stem_width=self.stem_width,
            groups=self.groups,
            width_per_group=self.width_per_group,
            statistics_groups=self.statistics_groups,
        )
        if self.statistics_groups > 1 and self.statistics == Statistics.FROZEN:
            raise ValueError(
                f"statistics_groups={self.statistics_groups} with statistics=frozen: "
                "nothing is computed of the batch. Use "
                "--config.model.statistics_groups=1."
            )
        if not self.stages or min(self.stages) < 1:
            raise ValueError(
                f"stages={self.stages} must hold the number of units of every stage, "
                "each at least 1, like (3, 4, 6, 3)."
            )
        basic = self.block == Block.BASIC
        if basic and (self.groups, self.width_per_group) != (1, 64):
            raise ValueError(
                f"groups={self.groups} and width_per_group={self.width_per_group} are "
                'those of a bottleneck; leave them out, or use block="bottleneck".'
            )
        if self.width * self.width_per_group < 64:
            raise ValueError(
                f"width={self.width} with width_per_group={self.width_per_group} "
                f"leaves a group of {self.width} * {self.width_per_group} / 64, less "
                "than 1 channel; make one of them larger."
            )
        super().__post_init__()

    @classmethod
    def of(cls, size: str, **overrides: object) -> "ResNet":
        """Builds a published size: ResNet.of("R50", head=...).

        R18 to R152 are ResNets, X50_32x4d to X101_64x4d ResNeXts and W50_2 and W101_2
        Wide ResNets (SIZES lists them all).
        """
        if size not in SIZES:
            raise ValueError(
                f'No ResNet is called "{size}"; use one of {", ".join(SIZES)}.'
            )
        family, name = size[0], size[1:]
        depth = name.partition("_")[0]
        fields: dict[str, Any] = {"stages": {**BASIC, **BOTTLENECK}[depth]}
        if depth in BASIC:
            fields["block"] = Block.BASIC
        if family != "R":
            table = GROUPS if family == "X" else WIDE
            fields["groups"], fields["width_per_group"] = table[name]
        return cls(**{**fields, **overrides})

    def channels(self, stage: int) -> int:
        """Returns the number of output channels of a stage, counted from 0."""
        return self.width * 2**stage * (1 if self.block == Block.BASIC else 4)

    def inner(self, stage: int) -> int:
        """Returns the channels of a stage's 3x3 convolutions; stages count from 0."""
        planes = self.width * 2**stage
        if self.block == Block.BASIC:
            return planes
        # Rounded down, as in torchvision.
        return int(planes * (self.width_per_group / 64)) * self.groups

    @nn.compact
    def __call__(
        self, image: Num[Array, "B H W C"], *, train: bool = False
    ) -> dict[str, Array]:
        image = scale_pixels(image, self.mean, self.std)
        x = Conv(
            channels=self.stem_width,
            size=7 if self.stem == Stem.LARGE else 3,
            stride=1 if self.stem == Stem.SMALL else 2,
            dtype=self.dtype,
            name="stem",
        )(image)
        x = BatchNorm(
            statistics=self.statistics,
            statistics_groups=self.statistics_groups,
            dtype=self.dtype,
            name="stem_norm",
        )(x, train)
        x = nn.relu(x)
        if self.stem == Stem.LARGE:
            # Pads with -inf. Flax declares padding as a string but accepts pairs.
            padding: Any = ((1, 1), (1, 1))
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
        x = layout.pin_batch(x)
        for index, units in enumerate(self.stages):
            x = Stage(
                units=units,
                block=self.block,
                channels=self.channels(index),
                inner=self.inner(index),
                stride=1 if index == 0 else 2,
                groups=self.groups,
                last_scale=self.last_scale,
                statistics=self.statistics,
                statistics_groups=self.statistics_groups,
                dtype=self.dtype,
                remat=self.remat,
                name=f"stage_{index + 1}",
            )(x, train)
        pooled = x.mean(axis=(1, 2), dtype=jnp.float32)
        outputs = {"image": image, "grid": x, "pooled": pooled}
        if self.head is not None:
            outputs |= self.head(pooled)
        return outputs
