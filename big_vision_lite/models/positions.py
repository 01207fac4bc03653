"""Where a patch lies in the image."""

import enum

import numpy as np
from jaxtyping import Float


class Positions(enum.StrEnum):
    """What is added to the tokens of patches."""

    # Fixed, arXiv:2205.01580.
    SINCOS = "sincos"
    # One vector a patch, arXiv:2010.11929.
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
