"""Changes weights for pixels in one range to expect another."""

from typing import NamedTuple

import numpy as np

from big_vision_lite.models.blocks import patches


class InputRange(NamedTuple):
    """The range of (pixels - mean) / std: one value or one a channel, in 0..255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# big_vision's [-1, 1].
SYMMETRIC = InputRange((127.5,), (127.5,))


def fold_input_range(
    kernel: np.ndarray,
    bias: np.ndarray,
    before: InputRange,
    after: InputRange,
    *,
    padding: int = 0,
    patch_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a stem's kernel [h, w, C, D] and bias [D] for pixels scaled as `after`.

    Up to rounding they compute what `kernel` and `bias` compute on pixels scaled as
    `before`, because every tap sees a pixel. `patch_size` is the size to which the
    model resizes the kernel, None for its own: the bias depends on it, because resized
    kernels need not have the same sum.

    Raises:
        ValueError: the stem pads with zeros, which mean another gray in each range, or
            a range is for another number of channels.
    """
    if padding:
        raise ValueError(
            f"The stem pads its input by {padding} px of zeros, which are not the same "
            "gray in both ranges; keep the weights and set the model's mean and std."
        )
    channels = kernel.shape[2]
    for values in (*before, *after):
        if len(values) not in (1, channels):
            raise ValueError(
                f"A mean or std has {len(values)} values, {values}, for a kernel of "
                f"{channels} channels; give 1 value or {channels}, or resize the "
                "channels first (resample.resize_channels)."
            )
    mean1, std1, mean2, std2 = (
        np.broadcast_to(np.asarray(values, np.float64), (channels,))
        for values in (*after, *before)
    )
    # x_before = x_after * std1 / std2 + (mean1 - mean2) / std2
    scaled = kernel * (std1 / std2)[:, None]
    used = patches.resize_kernel(kernel.astype(np.float64), patch_size or len(kernel))
    shift = np.einsum("hwcd,c->d", used, (mean1 - mean2) / std2)
    return scaled.astype(np.float32), (bias + shift).astype(np.float32)
