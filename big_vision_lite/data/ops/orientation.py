"""The orientation that a camera writes beside the pixels, and images turned by it."""

import enum

import numpy as np

AS_STORED = 1
# Of the eight, those that swap rows and columns, then turn left and right, up and down.
SWAPPED, MIRRORED, FLIPPED = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)


class Orientation(enum.StrEnum):
    """What is done about the orientation in a file's EXIF.

    IGNORE keeps the pixels as stored: TensorFlow, so big_vision, and the loaders of
    timm and torchvision do. APPLY turns them as a viewer shows them, as
    PIL.ImageOps.exif_transpose does.
    """

    IGNORE = "ignore"
    APPLY = "apply"


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """Returns the array [H, W, ...] turned as EXIF's orientation says, 1 to 8."""
    if orientation in SWAPPED:
        image = image.swapaxes(0, 1)
    if orientation in MIRRORED:
        image = image[:, ::-1]
    if orientation in FLIPPED:
        image = image[::-1]
    return np.ascontiguousarray(image)


def turned_back(image: np.ndarray, orientation: int) -> np.ndarray:
    """Returns the array that `turned` has turned."""
    # A quarter to the right and one to the left; the others undo themselves.
    return turned(image, {6: 8, 8: 6}.get(orientation, orientation))


def turned_boxes(boxes: np.ndarray, orientation: int) -> np.ndarray:
    """Returns boxes [n, 4] in fractions, turned alike; four zeros, outside, stay."""
    top, left, bottom, right = boxes.T
    if orientation in SWAPPED:
        top, left, bottom, right = left, top, right, bottom
    if orientation in MIRRORED:
        left, right = 1 - right, 1 - left
    if orientation in FLIPPED:
        top, bottom = 1 - bottom, 1 - top
    result = np.stack([top, left, bottom, right], axis=1)
    result[~boxes.any(axis=1)] = 0
    return result
