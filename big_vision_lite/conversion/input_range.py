"""Weights for pixels in one range, changed to expect another."""

from typing import NamedTuple

import numpy as np


class InputRange(NamedTuple):
    """The model gets (pixels - mean) / std; one value or one a channel, in 0..255."""

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
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a stem's kernel [h, w, C, D] and bias [D] for pixels scaled as `after`.

    On them it computes what the old ones compute on pixels scaled as `before`, exactly
    up to rounding, because every tap sees a pixel.

    Raises:
        ValueError: the stem pads with zeros, which mean another gray in each range.
    """
    if padding:
        raise ValueError(
            f"The stem pads its input by {padding} px of zeros, which are not the same "
            "gray in both ranges; keep the weights and set the model's mean and std."
        )
    channels = kernel.shape[2]
    mean1, std1, mean2, std2 = (
        np.broadcast_to(np.asarray(values, np.float64), (channels,))
        for values in (*after, *before)
    )
    # x_before = x_after * std1 / std2 + (mean1 - mean2) / std2
    scaled = kernel * (std1 / std2)[:, None]
    shift = np.einsum("hwcd,c->d", kernel.astype(np.float64), (mean1 - mean2) / std2)
    return scaled.astype(np.float32), (bias + shift).astype(np.float32)
