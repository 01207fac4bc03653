"""Ops: dataclasses called as `op(example, rng) -> example`, numpy only, on the host."""

import dataclasses

import cv2
import numpy as np

from big_vision_lite.data import checks, crops
from big_vision_lite.data.crops import Resampling, Rounding
from big_vision_lite.data.decode import Example, decode, image_of
from big_vision_lite.data.decode import UndecodableImage as UndecodableImage


@dataclasses.dataclass(kw_only=True)
class Decode:
    """Turns encoded bytes or an array into uint8 [H, W, channels]; see `decode`."""

    channels: int = 3

    def __post_init__(self):
        checks.check_channels(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return example | {"image": decode(example["image"], self.channels)}


@dataclasses.dataclass(kw_only=True)
class InceptionCrop:
    """Crops as TensorFlow's distorted bounding box does, resizes to size x width.

    The height, not the area, of the crop is uniform (`crops.inception_box`): at equal
    areas it zooms in more than RandomResizedCrop. This is the crop of big_vision, BiT
    and vision_transformer.
    """

    size: int
    width: int | None = None
    area_min: float = 0.05
    area_max: float = 1.0
    resampling: Resampling = Resampling.BILINEAR

    def __post_init__(self):
        checks.check_size(self)
        checks.check_area(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        box = crops.inception_box(image.shape, self.area_min, self.area_max, rng)
        return _resized(self, example, crops.crop(image, box))


@dataclasses.dataclass(kw_only=True)
class DecodeInceptionCrop(InceptionCrop):
    """Decode and InceptionCrop in one step, pixel for pixel the same as the two."""

    channels: int = 3

    def __post_init__(self):
        super().__post_init__()
        checks.check_channels(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = decode(example["image"], self.channels)
        return super().__call__(example | {"image": image}, rng)


@dataclasses.dataclass(kw_only=True)
class RandomResizedCrop:
    """Crops as torchvision's op of this name does, resizes to size x width.

    The area is uniform, the aspect log-uniform (`crops.random_resized_box`). There the
    default antialiases: Resampling.ANTIALIAS comes near to it.
    """

    size: int
    width: int | None = None
    area_min: float = 0.08
    area_max: float = 1.0
    resampling: Resampling = Resampling.BILINEAR

    def __post_init__(self):
        checks.check_size(self)
        checks.check_area(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        area = self.area_min, self.area_max
        box = crops.random_resized_box(image.shape, *area, rng)
        return _resized(self, example, crops.crop(image, box))


@dataclasses.dataclass(kw_only=True)
class Resize:
    """Resizes to exactly size x width; the aspect of the image is not kept."""

    size: int
    width: int | None = None
    resampling: Resampling = Resampling.BILINEAR

    def __post_init__(self):
        checks.check_size(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return _resized(self, example, image_of(example, self))


@dataclasses.dataclass(kw_only=True)
class ResizeSmall:
    """Resizes so that the short side has `size` pixels.

    With `width` to the smallest image that covers size x width instead. The other side
    is rounded to the nearest pixel; `rounding` DOWN is torchvision's Resize(size).
    """

    size: int
    resampling: Resampling = Resampling.AREA
    width: int | None = None
    rounding: Rounding = Rounding.NEAREST

    def __post_init__(self):
        checks.check_size(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        if self.width is None:
            height, width = crops.short_side_size(image.shape, self.size, self.rounding)
        else:
            height, width = crops.covering_size(image.shape, self.size, self.width)
        resized = crops.resize(image, height, width, self.resampling)
        return example | {"image": resized}


@dataclasses.dataclass(kw_only=True)
class CentralCrop:
    """Cuts size x width at offsets (side - size) / 2; refuses smaller images.

    Half a pixel is rounded DOWN (TensorFlow, Hugging Face) or to the NEAREST, even one
    (torchvision, timm).
    """

    size: int
    width: int | None = None
    rounding: Rounding = Rounding.DOWN

    def __post_init__(self):
        checks.check_size(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        height, width = checks.target(self)
        checks.check_fits(self, image)
        box = crops.centre_box(image.shape, height, width, self.rounding)
        return example | {"image": crops.crop(image, box)}


@dataclasses.dataclass(kw_only=True)
class RandomCrop:
    """Cuts size x width anywhere, after `padding` pixels of zeros on every side."""

    size: int
    width: int | None = None
    padding: int = 0

    def __post_init__(self):
        checks.check_size(self)
        if self.padding < 0:
            raise ValueError(f"RandomCrop.padding={self.padding}: use 0 or more.")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        if self.padding:
            around = (self.padding, self.padding), (self.padding, self.padding), (0, 0)
            image = np.pad(image, around)
        height, width = checks.target(self)
        checks.check_fits(self, image)
        box = crops.random_box(image.shape, height, width, rng)
        return example | {"image": crops.crop(image, box)}


@dataclasses.dataclass(kw_only=True)
class FlipLeftRight:
    """Mirrors every second image, by chance."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        if rng.random() < 0.5:
            return dict(example)
        return example | {"image": crops.with_channels(cv2.flip(image, 1))}


@dataclasses.dataclass(kw_only=True)
class RandomAffine:
    """Rotates, scales, shears and shifts a small image by a little.

    Angle and shear are uniform in +-degrees and +-shear_degrees, the scale uniform in
    [scale_min, scale_max], the shift uniform in +-translate times each side. Bilinear,
    in steps of 1/32 pixel or finer; what comes from outside the image is `fill`.
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
        moved = crops.affine(
            image,
            degrees=self.degrees * draws[0],
            scale=middle + (self.scale_max - self.scale_min) / 2 * draws[1],
            shear_degrees=self.shear_degrees * draws[2],
            right_px=self.translate * width * draws[3],
            down_px=self.translate * height * draws[4],
            fill=self.fill,
        )
        return example | {"image": moved}


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
    """Turns dark on light into light on dark: 255 - image."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return example | {"image": np.bitwise_not(image_of(example, self))}


@dataclasses.dataclass(kw_only=True)
class Keep:
    """Drops every key but these; raises ValueError if one of them is missing."""

    keys: tuple[str, ...] = ("image", "label")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        if missing := set(self.keys) - set(example):
            raise ValueError(f"Keep: no {sorted(missing)} among {sorted(example)}.")
        return {key: example[key] for key in self.keys}


def _resized(op, example: Example, image: np.ndarray) -> Example:
    return example | {"image": crops.resize(image, *checks.target(op), op.resampling)}
