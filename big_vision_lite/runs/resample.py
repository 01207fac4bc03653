"""Resamples parameters to another grid, patch size or number of channels."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from big_vision_lite.models.blocks import patches
from big_vision_lite.types import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """The new values and a message of what was done; no message if nothing was."""

    values: Any
    message: str | None = None


def fit(model: Family, name: str, values: Any, shape: tuple[int, ...]) -> Fitted:
    """Returns `values` resampled to another shape where possible, else unchanged.

    Of parameters of `model`: learned positions [rows, columns, D] go to another grid,
    the kernel on the image [h, w, C, D] to another number of channels and, where it
    reads patches, to another patch size.
    """
    same_rank = len(values.shape) == len(shape) and values.shape[-1] == shape[-1]
    if not same_rank:
        return Fitted(values=values)
    if name in model.position_embeddings:
        return _fit_positions(values, shape)
    if name != model.input_kernel:
        return Fitted(values=values)
    messages = []
    if values.shape[2] != shape[2]:
        messages.append(channels_message(model, values.shape[2], shape[2]))
        values = resize_channels(values, shape[2])
    if model.reads_patches and values.shape != shape:
        old, new = values.shape[0], shape[0]
        exact = "" if new >= old else " Shrinking is not exact."
        messages.append(
            f"{name} for patches of {old} px, the model has {new}: resized so that "
            f"resized patches give the same tokens (arXiv:2212.08013).{exact}"
        )
        values = patches.resize_kernel(np.asarray(values), new)
    return Fitted(values=values, message=" ".join(messages) or None)


def _fit_positions(values: Any, shape: tuple[int, ...]) -> Fitted:
    old, new = values.shape, (shape[0], shape[1])
    return Fitted(
        values=np.asarray(patches.resample_positions(jnp.asarray(values), new)),
        message=f"Checkpoint grid {old[0]}x{old[1]}, model grid {new[0]}x{new[1]}: "
        "resizing position embedding (bilinear).",
    )


def resize_channels(kernel: Any, channels: int) -> np.ndarray:
    """Returns a kernel [h, w, C, D] adapted to another number of image channels.

    To fewer, weights are summed in turn, channel c to channel c % channels: an image
    gives what it gave with its channels repeated in turn to C, a gray one what it gave
    as C equal channels. To more it is the way back: weights are repeated in turn, each
    divided by how often, and an image whose channels so repeat gives what it gave.

    timm cuts or repeats and scales everything by C / channels, but sums to one: the
    same for one channel and for multiples of C, else gray images give something else.
    """
    kernel = np.asarray(kernel, np.float32)
    old = kernel.shape[2]
    if channels <= old:
        summed = [kernel[:, :, c::channels].sum(axis=2) for c in range(channels)]
        return np.stack(summed, axis=2)
    source = np.arange(channels) % old
    # Channels that are repeated more often than others weigh less.
    counts = np.bincount(source)
    return kernel[:, :, source] / counts[source].astype(np.float32)[:, None]


def channels_message(model: Family, old: int, new: int) -> str:
    """Returns the line on what `resize_channels` does to the input kernel."""
    if new == 1:
        done = "weights summed, so that gray images give what they gave"
    elif new < old:
        done = (
            f"weights summed in turn, channel c to c % {new}, so that images give what "
            f"they gave with their channels repeated to {old}"
        )
    else:
        done = (
            "weights repeated in turn and divided by how often, so that images whose "
            "channels so repeat give what they gave"
        )
    name = model.input_kernel
    message = f"{name} for {old} channels, images have {new}: {done}."
    if not model.standardises_kernels:
        return message
    return message + (
        " A BiT standardises its weights at use: there only gray images do, up to one "
        "factor for each channel of the output."
    )
