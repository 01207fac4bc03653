"""Patch embedding, for one patch size or many, and position embeddings."""

import enum
import functools
import math
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, Shaped

from big_vision_lite.models.blocks.layers import Dtype, add_bias, product, scale_pixels


def grid_size(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Returns (rows, columns) of patches; raises ValueError with sizes that divide."""
    if height % patch_size or width % patch_size or not (height and width):
        smaller, larger = (
            "x".join(
                str(
                    max(1, side // patch_size + more * bool(side % patch_size))
                    * patch_size
                )
                for side in (height, width)
            )
            for more in (0, 1)
        )
        raise ValueError(
            f"An image of {height}x{width} px does not divide into patches of "
            f"{patch_size} px; resize to {smaller} or {larger}, or change "
            "model.patch_size."
        )
    return height // patch_size, width // patch_size


def patchify(
    image: Shaped[Array, "B H W C"], patch_size: int
) -> Shaped[Array, "B h w P"]:
    """Cuts images into h x w patches of P = patch_size**2 * C values each."""
    batch, height, width, channels = image.shape
    rows, columns = grid_size(height, width, patch_size)
    x = image.reshape(batch, rows, patch_size, columns, patch_size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows, columns, patch_size * patch_size * channels)


def unpatchify(
    patches: Shaped[Array, "B h w P"], channels: int
) -> Shaped[Array, "B H W C"]:
    """Returns the images whose patches these are: the inverse of `patchify`."""
    batch, rows, columns, values = patches.shape
    side = math.isqrt(values // channels)
    x = patches.reshape(batch, rows, columns, side, side, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * side, columns * side, channels)


class PatchEmbedding(nn.Module, kw_only=True):
    """A projection of patches to tokens: a convolution with stride = kernel size.

    The kernel has the layout of that convolution, [p, p, C, D], but is applied as a
    matrix product, which every backend does best. p is `kernel_patch_size`, if
    given; every call then resizes the kernel to `patch_size` (FlexiViT). With `mean`
    and `std` the input is raw pixels, scaled first.
    """

    patch_size: int
    width: int
    dtype: Dtype = Dtype.FLOAT32
    kernel_patch_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @nn.compact
    def __call__(self, image: Num[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        side = self.kernel_patch_size or self.patch_size
        shape = (side, side, image.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        if self.mean is not None and self.std is not None:
            image = scale_pixels(image, self.mean, self.std)
        patches = patchify(image, self.patch_size).astype(self.dtype)
        kernel = resize_kernel(kernel, self.patch_size)
        kernel = kernel.reshape(-1, self.width).astype(self.dtype)
        return add_bias(product(patches, kernel), bias)


class Positions(enum.StrEnum):
    """The position embedding added to patch tokens."""

    # Fixed, arXiv:2205.01580.
    SINCOS = "sincos"
    # One vector per patch, arXiv:2010.11929.
    LEARNED = "learned"
    NONE = "none"


def sincos(rows: int, columns: int, width: int) -> Float[np.ndarray, "N D"]:
    """Returns sines and cosines of column, then row, at `width / 4` frequencies.

    The form of MoCo v3 (arXiv:2104.02057) and big_vision: the slowest frequency is
    exactly 1 / 10000. MAE's form differs by up to 0.05.

    Raises:
        ValueError: `width` is not a multiple of 4, or is 4.
    """
    if width % 4 or width < 8:
        raise ValueError(
            f"positions=sincos needs a width that is a multiple of 4 and at least 8, "
            f"got width={width}; use {max(8, width - width % 4)} or positions=learned."
        )
    frequencies = 10_000.0 ** -np.linspace(0, 1, width // 4)
    y = np.arange(rows)[:, None, None] * frequencies
    x = np.arange(columns)[None, :, None] * frequencies
    grid = (rows, columns, width // 4)
    parts = (np.sin(x), np.cos(x), np.sin(y), np.cos(y))
    table = np.concatenate([np.broadcast_to(part, grid) for part in parts], axis=-1)
    return table.reshape(rows * columns, width).astype(np.float32)


AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)


def resize_kernel(
    kernel: Float[AnyArray, "p p C D"], new_patch: int
) -> Float[AnyArray, "q q C D"]:
    """Returns the kernel resized to patches of `new_patch` px, preserving the tokens.

    Uses the pseudo-inverse resize of arXiv:2212.08013, section 3.4: a bilinearly
    enlarged patch gets exactly the token of the small patch. To smaller patches it is
    the least-squares solution; its error is of the order of the tokens on patches that
    are not smooth, and resizing back does not restore the kernel. So keep the trained
    kernel and resize it at use.
    """
    old_patch = kernel.shape[0]
    if new_patch == old_patch:
        return kernel
    # The resize is separable into rows and columns, and so is its inverse.
    inverse = _inverse_of_resize(old_patch, new_patch)
    if isinstance(kernel, np.ndarray):
        resized = np.einsum("qp,rs,psco->qrco", inverse, inverse, kernel, optimize=True)
        return resized.astype(kernel.dtype)
    inverse = jnp.asarray(inverse, jnp.float32)
    return jnp.einsum("qp,rs,psco->qrco", inverse, inverse, kernel, precision="highest")


def resample_positions(
    positions: Float[Array, "h w D"], grid: tuple[int, int]
) -> Float[Array, "H W D"]:
    """Resamples learned positions to another grid, as FlexiViT does on the fly.

    Bilinear with half-pixel centres, antialiased when shrinking (arXiv:2212.08013);
    other programs use other resizes and get other values.
    """
    shape = (*grid, positions.shape[-1])
    return jax.image.resize(positions, shape, "linear", antialias=True)


def bilinear(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the matrix that resizes a row of `old` px to `new`.

    Half-pixel centres and no antialiasing, as in the code of FlexiViT; antialiasing
    would change the result for smaller patches.
    """
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    # Column i is the bilinear resize, np.interp, of the unit row i.
    return np.stack(
        [np.interp(centres, np.arange(old), unit) for unit in np.eye(old)], axis=1
    )


@functools.cache
def _inverse_of_resize(old: int, new: int) -> np.ndarray:
    return np.linalg.pinv(bilinear(old, new).T)


def picked(
    x: Float[Array, "B N D"], places: Int[Array, "B K"]
) -> Float[Array, "B K D"]:
    """Returns the tokens of each image at its `places`.

    By a product with zeros and ones, exact: a TPU gathers rows, and above all adds
    their gradients back, one after the other.
    """
    chosen = jax.nn.one_hot(places, x.shape[1], dtype=x.dtype)
    return jnp.einsum("bkn,bnd->bkd", chosen, x, precision="highest")


def put(
    x: Float[Array, "B K D"], places: Int[Array, "B K"], number: int
) -> Float[Array, "B N D"]:
    """Returns `number` tokens an image: those of x at their `places`, else zeros."""
    chosen = jax.nn.one_hot(places, number, dtype=x.dtype)
    return jnp.einsum("bkn,bkd->bnd", chosen, x, precision="highest")
