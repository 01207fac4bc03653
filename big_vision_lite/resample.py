"""Parameters made to fit another grid, patch size or number of channels."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from big_vision_lite.models import flexi

POSITIONS = "position_embedding"
PATCHES = "patch_embedding/kernel"
# Convolutions that see the image itself.
STEMS = (PATCHES, "stem/kernel", "stem/conv/kernel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """The new values, and what was done; no message means that nothing could be."""

    values: Any
    message: str | None = None


def fit(name: str, values: Any, shape: tuple[int, ...]) -> Fitted:
    """Returns `values` in another shape where that has a meaning, else as they are.

    Learned positions [rows, columns, D] go to another grid, kernels on the image
    [h, w, C, D] to another number of channels and, of patches, to another patch size.
    """
    same_rank = len(values.shape) == len(shape) and values.shape[-1] == shape[-1]
    if not same_rank:
        return Fitted(values=values)
    if name.endswith(POSITIONS):
        return _fit_positions(values, shape)
    if not any(name == stem or name.endswith(f"/{stem}") for stem in STEMS):
        return Fitted(values=values)
    messages = []
    if values.shape[2] != shape[2]:
        messages.append(
            f"{name} for {values.shape[2]} channels, images have {shape[2]}: "
            + ("summed" if shape[2] == 1 else "repeated and scaled")
            + "."
        )
        values = resize_channels(values, shape[2])
    if name.endswith(PATCHES) and values.shape != shape:
        old, new = values.shape[0], shape[0]
        exact = "" if new >= old else " Shrinking is not exact."
        messages.append(
            f"{name} for patches of {old} px, the model has {new}: resized so that "
            f"resized patches give the same tokens (arXiv:2212.08013).{exact}"
        )
        values = flexi.resize_kernel(np.asarray(values), new)
    return Fitted(values=values, message=" ".join(messages) or None)


def _fit_positions(values: Any, shape: tuple[int, ...]) -> Fitted:
    old, new = values.shape, (shape[0], shape[1])
    return Fitted(
        values=np.asarray(flexi.resample_positions(jnp.asarray(values), new)),
        message=f"Checkpoint grid {old[0]}x{old[1]}, model grid {new[0]}x{new[1]}: "
        "resizing position embedding (bilinear).",
    )


def resize_channels(kernel: Any, channels: int) -> np.ndarray:
    """Makes a kernel [h, w, C, D] take images of another number of channels.

    To one channel the weights are summed: a gray image gives what it gave as C equal
    channels. To more they are repeated in turn and scaled by C / channels, so that
    equal channels give what they gave.
    """
    kernel = np.asarray(kernel, np.float32)
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeats = -(-channels // old)
    repeated = np.concatenate([kernel] * repeats, axis=2)[:, :, :channels]
    # Channels that are repeated more often than others weigh less.
    counts = np.bincount(np.arange(channels) % old, minlength=old)
    return repeated / counts[np.arange(channels) % old][:, None]
