"""Functions that crop, resize and warp uint8 images [H, W, C]."""

import enum
import math
from typing import NamedTuple

import cv2
import numpy as np

from big_vision_lite.data.ops.decode import check_pixels


class Resampling(enum.StrEnum):
    """The interpolation of a resize; results are rounded to the nearest integer.

    BILINEAR   2x2 taps at half-pixel centres at every scale, no antialias, as in
               TensorFlow and big_vision; they truncate where we round, so that
               their pixels are 0.4 of 255 lower in the mean. OpenCV works in fixed
               point: within 0.8 of the exact value, 0.1 below it in the mean.
    ANTIALIAS  averages over a side that shrinks, bilinear on a side that grows; near
               to, not equal to, the triangle filter of PIL and torchvision.
    AREA       averages over the covered area, both ways (TensorFlow's "area").
    BICUBIC    4x4 taps with a = -0.75 (torch without antialias), no antialias.
    PIL_...    the antialiased filters of PIL, by PIL: timm, torchvision and Hugging
               Face evaluate with them.
    """

    BILINEAR = "bilinear"
    ANTIALIAS = "antialias"
    AREA = "area"
    BICUBIC = "bicubic"
    PIL_BILINEAR = "pil_bilinear"
    PIL_BICUBIC = "pil_bicubic"
    PIL_LANCZOS = "pil_lanczos"


class Rounding(enum.StrEnum):
    """The rounding of sizes and offsets to whole pixels."""

    # Halves go to the even neighbour.
    NEAREST = "nearest"
    DOWN = "down"


_GROWING = {
    Resampling.BILINEAR: cv2.INTER_LINEAR,
    Resampling.ANTIALIAS: cv2.INTER_LINEAR,
    Resampling.AREA: cv2.INTER_AREA,
    Resampling.BICUBIC: cv2.INTER_CUBIC,
}
_SHRINKING = _GROWING | {Resampling.ANTIALIAS: cv2.INTER_AREA}


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def crop(image: np.ndarray, box: Box) -> np.ndarray:
    """Returns a view of the pixels inside `box`."""
    return image[box.top : box.top + box.height, box.left : box.left + box.width]


def with_channels(image: np.ndarray) -> np.ndarray:
    """Restores the last axis, which OpenCV drops from images of one channel."""
    return image if image.ndim == 3 else image[..., None]


def resize(
    image: np.ndarray, height: int, width: int, resampling: Resampling
) -> np.ndarray:
    """Returns `image` resized to exactly height x width; its aspect is not kept.

    Raises:
        UndecodableImage: the result would have more than MAX_PIXELS.
    """
    old_height, old_width = image.shape[:2]
    if (old_height, old_width) == (height, width):
        return image
    check_pixels(height, width, f"{old_height} x {old_width} image, resized,")
    if resampling.name.startswith("PIL_"):
        return _resize_by_pillow(image, height, width, resampling)
    middle = min(height, old_height), min(width, old_width)
    if middle == (height, width):
        code = _SHRINKING[resampling]
    else:
        code = _GROWING[resampling]
        if _SHRINKING[resampling] == cv2.INTER_AREA and middle != image.shape[:2]:
            # One side grows, the other shrinks: OpenCV would not average at all.
            image = cv2.resize(image, middle[::-1], interpolation=cv2.INTER_AREA)
    return with_channels(cv2.resize(image, (width, height), interpolation=code))


def _resize_by_pillow(
    image: np.ndarray, height: int, width: int, resampling: Resampling
) -> np.ndarray:
    # Imported here, because only evaluations of some weights need it.
    import PIL.Image

    method = PIL.Image.Resampling[resampling.name.removeprefix("PIL_")]

    def resized(pixels: np.ndarray) -> np.ndarray:
        return np.array(PIL.Image.fromarray(pixels).resize((width, height), method))

    if image.shape[-1] == 3:
        return resized(image)
    # Pillow would take a second or fourth channel for transparency.
    return np.stack([resized(image[..., c]) for c in range(image.shape[-1])], axis=-1)


def short_side_size(
    shape: tuple[int, ...], short_side: int, rounding: Rounding = Rounding.NEAREST
) -> tuple[int, int]:
    """Returns the height and width that bring the short side to `short_side` px.

    DOWN is torchvision's Resize(short_side): the long side is rounded down.
    """
    height, width = shape[:2]
    if rounding == Rounding.DOWN:
        short = min(height, width)
        return short_side * height // short, short_side * width // short
    scale = short_side / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def covering_size(shape: tuple[int, ...], height: int, width: int) -> tuple[int, int]:
    """Returns the smallest size of the same aspect that covers height x width."""
    ratio = min(shape[0] / height, shape[1] / width)
    return round(shape[0] / ratio), round(shape[1] / ratio)


