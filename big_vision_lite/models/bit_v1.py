"""ResNet v1.5 with group norm and standardised weights: big_vision's "bit".

arXiv:1512.03385 with the stride on the 3x3 convolution, norms after convolutions;
also the stem of hybrid vision transformers (`vit_variants.hybrid`; arXiv:2010.11929).
"""

import enum
import functools
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from big_vision_lite.models.bit import DEPTHS
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


class Standardisation(enum.StrEnum):
    """The formula that standardises weights k of variance v."""

    # (k - mean) / (sqrt(v) + 1e-5): big_vision and vision_transformer.
    OUTSIDE_ROOT = "outside_root"
    # (k - mean) / sqrt(v + 1e-8): timm and Hugging Face.
    INSIDE_ROOT = "inside_root"


def standardise(
    kernel: Float[Array, "kh kw I O"], form: Standardisation
) -> Float[Array, "kh kw I O"]:
    """Returns weights with mean 0 and variance about 1 in each output channel."""
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    variance = jnp.square(kernel).mean(axis=(0, 1, 2))
    if form == Standardisation.OUTSIDE_ROOT:
        return kernel / (jnp.sqrt(variance) + 1e-5)
    return kernel * jax.lax.rsqrt(variance + 1e-8)


class StandardisedConv(nn.Module, kw_only=True):
    """A convolution without bias that standardises its weights in float32."""

    channels: int
    size: int
    stride: int
    standardisation: Standardisation
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel = standardise(kernel, self.standardisation).astype(self.dtype)
        x = x.astype(self.dtype)
        # As in TensorFlow: with a stride, even sizes get less on the left and top.
        return convolve(x, kernel, self.stride, "SAME")


class Unit(nn.Module, kw_only=True):
    """One residual unit: relu(x + f(x)) with 4 * `width` channels at the end."""

    width: int
    stride: int
    groups: int
    standardisation: Standardisation
    norm_epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W I"], train: bool = False
    ) -> Float[Array, "B h w O"]:
        conv = functools.partial(
            StandardisedConv, standardisation=self.standardisation, dtype=self.dtype
        )
        norm = functools.partial(
            GroupNorm,
            groups=self.groups,
            epsilon=self.norm_epsilon,
            dtype=self.dtype,
        )
        inner, channels, stride = self.width, 4 * self.width, self.stride
        y = conv(channels=inner, size=1, stride=1, name="conv1")(x)
        y = nn.relu(norm(name="gn1")(y))
        y = conv(channels=inner, size=3, stride=stride, name="conv2")(y)
        y = nn.relu(norm(name="gn2")(y))
        y = conv(channels=channels, size=1, stride=1, name="conv3")(y)
        # A scale of 0 makes every unit start as the relu of its shortcut.
        y = norm(first_scale=0.0, name="gn3")(y)
        if stride > 1 or x.shape[-1] != channels:
            x = conv(channels=channels, size=1, stride=stride, name="conv_proj")(x)
            x = norm(name="gn_proj")(x)
        return layout.pin_batch(nn.relu(x + y))


