"""What the sizes, areas and channels of ops may be, and what is said otherwise."""

from typing import Any

import numpy as np


def target(op: Any) -> tuple[int, int]:
    """Returns the height and width that an op's `size` and `width` mean."""
    return op.size, op.size if op.width is None else op.width


def check_size(op: Any) -> None:
    """Raises ValueError for a side below 1 px."""
    for name in ("size", "width"):
        side = getattr(op, name, None)
        if side is not None and side < 1:
            raise ValueError(f"{type(op).__name__}.{name}={side}: use 1 or more px.")


def check_area(op: Any) -> None:
    """Raises ValueError unless 0 < area_min <= area_max <= 1."""
    if not 0 < op.area_min <= op.area_max <= 1:
        raise ValueError(
            f"{type(op).__name__} area {op.area_min}..{op.area_max}: fractions of the "
            "image, use 0 < area_min <= area_max <= 1."
        )


def check_channels(op: Any) -> None:
    """Raises ValueError for another number than 1 or 3."""
    if op.channels not in (1, 3):
        name = type(op).__name__
        raise ValueError(f"{name}.channels={op.channels}: use 1 (gray) or 3 (RGB).")


def check_fits(op: Any, image: np.ndarray) -> None:
    """Raises ValueError for an image that is smaller than what is cut out of it."""
    height, width = target(op)
    if image.shape[0] < height or image.shape[1] < width:
        raise ValueError(
            f"{type(op).__name__} to {height} x {width} got an image of "
            f"{image.shape[0]} x {image.shape[1]}: put ResizeSmall or Resize before it."
        )