def affine_matrix(
    shape: tuple[int, ...],
    *,
    degrees: float,
    scale: float,
    shear_degrees: float,
    right_px: float,
    down_px: float,
) -> np.ndarray:
    """Returns the map [2, 3] that shears along x, scales, rotates and shifts an image.

    It maps old to new positions (x, y) of pixel centres, about the centre of the image
    and counter-clockwise.
    """
    height, width = shape[:2]
    cos = scale * math.cos(math.radians(degrees))
    sin = scale * math.sin(math.radians(degrees))
    shear = math.tan(math.radians(shear_degrees))
    # y points down, so this looks counter-clockwise.
    a, b = cos, cos * shear + sin
    c, d = -sin, cos - sin * shear
    x, y = (width - 1) / 2, (height - 1) / 2
    to_x, to_y = x + right_px, y + down_px
    return np.array([[a, b, to_x - a * x - b * y], [c, d, to_y - c * x - d * y]])


def warp(image: np.ndarray, matrix: np.ndarray, fill: int) -> np.ndarray:
    """Returns `image` moved by an affine map, bilinear; outside of it is `fill`."""
    height, width = image.shape[:2]
    border = [fill] * 4
    moved = cv2.warpAffine(
        image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=border
    )
    return with_channels(moved)


def inception_box(
    shape: tuple[int, ...],
    area_min: float,
    area_max: float,
    rng: np.random.Generator,
) -> Box:
    """Draws a crop as TensorFlow's sample_distorted_bounding_box does.

    The aspect w/h is uniform in [0.75, 1.33], then the *height* uniform over the
    integers whose area is legal, so that small areas are likelier than under a uniform
    area. Returns the whole image after 100 tries without a fit. One difference:
    TensorFlow never draws the last offset, we do.
    """
    height, width = shape[:2]
    smallest, largest = area_min * height * width, area_max * height * width
    for _ in range(100):
        aspect = 0.75 + (1.33 - 0.75) * rng.random()
        high = round(math.sqrt(largest / aspect))
        if round(high * aspect) > width:
            high = int((width + 0.5 - 1e-7) / aspect)
            high -= round(high * aspect) > width
        high = min(high, height)
        low = min(round(math.sqrt(smallest / aspect)), high)
        box_height = int(rng.integers(low, high + 1))
        # Rounding may have left the legal range by one pixel, either way.
        if box_height * round(box_height * aspect) < smallest:
            box_height += 1
        if box_height * round(box_height * aspect) > largest:
            box_height -= 1
        box_width = round(box_height * aspect)
        fits = 0 < box_height <= height and 0 < box_width <= width
        if fits and smallest <= box_height * box_width <= largest:
            return random_box(shape, box_height, box_width, rng)
    return Box(0, 0, height, width)


def random_resized_box(
    shape: tuple[int, ...],
    area_min: float,
    area_max: float,
    rng: np.random.Generator,
) -> Box:
    """Draws a crop as torchvision's RandomResizedCrop does.

    The *area* is uniform, the aspect w/h log-uniform in [3/4, 4/3]. Returns the largest
    centred crop of legal aspect after 10 tries without a fit.
    """
    height, width = shape[:2]
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = height * width * (area_min + (area_max - area_min) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        box_height = round(math.sqrt(area / aspect))
        box_width = round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            return random_box(shape, box_height, box_width, rng)
    box_height = max(1, min(height, round(width / (3 / 4))))
    box_width = max(1, min(width, round(height * (4 / 3))))
    return centre_box(shape, box_height, box_width)


def centre_box(
    shape: tuple[int, ...],
    box_height: int,
    box_width: int,
    rounding: Rounding = Rounding.DOWN,
) -> Box:
    """Returns the box in the middle of an image; `rounding` is that of its offset.

    DOWN moves it up and left by half a pixel at odd margins; torchvision uses NEAREST.
    """
    margins = shape[0] - box_height, shape[1] - box_width
    if rounding == Rounding.DOWN:
        top, left = (margin // 2 for margin in margins)
    else:
        top, left = (round(margin / 2) for margin in margins)
    return Box(top, left, box_height, box_width)


def random_box(
    shape: tuple[int, ...], box_height: int, box_width: int, rng: np.random.Generator
) -> Box:
    """Returns a box of this size, which must fit into the image, at a random offset."""
    height, width = shape[:2]
    top = int(rng.integers(0, height - box_height + 1))
    left = int(rng.integers(0, width - box_width + 1))
    return Box(top, left, box_height, box_width)
