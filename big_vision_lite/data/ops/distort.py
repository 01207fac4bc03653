"""Distortions of colour and sharpness that views for self-supervision need."""

import dataclasses

import cv2
import numpy as np

from big_vision_lite.data.ops.decode import Example, image_of

# ITU-R BT.601, as PIL and torchvision turn RGB into gray.
GRAY = np.array([0.299, 0.587, 0.114], np.float32)


@dataclasses.dataclass(kw_only=True)
class ColorJitter:
    """Changes brightness, contrast, saturation and hue at random, in random order.

    With `probability`, as torchvision's op of this name: the first three multiply by a
    factor uniform in 1 +- their value, not below 0, contrast about the mean gray of the
    image, saturation about each pixel's gray; hue turns by a share of the circle
    uniform in +- its value. Gray images have the first two alone. `offset` adds a
    number uniform in +- its value, in units of 0..255, to all pixels.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    offset: float = 0.0
    probability: float = 1.0

    def __post_init__(self):
        _check_probability(self)
        for name in ("brightness", "contrast", "saturation", "offset"):
            if getattr(self, name) < 0:
                raise ValueError(f"ColorJitter.{name}={getattr(self, name)}: use >= 0.")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(
                f"ColorJitter.hue={self.hue} is a share of the circle, 0 to 0.5."
            )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        if rng.random() >= self.probability:
            return example
        steps = {
            "brightness": self.brightness,
            "contrast": self.contrast,
            "saturation": self.saturation,
            "hue": self.hue,
            "offset": self.offset,
        }
        names = list(steps)
        for index in rng.permutation(len(names)):
            name, most = names[index], steps[names[index]]
            draw = rng.uniform(-most, most)
            if most and (image.shape[-1] == 3 or name not in ("saturation", "hue")):
                image = _CHANGES[name](image, draw)
        return {**example, "image": image}


@dataclasses.dataclass(kw_only=True)
class RandomGray:
    """Replaces colours by their gray, in all three channels, with `probability`."""

    probability: float = 0.2

    def __post_init__(self):
        _check_probability(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        if rng.random() >= self.probability or image.shape[-1] != 3:
            return example
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return {**example, "image": np.repeat(gray[:, :, None], 3, axis=2)}


@dataclasses.dataclass(kw_only=True)
class GaussianBlur:
    """Blurs with `probability`, by a Gaussian with a deviation uniform in px.

    The kernel is `kernel_px` wide (SimCLR: a tenth of the side, DINO: 9 px). DINO's own
    code passes 1 - p to an op that applies with that probability, so what ran there is
    the opposite of its paper; here `probability` is what it says.
    """

    probability: float = 0.5
    sigma_min: float = 0.1
    sigma_max: float = 2.0
    kernel_px: int = 9

    def __post_init__(self):
        _check_probability(self)
        if not 0 < self.sigma_min <= self.sigma_max or self.kernel_px % 2 == 0:
            raise ValueError(
                f"GaussianBlur: sigma_min={self.sigma_min}, sigma_max={self.sigma_max}"
                f", kernel_px={self.kernel_px}: use 0 < sigma_min <= sigma_max and an "
                "odd kernel_px."
            )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        sigma = rng.uniform(self.sigma_min, self.sigma_max)
        if rng.random() >= self.probability:
            return example
        size = (self.kernel_px, self.kernel_px)
        blurred = cv2.GaussianBlur(
            image, size, sigma, borderType=cv2.BORDER_REFLECT_101
        )
        return {**example, "image": blurred.reshape(image.shape)}


@dataclasses.dataclass(kw_only=True)
class Solarize:
    """Inverts all values from `threshold` on, with `probability` (BYOL, DINO)."""

    probability: float = 0.2
    threshold: int = 128

    def __post_init__(self):
        _check_probability(self)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = image_of(example, self)
        if rng.random() >= self.probability:
            return example
        table = np.arange(256, dtype=np.uint8)
        table[self.threshold :] = 255 - table[self.threshold :]
        return {**example, "image": table[image]}


def _check_probability(op: object) -> None:
    probability = getattr(op, "probability", None)
    if probability is None or not 0 <= probability <= 1:
        raise ValueError(
            f"{type(op).__name__}.probability={probability}: use a number in 0..1."
        )


def _scaled(image: np.ndarray, factor: float, centre: float) -> np.ndarray:
    """Returns centre + factor * (image - centre), rounded into 0..255."""
    table = centre + factor * (np.arange(256, dtype=np.float32) - centre)
    return np.clip(np.round(table), 0, 255).astype(np.uint8)[image]


def _brightness(image: np.ndarray, draw: float) -> np.ndarray:
    return _scaled(image, max(0.0, 1 + draw), 0.0)


def _contrast(image: np.ndarray, draw: float) -> np.ndarray:
    gray = image @ GRAY if image.shape[-1] == 3 else image
    return _scaled(image, max(0.0, 1 + draw), float(np.round(gray.mean())))


def _offset(image: np.ndarray, draw: float) -> np.ndarray:
    table = np.arange(256, dtype=np.float32) + draw
    return np.clip(np.round(table), 0, 255).astype(np.uint8)[image]


def _saturation(image: np.ndarray, draw: float) -> np.ndarray:
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None].astype(np.float32)
    mixed = gray + max(0.0, 1 + draw) * (image.astype(np.float32) - gray)
    return np.clip(np.round(mixed), 0, 255).astype(np.uint8)


def _hue(image: np.ndarray, draw: float) -> np.ndarray:
    turned = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    # 256 steps a circle: the sum wraps around.
    turned[:, :, 0] += np.uint8(round(draw * 256) % 256)
    return cv2.cvtColor(turned, cv2.COLOR_HSV2RGB_FULL)


_CHANGES = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "offset": _offset,
}