class Trunk(nn.Module, kw_only=True):
    """A convolutional trunk: scaled pixels to a grid, one cell per `stride_of` px.

    `stages` holds the number of units per stage, () for the root alone. Stage k,
    counted from 0, has `4 * width * 2**k` channels; every stage but the first halves
    the grid. Group norm has `groups` groups. timm and Hugging Face use
    standardisation="inside_root" and norm_epsilon=1e-5.
    """

    input_kernel: ClassVar[str] = "conv_root/kernel"
    standardises_kernels: ClassVar[bool] = True

    stages: tuple[int, ...]
    width: int = 64
    groups: int = 32
    standardisation: Standardisation = Standardisation.OUTSIDE_ROOT
    # Flax's default, which big_vision uses.
    norm_epsilon: float = 1e-6
    dtype: Dtype = Dtype.FLOAT32
    remat: Remat = Remat.NONE

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(width=self.width, groups=self.groups)
        if any(units < 1 for units in self.stages):
            raise ValueError(
                f"stages={self.stages} must hold the number of units of every stage, "
                "each at least 1, like (3, 4, 6, 3), or be ()."
            )
        # All normalised channel counts are multiples of the width.
        if self.width % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide width={self.width}; use a "
                f"multiple of {self.groups} as width, or other groups."
            )
        if self.norm_epsilon <= 0:
            raise ValueError(f"norm_epsilon={self.norm_epsilon} must be positive.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, image: Float[Array, "B H W C"], train: bool = False
    ) -> Float[Array, "B h w D"]:
        x = StandardisedConv(
            channels=self.width,
            size=7,
            stride=2,
            standardisation=self.standardisation,
            dtype=self.dtype,
            name="conv_root",
        )(image)
        x = GroupNorm(
            groups=self.groups,
            epsilon=self.norm_epsilon,
            dtype=self.dtype,
            name="gn_root",
        )(x)
        # Pads with -inf; after the relu, zeros would give the same maxima.
        x = nn.max_pool(nn.relu(x), (3, 3), strides=(2, 2), padding="SAME")
        x = layout.pin_batch(x)
        unit = rematerialised(Unit, self.remat)
        for stage, units in enumerate(self.stages):
            for index in range(units):
                x = unit(
                    width=self.width * 2**stage,
                    stride=2 if stage > 0 and index == 0 else 1,
                    groups=self.groups,
                    standardisation=self.standardisation,
                    norm_epsilon=self.norm_epsilon,
                    dtype=self.dtype,
                    name=f"block{stage + 1}_unit{index + 1:02d}",
                )(x, train)
        return x


def stride_of(trunk: Trunk) -> int:
    """Returns a trunk's stride in pixels; n px give ceil(n / stride) cells a side."""
    return 4 * 2 ** max(0, len(trunk.stages) - 1)


class BiTV1(nn.Module, Model, kw_only=True):
    """big_vision's "bit"; returns "grid" [B, h, w, D], "pooled", "image", "logits".

    "pooled" is the mean of the grid; "logits" need a head. `mean` and `std` are in
    units of 0..255, one value or one per channel.
    """

    published: ClassVar = ("R50x1",)
    layers: ClassVar = (r"trunk/(?:conv|gn)_root/.*", r"trunk/block(\d+)_unit(\d+)/.*")
    input_kernel = "trunk/conv_root/kernel"
    standardises_kernels = True

    trunk: Trunk
    head: Classifier | None = None
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)

    @classmethod
    def of(
        cls,
        size: str,
        *,
        head: Classifier | None = None,
        mean: tuple[float, ...] = (127.5,),
        std: tuple[float, ...] = (127.5,),
        **trunk: object,
    ) -> "BiTV1":
        """Builds a published size: BiTV1.of("R50x1", head=...).

        R26, R50, R101 and R152 take any width factor; `trunk` overrides Trunk's fields.
        """
        depth, _, factor = size.partition("x")
        if depth not in DEPTHS or not factor.isdecimal() or not int(factor):
            raise ValueError(
                f'No BiTV1 is called "{size}"; write DEPTHxFACTOR with a depth of '
                f'{", ".join(DEPTHS)}, like "R50x1".'
            )
        fields = dict(stages=DEPTHS[depth], width=64 * int(factor))
        return cls(trunk=Trunk(**{**fields, **trunk}), head=head, mean=mean, std=std)

    @nn.compact
    def __call__(
        self, image: Num[Array, "B H W C"], *, train: bool = False
    ) -> dict[str, Array]:
        image = scale_pixels(image, self.mean, self.std)
        x = self.trunk(image, train)
        pooled = x.mean(axis=(1, 2), dtype=jnp.float32)
        outputs = {"image": image, "grid": x, "pooled": pooled}
        if self.head is not None:
            outputs |= self.head(pooled)
        return outputs
