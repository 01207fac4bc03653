"""Moves the mask and boxes of an image with it.

A geometric op draws once, moves the pixels of the image, and describes the move by a
`Window`, a `Mirror` or a `Warp`, which `moved` applies to the other keys.
"""

from typing import NamedTuple

import cv2
import numpy as np

from big_vision_lite.data.ops.decode import Example, check_boxes, check_mask
from big_vision_lite.data.ops.resampling import Box

# Keys beside "image" that every op that moves pixels must move, or refuse.
SPATIAL = ("mask", "boxes")
# A box with a shorter side, in pixels of the image before the move, lies outside, such
# as one that ends where the crop begins: rounding of float32 fractions is less.
LEAST_PX = 0.01

# Each move has a map `to_old` [2, 3]: the point (x, y) of the new image shows what was
# at to_old @ (x, y, 1) of the old one. Points are in pixels from the outer corner of
# the top left pixel, whose centre is (1/2, 1/2).


class Window(NamedTuple):
    """Cuts out `box`, which may cross the borders, and resizes it to height x width."""

    box: Box
    height: int
    width: int

    def to_old(self) -> np.ndarray:
        across, down = self.box.width / self.width, self.box.height / self.height
        return np.array([[across, 0.0, self.box.left], [0.0, down, self.box.top]])


class Mirror(NamedTuple):
    """Swaps left and right of an image `width` pixels wide."""

    width: int

    def to_old(self) -> np.ndarray:
        return np.array([[-1.0, 0.0, self.width], [0.0, 1.0, 0.0]])


class Warp(NamedTuple):
    """Moves what was at (x, y) to matrix @ (x, y, 1), both between centres of pixels.

    The matrix [2, 3] is that of cv2.warpAffine: (0, 0) is the first pixel's centre.
    """

    matrix: np.ndarray

    def to_old(self) -> np.ndarray:
        inverse = cv2.invertAffineTransform(self.matrix)
        inverse[:, 2] += 0.5 - 0.5 * inverse[:, :2].sum(1)
        return inverse


def moved(example: Example, image: np.ndarray, move: Window | Mirror | Warp) -> Example:
    """Returns the example with `image`, which `move` made, and mask and boxes moved.

    "mask", integers [H, W] or [H, W, 1], takes the value of the nearest pixel, never a
    blend. Pixels from outside the image are 0, which most sets call background or
    unlabelled; where 0 is a class like others, count classes from 1 in an op before.

    "boxes", float32 [n, 4], hold (top, left, bottom, right) in fractions of the image,
    as TFDS stores them. They become the bounding boxes of their moved corners, clipped
    to the image. A box that is outside becomes four zeros and keeps its row, so that
    the labels of boxes need no change.

    Raises:
        ValueError: the mask has another size than the image, or mask or boxes have
            another shape, dtype or range.
    """
    result = example | {"image": image}
    old = example["image"].shape[:2]
    if "mask" in example:
        check_mask(example["mask"], example["image"])
        result["mask"] = _moved_mask(example["mask"], move.to_old(), image.shape[:2])
    if "boxes" in example:
        check_boxes(example["boxes"])
        to_old = move.to_old()
        result["boxes"] = _moved_boxes(example["boxes"], to_old, old, image.shape[:2])
    return result


def refuse(example: Example, name: str, what: str) -> None:
    """Raises ValueError if the example has a mask or boxes, which op `name` ignores."""
    there = [key for key in SPATIAL if key in example]
    if there:
        raise ValueError(
            f"{name} {what} and would leave {' and '.join(there)} of the example where "
            f"it was: leave {name} out, or drop the key by Keep(keys=...)."
        )


def _moved_mask(
    mask: np.ndarray, to_old: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    height, width = mask.shape[:2]
    x, y = np.arange(size[1]) + 0.5, np.arange(size[0])[:, None] + 0.5
    if not to_old[0, 1] and not to_old[1, 0]:
        # Rows stay rows: an index for each row and column, not for each pixel.
        columns = np.floor(to_old[0, 0] * x + to_old[0, 2]).astype(np.int64)
        rows = np.floor(to_old[1, 1] * y[:, 0] + to_old[1, 2]).astype(np.int64)
        result = mask[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
        result[(rows < 0) | (rows >= height)] = 0
        result[:, (columns < 0) | (columns >= width)] = 0
        return result
    columns, rows = (
        np.floor(along_x * x + along_y * y + shift).astype(np.int64)
        for along_x, along_y, shift in to_old
    )
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    result = mask[rows.clip(0, height - 1), columns.clip(0, width - 1)]
    result[~inside] = 0
    return result


def _moved_boxes(
    boxes: np.ndarray,
    to_old: np.ndarray,
    old: tuple[int, int],
    new: tuple[int, int],
) -> np.ndarray:
    top, left, bottom, right = (boxes.astype(np.float64) * (*old, *old)).T
    # The four corners of each box [4, n].
    x, y = np.stack([left, right, left, right]), np.stack([top, top, bottom, bottom])
    new_x, new_y = (
        along_x * x + along_y * y + shift
        for along_x, along_y, shift in cv2.invertAffineTransform(to_old)
    )
    edges = np.stack([new_y.min(0), new_x.min(0), new_y.max(0), new_x.max(0)], axis=1)
    edges = np.clip(edges, 0, (*new, *new))
    scale = abs(np.linalg.det(to_old[:, :2])) ** 0.5
    edges[scale * (edges[:, 2:] - edges[:, :2]).min(axis=1) < LEAST_PX] = 0
    return (edges / (*new, *new)).astype(np.float32)
