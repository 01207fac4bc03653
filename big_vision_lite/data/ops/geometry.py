"""Ops that crop, resize and move an image on the host.

A "mask" and "boxes" of the example move with it, by the same draw; see `spatial.moved`.
`width_px` None means `size_px`, except in ResizeSmall.
"""

import dataclasses
from typing import Any

import cv2
import numpy as np

from big_vision_lite.data.ops import resampling as crops
from big_vision_lite.data.ops.decode import (
    Example,
    check_channels,
    decode_keys,
    image_of,
)
from big_vision_lite.data.ops.orientation import Orientation
from big_vision_lite.data.ops.resampling import Box, Resampling, Rounding
from big_vision_lite.data.ops.spatial import Mirror, Warp, Window, moved


@dataclasses.dataclass(kw_only=True)
class InceptionCrop:
    """Crops as TensorFlow's distorted bounding box does, resizes to size_px x width_px.

    The height, not the area, of the crop is uniform (`resampling.inception_box`): with
    the same area_min and area_max it zooms in more than RandomResizedCrop. big_vision,
    BiT and vision_transformer use this crop.
    """

    size_px: int
    width_px: int | None = None
    area_min: float = 0.05
    area_max: float = 1.0
    resampling: Resampling = Resampling.BILINEAR

    def __post_init__(self):
        check_size(self)
        check_area(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        box = crops.inception_box(image.shape, self.area_min, self.area_max, rng)
        return _resized(self, example, box)


@dataclasses.dataclass(kw_only=True)
class DecodeInceptionCrop(InceptionCrop):
    """Does Decode and InceptionCrop in one step, with exactly the same pixels."""

    channels: int = 3
    orientation: Orientation = Orientation.IGNORE

    def __post_init__(self):
        super().__post_init__()
        check_channels(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        decoded = decode_keys(example, self.channels, self.orientation)
        return super().__call__(decoded, rng)


@dataclasses.dataclass(kw_only=True)
class RandomResizedCrop:
    """Crops as torchvision's op of this name does, resizes to size_px x width_px.

    The area is uniform, the aspect log-uniform (`resampling.random_resized_box`).
    torchvision antialiases by default; Resampling.ANTIALIAS comes near to that.
    """

    size_px: int
    width_px: int | None = None
    area_min: float = 0.08
    area_max: float = 1.0
    resampling: Resampling = Resampling.BILINEAR

    def __post_init__(self):
        check_size(self)
        check_area(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        area = self.area_min, self.area_max
        box = crops.random_resized_box(image.shape, *area, rng)
        return _resized(self, example, box)


@dataclasses.dataclass(kw_only=True)
class Resize:
    """Resizes to exactly size_px x width_px; the aspect of the image is not kept."""

    size_px: int
    width_px: int | None = None
    resampling: Resampling = Resampling.BILINEAR

    def __post_init__(self):
        check_size(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        height, width = image_of(example, self).shape[:2]
        return _resized(self, example, Box(0, 0, height, width))


@dataclasses.dataclass(kw_only=True)
class ResizeSmall:
    """Resizes so that the short side has `size_px` pixels, and keeps the aspect.

    `rounding` is that of the long side: NEAREST, or DOWN as in torchvision's Resize.
    With `width_px`, resizes to the smallest image that covers size_px x width_px
    instead, both sides rounded to NEAREST.
    """

    size_px: int
    resampling: Resampling = Resampling.AREA
    width_px: int | None = None
    rounding: Rounding = Rounding.NEAREST

    def __post_init__(self):
        check_size(self)
        if self.width_px is not None and self.rounding != Rounding.NEAREST:
            raise ValueError(
                f"ResizeSmall(width_px={self.width_px}, rounding={self.rounding}): "
                "with width_px both sides are rounded to the nearest pixel; leave out "
                "rounding, or use width_px=None, where it is that of the long side."
            )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        if self.width_px is None:
            height, width = crops.short_side_size(
                image.shape, self.size_px, self.rounding
            )
        else:
            height, width = crops.covering_size(
                image.shape, self.size_px, self.width_px
            )
        resized = crops.resize(image, height, width, self.resampling)
        whole = Box(0, 0, *image.shape[:2])
        return moved(example, resized, Window(whole, height, width))


@dataclasses.dataclass(kw_only=True)
class CentralCrop:
    """Cuts size_px x width_px at offsets (side - size) / 2.

    Half a pixel is rounded DOWN (TensorFlow, Hugging Face) or to the NEAREST even one
    (torchvision, timm). Raises ValueError for a smaller image.
    """

    size_px: int
    width_px: int | None = None
    rounding: Rounding = Rounding.DOWN

    def __post_init__(self):
        check_size(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        height, width = target(self)
        check_fits(self, image)
        box = crops.centre_box(image.shape, height, width, self.rounding)
        return moved(example, crops.crop(image, box), Window(box, height, width))


@dataclasses.dataclass(kw_only=True)
class RandomCrop:
    """Cuts size_px x width_px at a random place, after zero `padding` on every side.

    Raises ValueError for an image that is smaller, padding included.
    """

    size_px: int
    width_px: int | None = None
    padding: int = 0

    def __post_init__(self):
        check_size(self)
        if self.padding < 0:
            raise ValueError(f"RandomCrop.padding={self.padding}: use 0 or more.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        if self.padding:
            around = (self.padding, self.padding), (self.padding, self.padding), (0, 0)
            image = np.pad(image, around)
        height, width = target(self)
        check_fits(self, image)
        box = crops.random_box(image.shape, height, width, rng)
        # Relative to the image without padding; it may begin and end outside.
        top, left = box.top - self.padding, box.left - self.padding
        window = Window(Box(top, left, height, width), height, width)
        return moved(example, crops.crop(image, box), window)


@dataclasses.dataclass(kw_only=True)
class FlipLeftRight:
    """Mirrors the image left to right with probability 1/2."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        if rng.random() < 0.5:
            return dict(example)
        mirrored = crops.with_channels(cv2.flip(image, 1))
        return moved(example, mirrored, Mirror(image.shape[1]))


@dataclasses.dataclass(kw_only=True)
class RandomAffine:
    """Rotates, scales, shears and shifts the image at random; its size stays.

    Angle and shear are uniform in +-degrees and +-shear_degrees, the scale in
    [scale_min, scale_max], the shift in +-translate times each side. Bilinear, in steps
    of 1/32 pixel or finer; pixels from outside the image are `fill`.
    """

    degrees: float = 10.0
    translate: float = 0.1
    scale_min: float = 0.9
    scale_max: float = 1.1
    shear_degrees: float = 0.0
    fill: int = 0

    def __post_init__(self):
        if not 0 < self.scale_min <= self.scale_max:
            got = f"{self.scale_min}..{self.scale_max}"
            raise ValueError(
                f"RandomAffine scale {got}: use 0 < scale_min <= scale_max."
            )
        for name in ("degrees", "translate", "shear_degrees"):
            if not 0 <= getattr(self, name) < (90 if name == "shear_degrees" else 1e6):
                raise ValueError(
                    f"RandomAffine.{name}={getattr(self, name)}: the end of a range "
                    "around 0, use 0 or more, and less than 90 to shear."
                )
        if not 0 <= self.fill <= 255:
            raise ValueError(f"RandomAffine.fill={self.fill}: use 0 to 255.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        height, width = image.shape[:2]
        draws = 2 * rng.random(5) - 1
        middle = (self.scale_max + self.scale_min) / 2
        matrix = crops.affine_matrix(
            image.shape,
            degrees=self.degrees * draws[0],
            scale=middle + (self.scale_max - self.scale_min) / 2 * draws[1],
            shear_degrees=self.shear_degrees * draws[2],
            right_px=self.translate * width * draws[3],
            down_px=self.translate * height * draws[4],
        )
        return moved(example, crops.warp(image, matrix, self.fill), Warp(matrix))


def _resized(op, example: Example, box: Box) -> Example:
    height, width = target(op)
    image = crops.crop(example["image"], box)
    image = crops.resize(image, height, width, op.resampling)
    return moved(example, image, Window(box, height, width))


def target(op: Any) -> tuple[int, int]:
    """Returns the height and width that an op's `size_px` and `width_px` mean."""
    return op.size_px, op.size_px if op.width_px is None else op.width_px


def check_size(op: Any) -> None:
    """Raises ValueError for a side below 1 px."""
    for name in ("size_px", "width_px"):
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


def check_fits(op: Any, image: np.ndarray) -> None:
    """Raises ValueError for an image that is smaller than the op's target."""
    height, width = target(op)
    if image.shape[0] < height or image.shape[1] < width:
        raise ValueError(
            f"{type(op).__name__} to {height} x {width} got an image of "
            f"{image.shape[0]} x {image.shape[1]}: put ResizeSmall or Resize before it."
        )
