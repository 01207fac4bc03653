"""A source of images that are already an array."""

import functools
from collections.abc import Sequence
from typing import Any, SupportsIndex

import numpy as np

from big_vision_lite.data.content_hash import content_hash


class InMemory:
    """Images in an array, for tests and own scripts; a recipe cannot hold it.

    Arrays are no part of a configuration. `images` [N, H, W, C] or [N, H, W]: uint8,
    or another type with values in 0..255 (rounded). `labels`: int [N], or 0/1 [N, C]
    for several classes an image. Raises ValueError for NaN, infinity, values or labels
    out of range and wrong shapes.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
    ):
        self.class_names = tuple(class_names)
        self._images = _checked_images(images)
        self._labels = _checked_labels(labels, len(images), len(self.class_names))

    @functools.cached_property
    def fingerprint(self) -> str:
        return content_hash((*self.class_names, self._images, self._labels))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Returns {"image": uint8 [H, W, C], "label": int or float32 [C]}."""
        label = self._labels[index]
        single = self._labels.ndim == 1
        return {
            "image": self._images[index].copy(),
            "label": int(label) if single else label.copy(),
        }

    def name(self, index: SupportsIndex) -> str:
        """Says which row of the array."""
        return f"image {range(len(self))[index]} of an array"


def _checked_images(images: np.ndarray) -> np.ndarray:
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"images has shape {images.shape}; expected [N, H, W, C] or [N, H, W], "
            "none of them 0."
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype == np.uint8:
        return images
    if images.dtype.kind not in "iuf":
        raise ValueError(f"images are {images.dtype}; expected uint8 or float.")
    finite = np.isfinite(images).all((1, 2, 3))
    if not finite.all():
        raise ValueError(
            f"images holds NaN or infinity, first in image {np.argmin(finite)}; "
            "repair or leave out these images."
        )
    low, high = images.min(), images.max()
    fractions = images.dtype.kind == "f" and 0 < high <= 1 and (images % 1).any()
    if low < 0 or high > 255 or fractions:
        raise ValueError(
            f"images has values {low:g} to {high:g}; expected 0..255, the units of "
            "uint8: scale them, for example images * 255 if they are 0..1."
        )
    return np.round(images).astype(np.uint8)


def _checked_labels(labels: np.ndarray, count: int, num_classes: int) -> np.ndarray:
    if len(labels) != count or labels.ndim not in (1, 2):
        raise ValueError(
            f"labels has shape {labels.shape} for {count} images; expected "
            f"({count},), or ({count}, {num_classes}) of 0 and 1."
        )
    if labels.ndim == 2:
        if labels.shape[1] != num_classes or not np.isin(labels, (0, 1)).all():
            raise ValueError(
                f"labels of shape {labels.shape} must be 0 or 1, one column for each "
                f"of the {num_classes} classes."
            )
        return labels.astype(np.float32)
    wrong = (labels < 0) | (labels >= num_classes) | (labels % 1 != 0)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(
            f"labels[{first}]={labels[first]} is out of range, as are {wrong.sum()} "
            f"labels in all; {num_classes} class names allow 0 to {num_classes - 1}."
        )
    return labels.astype(np.int32)
