"""Ops that change colours or resolution, drop keys, or pad arrays."""

import dataclasses

import numpy as np

from big_vision_lite.data.ops import resampling
from big_vision_lite.data.ops.decode import Example, decode, image_of
from big_vision_lite.data.ops.resampling import Resampling


@dataclasses.dataclass(kw_only=True)
class ToGray:
    """Turns RGB into one channel, 0.299 R + 0.587 G + 0.114 B; gray stays."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return example | {"image": decode(image_of(example, self), channels=1)}


@dataclasses.dataclass(kw_only=True)
class ToRgb:
    """Repeats the one channel of a gray image three times; RGB stays."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return example | {"image": decode(image_of(example, self), channels=3)}


@dataclasses.dataclass(kw_only=True)
class Invert:
    """Replaces every value by 255 - value: dark on light becomes light on dark."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return example | {"image": np.bitwise_not(image_of(example, self))}


@dataclasses.dataclass(kw_only=True)
class Keep:
    """Drops every key but `keys`; raises ValueError if one of them is missing."""

    keys: tuple[str, ...] = ("image", "label")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        if missing := set(self.keys) - set(example):
            raise ValueError(f"Keep: no {sorted(missing)} among {sorted(example)}.")
        return {key: example[key] for key in self.keys}


@dataclasses.dataclass(kw_only=True)
class Pad:
    """Makes the first axis of an array `length` long, so that it fits into a batch.

    Adds rows of `value` at the end; cuts off the rows past `length` of a longer array
    without a warning. Nothing says which rows are padding: choose a value that no row
    has, such as -1 for labels; a box of zeros means no box.
    """

    key: str
    length: int
    value: float = 0.0

    def __post_init__(self):
        if self.length < 1:
            raise ValueError(f"Pad.length={self.length}: use 1 or more rows.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        if self.key not in example:
            raise ValueError(f'Pad: no "{self.key}" among {sorted(example)}.')
        rows = example[self.key]
        is_array = isinstance(rows, np.ndarray) and rows.ndim > 0
        if not is_array or rows.dtype.kind not in "biuf":
            raise ValueError(
                f'Pad needs an array of numbers, "{self.key}" is '
                f"{type(rows).__name__}; put an op that makes one before it."
            )
        if len(rows) >= self.length:
            return example | {self.key: rows[: self.length]}
        if rows.dtype.kind != "f" and not _is_one_of(self.value, rows.dtype):
            raise ValueError(
                f'Pad.value={self.value:g} is no {rows.dtype}, as "{self.key}" holds; '
                "use a value of this type."
            )
        shape = (self.length - len(rows), *rows.shape[1:])
        added = np.full(shape, self.value).astype(rows.dtype)
        return example | {self.key: np.concatenate([rows, added])}


def _is_one_of(value: float, dtype: np.dtype) -> bool:
    if dtype == np.bool_:
        return value in (0, 1)
    limits = np.iinfo(dtype)
    return value % 1 == 0 and limits.min <= value <= limits.max


@dataclasses.dataclass(kw_only=True)
class RandomLowResolution:
    """Shrinks the image to a random shorter side and enlarges it again, as a poor scan.

    The side in pixels is uniform from `side_min_px` to the image's own, which leaves it
    as it is. Shrinking averages over areas, enlarging is bilinear.
    """

    side_min_px: int

    def __post_init__(self):
        if self.side_min_px < 1:
            raise ValueError(
                f"RandomLowResolution side_min_px={self.side_min_px} is no size; "
                "use 1 or more pixels, for example 8."
            )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        height, width = image.shape[:2]
        shorter = min(height, width)
        side = int(rng.integers(min(self.side_min_px, shorter), shorter + 1))
        low_height, low_width = (
            max(1, round(n * side / shorter)) for n in (height, width)
        )
        small = resampling.resize(image, low_height, low_width, Resampling.AREA)
        image = resampling.resize(small, height, width, Resampling.BILINEAR)
        return {**example, "image": image}
