"""Patch kernels and positions at other sizes than they are stored in (FlexiViT)."""

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)


def resize_kernel(
    kernel: Float[AnyArray, "p p C D"], new_patch: int
) -> Float[AnyArray, "q q C D"]:
    """Returns the kernel of patches of `new_patch` px that gives the tokens of before.

    The pseudo-inverse resize of arXiv:2212.08013, section 3.4: a patch enlarged
    bilinearly gets the token that the small patch had, exactly. To smaller patches it
    is the least-squares answer, off by the order of the tokens themselves on patches
    that are not smooth, and the way back does not restore the kernel: keep the one
    that was trained and resize it at use.
    """
    old_patch = kernel.shape[0]
    if new_patch == old_patch:
        return kernel
    # Images are resized along rows and columns apart, so the inverse comes apart too.
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
    other programs have other forms, with other numbers.
    """
    shape = (*grid, positions.shape[-1])
    return jax.image.resize(positions, shape, "linear", antialias=True)


def bilinear(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Returns the matrix that resizes a row of `old` px to `new`.

    Half-pixel centres and no antialiasing, as in the code of FlexiViT; with
    antialiasing the answer for smaller patches would be another one.
    """
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    # One unit image a column: np.interp of it is its bilinear resize.
    return np.stack(
        [np.interp(centres, np.arange(old), unit) for unit in np.eye(old)], axis=1
    )


@functools.cache
def _inverse_of_resize(old: int, new: int) -> np.ndarray:
    return np.linalg.pinv(bilinear(old, new).T)
