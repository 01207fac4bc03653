"""Resizing as Pillow does it, bit for bit; torchvision and timm evaluate with it."""

import functools
import math

import numpy as np

# Pillow weighs 8-bit pixels with integers of so many fractional bits: Resample.c.
PRECISION_BITS = 22


def triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(x))


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5; torch without antialias has -0.75."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


# Name: the filter, and where it ends.
FILTERS = {"bilinear": (triangle, 1), "bicubic": (cubic, 2), "lanczos": (lanczos, 3)}


def resize(image: np.ndarray, height: int, width: int, name: str) -> np.ndarray:
    """Returns uint8 [height, width, C] of a uint8 image [H, W, C].

    `name` is one of FILTERS. A side that shrinks is averaged over (antialias); each of
    the two passes rounds to 8 bits. Their order is that of Pillow 13, found by
    comparing: 11 and 12 always resize the width first, which is one of 255 off here
    and there where images lose far more rows than columns.
    """
    old_height, old_width, _ = image.shape
    rows_lost, columns_lost = old_height - height, old_width - width
    if rows_lost > 0 and rows_lost > 2 * columns_lost:
        image = _resize_width(_resize_height(image, height, name), width, name)
    else:
        image = _resize_height(_resize_width(image, width, name), height, name)
    return np.ascontiguousarray(image)


def _resize_width(image: np.ndarray, width: int, name: str) -> np.ndarray:
    return _resize_height(image.swapaxes(0, 1), width, name).swapaxes(0, 1)


def _resize_height(image: np.ndarray, height: int, name: str) -> np.ndarray:
    old_height, width, channels = image.shape
    if old_height == height:
        return image
    rows = _resize_rows(image.reshape(old_height, width * channels), height, name)
    return rows.reshape(height, width, channels)


def _resize_rows(rows: np.ndarray, new: int, name: str) -> np.ndarray:
    """Returns uint8 [new, N]: weighted sums of the uint8 rows [old, N]."""
    indices, weights = _taps(rows.shape[0], new, name)
    pixels = rows.astype(np.int32)
    # Half of the last bit that is kept, for rounding.
    total = np.full((new, rows.shape[1]), 1 << (PRECISION_BITS - 1), np.int32)
    term = np.empty_like(total)
    for tap in range(indices.shape[1]):
        np.take(pixels, indices[:, tap], axis=0, out=term, mode="clip")
        term *= weights[:, tap, None]
        total += term
    total >>= PRECISION_BITS
    return np.clip(total, 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=256)
def _taps(old: int, new: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns which old rows [new, taps] make a new one, and integer weights alike."""
    filter_of, support = FILTERS[name]
    scale = old / new
    stretch = max(scale, 1.0)
    centre = (np.arange(new) + 0.5) * scale
    reach = support * stretch
    first = np.maximum(np.trunc(centre - reach + 0.5).astype(np.int64), 0)
    last = np.minimum(np.trunc(centre + reach + 0.5).astype(np.int64), old)
    indices = first[:, None] + np.arange(math.ceil((last - first).max()))
    inside = indices < last[:, None]
    weights = filter_of((indices - centre[:, None] + 0.5) / stretch)
    weights = np.where(inside, weights, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    scaled = weights * (1 << PRECISION_BITS)
    rounded = np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int32)
    return np.where(inside, indices, 0), rounded
