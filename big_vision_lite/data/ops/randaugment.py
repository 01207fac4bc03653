"""RandAugment as big_vision runs it: sixteen ops of one fixed magnitude, on RGB."""

import dataclasses
import math

import cv2
import numpy as np

from big_vision_lite.data.ops import spatial
from big_vision_lite.data.ops.decode import Example, image_of

# The RGB of pixels from outside the image, and of the square of `cutout`.
FILL = (128, 128, 128)


@dataclasses.dataclass(kw_only=True)
class RandAugment:
    """Applies `num_layers` random ops out of sixteen, all at the same magnitude.

    This is big_vision's TensorFlow fork of arXiv:1909.13719, whose magnitude is no
    severity: at 0 Posterize keeps one bit, Solarize inverts the image and Color removes
    90 % of the colour; at 10, the usual value, Solarize inverts the image, too. Every
    drawn op is applied. Raises ValueError for an image without three channels and for
    "mask" or "boxes", which would not move with the image.
    """

    num_layers: int = 2
    magnitude: int = 10

    def __post_init__(self):
        if self.num_layers < 1 or self.magnitude < 0:
            raise ValueError(
                f"RandAugment num_layers={self.num_layers}, magnitude="
                f"{self.magnitude}: use at least 1 layer and a magnitude of 0 or more "
                "(published: 2 layers, 0 to 20); to switch it off leave the op out."
            )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        if image.shape[-1] != 3:
            raise ValueError(
                f"RandAugment needs RGB, got {image.shape[-1]} channel: put ToRgb() "
                "before it."
            )
        spatial.refuse(example, "RandAugment", "moves pixels of the image only")
        for _ in range(self.num_layers):
            op = OPS[int(rng.integers(len(OPS)))]
            image = op(image, self.magnitude, rng)
        return example | {"image": image}


def auto_contrast(
    image: np.ndarray, magnitude: int, rng: np.random.Generator
) -> np.ndarray:
    """Stretches every channel to 0..255."""
    tables = []
    for channel in cv2.split(image):
        low, high, *_ = cv2.minMaxLoc(channel)
        if high > low:
            scale = np.float32(255) / np.float32(high - low)
            tables.append(_truncated(_VALUES * scale - np.float32(low) * scale))
        else:
            tables.append(_truncated(_VALUES))
    return _look_up(image, np.stack(tables, -1))


