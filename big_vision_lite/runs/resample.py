"""Resamples parameters to another grid, patch size or number of channels."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from big_vision_lite.models.blocks import patches
from big_vision_lite.types import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """Resampled values, and a message on the change; None if nothing changed."""

    values: Any
    message: str | None = None


def fit(model: Family, name: str, values: Any, shape: tuple[int, ...]) -> Fitted:
    """Returns `values` resampled to another shape where possible, else unchanged.

    Position embeddings [rows, columns, D] of `model` can take another grid, its input
    kernel [h, w, C, D] another number of channels and, if it reads patches, another
    patch size.
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

    For fewer channels, weights are summed cyclically, channel c into c % channels: the
    output equals the old one of the image with its channels repeated cyclically to C,
    for a gray image that of C equal channels. For more, weights are repeated cyclically
    and divided by their number of copies: the output of an image whose channels repeat
    in this way stays the same.

    timm sums for one channel, else cuts or repeats and scales all by C / channels. Both
    agree for one channel and for multiples of C, else not even on gray images.
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
    """Returns a message on the change by `resize_channels` to the input kernel."""
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
