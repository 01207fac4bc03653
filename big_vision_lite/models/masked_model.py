"""What models share whose encoder, a ViT, sees only some patches of an image."""

import enum
import fractions
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from big_vision_lite.models.blocks import layers
from big_vision_lite.models.blocks.encoder import Encoder
from big_vision_lite.models.blocks.patches import grid_size, put, sincos
from big_vision_lite.models.vit import ViT
from big_vision_lite.runtime import layout
from big_vision_lite.types import Model


class Hidden(enum.StrEnum):
    """Which patches are hidden.

    RANDOM         each with the same chance (arXiv:2111.06377)
    OUTSIDE_BLOCK  all outside one rectangle of any place, which may leave the image at
                   one side and come back at the other (arXiv:2502.08769)
    """

    RANDOM = "random"
    OUTSIDE_BLOCK = "outside_block"


class MaskedModel(nn.Module, Model, kw_only=True):
    """Encodes the visible patches and decodes tokens at the places of all.

    Each image hides `mask_ratio` of its patches, drawn anew at every step; the visible
    ones are int(N * (1 - mask_ratio)). With `mask_block` b, squares of b x b patches
    are hidden or visible together. After training only the encoder is used, on all
    patches.
    """

    backbone: ClassVar = "encoder"
    head_modules: ClassVar = ()

    encoder: ViT
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mask_ratio: float = 0.75
    mask_block: int = 1
    hidden: Hidden = Hidden.RANDOM

    def __post_init__(self) -> None:
        layers.check_positive(
            decoder_width=self.decoder_width,
            decoder_depth=self.decoder_depth,
            decoder_heads=self.decoder_heads,
            mask_block=self.mask_block,
        )
        if not 0 < self.mask_ratio < 1:
            raise ValueError(
                f"mask_ratio={self.mask_ratio} is the share of hidden patches, between "
                "0 and 1; use 0.75."
            )
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"decoder_width={self.decoder_width} does not divide over "
                f"decoder_heads={self.decoder_heads}."
            )
        if self.hidden == Hidden.OUTSIDE_BLOCK and self.mask_block > 1:
            raise ValueError(
                f"mask_block={self.mask_block} with hidden={self.hidden}: the visible "
                "patches are one block already; use mask_block=1, or hidden=random."
            )
        super().__post_init__()

    @nn.compact
    def decode(
        self, image: Num[Array, "B H W C"], train: bool
    ) -> tuple[Float[Array, "B N D"], dict[str, Array]]:
        """Returns tokens of the decoder at all places, and outputs of the encoder.

        These are "masked" [B, N], true where the encoder saw nothing, "image", the
        scaled input, and "pooled" of the visible patches.
        """
        grid = self._grid(image)
        number = grid[0] * grid[1]
        order = self._order(len(image), grid)
        visible = order[:, : self._visible(grid)]
        encoded = self.encoder(image, train=train, visible=visible)

        dtype = self.encoder.dtype
        parts = [encoded[name] for name in ("special", "tokens") if name in encoded]
        x = jnp.concatenate(parts, axis=1)
        x = layers.Dense(features=self.decoder_width, dtype=dtype, name="narrow")(x)
        before = x.shape[1] - visible.shape[1]
        token = self.param(
            "mask_token", nn.initializers.normal(0.02), (1, 1, self.decoder_width)
        )
        masked = (jnp.arange(number) != visible[:, :, None]).all(axis=1)
        patches = put(x[:, before:], visible, number)
        patches = jnp.where(masked[:, :, None], token.astype(dtype), patches)
        patches = patches + jnp.asarray(sincos(*grid, self.decoder_width), dtype)
        x = jnp.concatenate([x[:, :before], patches], axis=1)
        x = Encoder(
            depth=self.decoder_depth,
            mlp_dim=4 * self.decoder_width,
            num_heads=self.decoder_heads,
            dtype=dtype,
            attention=self.encoder.attention,
            activation=self.encoder.activation,
            norm_epsilon=self.encoder.norm_epsilon,
            remat=self.encoder.remat,
            name="decoder",
        )(layout.pin_batch(x), train)
        outputs = {
            "masked": masked,
            "image": encoded["image"],
            "pooled": encoded["pooled"],
        }
        return x[:, before:], outputs

    def _grid(self, image: Num[Array, "B H W C"]) -> tuple[int, int]:
        height, width = image.shape[1:3]
        rows, columns = grid_size(height, width, self.encoder.patch_size)
        block = self.mask_block
        if rows % block or columns % block:
            common = math.gcd(rows, columns)
            fitting = [str(b) for b in range(1, common + 1) if common % b == 0]
            raise ValueError(
                f"mask_block={block} does not divide a grid of {rows} x {columns} "
                f"patches; use one of {', '.join(fitting)}."
            )
        visible = self._visible((rows, columns))
        if not 0 < visible < rows * columns:
            blocks = rows * columns // block**2
            raise ValueError(
                f"mask_ratio={self.mask_ratio} of {blocks} blocks of patches leaves "
                f"{visible // block**2} visible; between 1 and {blocks - 1} must be: "
                f"use a ratio from {1 / blocks:.3g} to {1 - 1 / blocks:.3g}, smaller "
                "patches or a larger image."
            )
        return rows, columns

    def _visible(self, grid: tuple[int, int]) -> int:
        """Returns the number of patches that the encoder sees."""
        block = self.mask_block**2
        # As written: in binary 1 - 0.9 is below a tenth, and 10 patches would give 0.
        share = 1 - fractions.Fraction(str(self.mask_ratio))
        return math.floor(grid[0] * grid[1] // block * share) * block

    def _order(self, batch: int, grid: tuple[int, int]) -> Int[Array, "B N"]:
        """Returns the patches in random order; those of a block follow each other."""
        if self.hidden == Hidden.OUTSIDE_BLOCK:
            visible = self._visible(grid)
            return rolled_blocks(self.make_rng("mask"), batch, visible, grid)
        block = self.mask_block
        shape = (batch, grid[0] // block, grid[1] // block)
        noise = jax.random.uniform(self.make_rng("mask"), shape)
        noise = noise.repeat(block, axis=1).repeat(block, axis=2)
        return jnp.argsort(noise.reshape(batch, -1), axis=1, stable=True)


def rolled_blocks(
    rng: Array, batch: int, visible: int, grid: tuple[int, int]
) -> Int[Array, "B N"]:
    """Returns all patches of each image, first `visible` ones of one rectangle.

    Its height is drawn evenly from all that fit; it is filled row by row and rolled
    round the image.
    """
    rows, columns = grid
    keys = jax.random.split(rng, 3)
    least = -(-visible // columns)
    height = jax.random.randint(keys[0], (batch, 1), least, min(rows, visible) + 1)
    width = -(-visible // height)
    top = jax.random.randint(keys[1], (batch, 1), 0, rows)
    left = jax.random.randint(keys[2], (batch, 1), 0, columns)
    place = jnp.arange(rows * columns)
    row = (place // columns - top) % rows
    column = (place % columns - left) % columns
    inside = (row < height) & (column < width)
    later = rows * columns
    return jnp.argsort(jnp.where(inside, row * columns + column, later), axis=1)