def equalize(image: np.ndarray, magnitude: int, rng: np.random.Generator) -> np.ndarray:
    """Flattens the histogram of every channel, as PIL does."""
    tables = []
    for channel in range(3):
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256])
        counts = counts.ravel().astype(np.int64)
        last = counts[np.flatnonzero(counts)[-1]]
        step = (counts.sum() - last) // 255
        if step == 0:
            tables.append(_truncated(_VALUES))
            continue
        below = np.cumsum(counts) - counts
        table = (below + step // 2) // step
        table[0] = 0
        tables.append(np.minimum(table, 255).astype(np.uint8))
    return _look_up(image, np.stack(tables, -1))


def invert(image: np.ndarray, magnitude: int, rng: np.random.Generator) -> np.ndarray:
    """Returns 255 - image."""
    return cv2.bitwise_not(image)


def rotate(image: np.ndarray, magnitude: int, rng: np.random.Generator) -> np.ndarray:
    """Rotates about the centre by 3 degrees times the magnitude, either way."""
    angle = math.radians(_either_way(3.0 * magnitude, rng))
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = (image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2
    to_x, to_y = x - cos * x + sin * y, y - sin * x - cos * y
    return _warp(image, np.array([[cos, -sin, to_x], [sin, cos, to_y]]))


def posterize(
    image: np.ndarray, magnitude: int, rng: np.random.Generator
) -> np.ndarray:
    """Keeps the int(0.4 * magnitude) highest bits, one when that is 0 or above 8.

    TensorFlow holds the number of bits to drop in a uint8 and clamps it to 7
    (measured with TensorFlow 2.21).
    """
    dropped = min((8 - int(magnitude / 10 * 4)) % 256, 7)
    return _look_up(image, _VALUES.astype(np.uint8) >> dropped << dropped)


def solarize(image: np.ndarray, magnitude: int, rng: np.random.Generator) -> np.ndarray:
    """Inverts values from the threshold int(25.6 * magnitude) modulo 256 on.

    TensorFlow compares in uint8: the threshold 256 of magnitude 10 acts as 0 and
    inverts the whole image (measured with TensorFlow 2.21; big_vision, issue 110).
    """
    threshold = int(magnitude / 10 * 256) % 256
    return _look_up(
        image, np.where(_VALUES < threshold, _VALUES, 255 - _VALUES).astype(np.uint8)
    )


def color(image: np.ndarray, magnitude: int, rng: np.random.Generator) -> np.ndarray:
    """Blends gray (factor 0) with the image (1); above 1 colours grow stronger."""
    # TensorFlow scales the gray of a uint8 image by 255.5 / 255, then truncates it.
    weights = np.array([0.2989, 0.5870, 0.1140]) * (255.5 / 255)
    gray = cv2.transform(image, np.array([[*weights, -0.5]]))
    return _blend(cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), image, magnitude)


def contrast(image: np.ndarray, magnitude: int, rng: np.random.Generator) -> np.ndarray:
    """Blends one gray value (factor 0) with the image (1); above 1 contrast grows.

    The fork takes the number of pixels / 256 for the mean: 196 at 224 x 224, white
    from 256 x 255 on.
    """
    mean = min(image.shape[0] * image.shape[1] // 256, 255)
    return _look_up(image, _blended_values(mean, magnitude))


def brightness(
    image: np.ndarray, magnitude: int, rng: np.random.Generator
) -> np.ndarray:
    """Blends black (factor 0) with the image (1); above 1 it becomes brighter."""
    return _look_up(image, _blended_values(0, magnitude))


def sharpness(
    image: np.ndarray, magnitude: int, rng: np.random.Generator
) -> np.ndarray:
    """Blends a 3x3 smoothed image (factor 0) with the image (1); above 1 sharpens."""
    if min(image.shape[:2]) < 3:
        return image
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    # Sums are multiples of 1/13: rounding after this delta truncates them.
    smooth = cv2.filter2D(image, -1, kernel, delta=-0.5 + 1 / 26)
    border = image.copy()
    border[1:-1, 1:-1] = smooth[1:-1, 1:-1]
    return _blend(border, image, magnitude)


def shear_x(image: np.ndarray, magnitude: int, rng: np.random.Generator) -> np.ndarray:
    """Moves each row sideways by 0.03 * magnitude * its index px, either way."""
    slope = _either_way(0.03 * magnitude, rng)
    return _warp(image, np.array([[1, slope, 0], [0, 1, 0]]))


def shear_y(image: np.ndarray, magnitude: int, rng: np.random.Generator) -> np.ndarray:
    """Moves each column up or down by 0.03 * magnitude * its index px."""
    slope = _either_way(0.03 * magnitude, rng)
    return _warp(image, np.array([[1, 0, 0], [slope, 1, 0]]))


def translate_x(
    image: np.ndarray, magnitude: int, rng: np.random.Generator
) -> np.ndarray:
    """Shifts the image sideways by 10 px times the magnitude, either way."""
    shift_px = _either_way(10.0 * magnitude, rng)
    return _warp(image, np.array([[1, 0, shift_px], [0, 1, 0]]))


def translate_y(
    image: np.ndarray, magnitude: int, rng: np.random.Generator
) -> np.ndarray:
    """Shifts the image up or down by 10 px times the magnitude."""
    shift_px = _either_way(10.0 * magnitude, rng)
    return _warp(image, np.array([[1, 0, 0], [0, 1, shift_px]]))


def cutout(image: np.ndarray, magnitude: int, rng: np.random.Generator) -> np.ndarray:
    """Fills a square of side 2 * int(4 * magnitude) px around a random pixel."""
    half = int(magnitude / 10 * 40)
    row, column = (int(rng.integers(side)) for side in image.shape[:2])
    rows = slice(max(0, row - half), row + half)
    columns = slice(max(0, column - half), column + half)
    result = image.copy()
    result[rows, columns] = FILL
    return result


def solarize_add(
    image: np.ndarray, magnitude: int, rng: np.random.Generator
) -> np.ndarray:
    """Adds int(11 * magnitude) to values below 128, up to 255."""
    brighter = np.minimum(_VALUES + int(magnitude / 10 * 110), 255)
    return _look_up(image, np.where(_VALUES < 128, brighter, _VALUES).astype(np.uint8))


# A draw is an index into this tuple: append, never reorder.
OPS = (
    auto_contrast, equalize, invert, rotate, posterize, solarize, color, contrast,
    brightness, sharpness, shear_x, shear_y, translate_x, translate_y, cutout,
    solarize_add,
)  # fmt: skip

_VALUES = np.arange(256, dtype=np.float32)


def _blend_factor(magnitude: int) -> float:
    return magnitude / 10 * 1.8 + 0.1


def _either_way(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _truncated(values: np.ndarray) -> np.ndarray:
    # TensorFlow's cast to uint8 truncates.
    return np.clip(values, 0, 255).astype(np.uint8)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Maps values through one table [256], or one for each channel [256, 3]."""
    return cv2.LUT(image, table.reshape(1, 256, -1))


def _blended_values(degenerate: int, magnitude: int) -> np.ndarray:
    factor = np.float32(_blend_factor(magnitude))
    return _truncated(np.float32(degenerate) + factor * (_VALUES - degenerate))


def _blend(degenerate: np.ndarray, image: np.ndarray, magnitude: int) -> np.ndarray:
    """Returns degenerate + factor * (image - degenerate), truncated to integers."""
    factor = _blend_factor(magnitude)
    # Results are multiples of 0.02: rounding after this shift truncates them.
    return cv2.addWeighted(image, factor, degenerate, 1 - factor, -0.5 + 0.01)


def _warp(image: np.ndarray, to_source: np.ndarray) -> np.ndarray:
    """Returns the image whose pixel (x, y) is that nearest to to_source @ (x, y, 1)."""
    return cv2.warpAffine(
        image,
        to_source,
        image.shape[1::-1],
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderValue=FILL,
    )
