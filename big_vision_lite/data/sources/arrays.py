"""Sources in memory: arrays, the digits, class names alone; and fingerprints."""

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import numpy as np

from big_vision_lite.messages import did_you_mean

# The Example of types.py, which would import jax: worker processes load no jax.
Example = dict[str, Any]


class InMemory:
    """Images in an array, for tests and scripts; a recipe cannot hold arrays.

    `images` [N, H, W, C] or [N, H, W]: uint8, or another type with values in 0..255
    (rounded). `labels`: int [N], or 0/1 [N, C] for several classes an image; None for
    none. `keys` are the other keys of an example, one item an image: arrays such as
    "mask" [N, H, W], a list of "boxes" [n, 4], or strings. Raises ValueError for NaN,
    infinity, values or labels out of range and wrong shapes.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: Sequence[str] = (),
        keys: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
    ):
        self.class_names = tuple(class_names)
        self._images = _checked_images(images)
        self._labels = None
        if labels is not None:
            self._labels = _checked_labels(labels, len(images), len(self.class_names))
        elif self.class_names:
            raise ValueError(
                f"{len(self.class_names)} class names and no labels; give both or none."
            )
        self._keys = dict(keys or {})
        for key, items in self._keys.items():
            if key in ("image", "label") or len(items) != len(images):
                raise ValueError(
                    f"keys[{key!r}] has {len(items)} items for {len(images)} images; "
                    'expected one an image, under another name than "image" and '
                    '"label".'
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        labels = () if self._labels is None else (self._labels,)
        parts = [*self.class_names, self._images, *labels]
        for key, items in self._keys.items():
            parts.append(key)
            parts += [i if isinstance(i, str | bytes) else np.asarray(i) for i in items]
        return content_hash(parts)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """Returns "image" [H, W, C], "label", an int or float32 [C], and `keys`."""
        example: dict[str, Any] = {"image": self._images[index].copy()}
        if self._labels is not None:
            label = self._labels[index]
            example["label"] = int(label) if self._labels.ndim == 1 else label.copy()
        for key, items in self._keys.items():
            item = items[index.__index__()]
            example[key] = item.copy() if isinstance(item, np.ndarray) else item
        return example

    def name(self, index: SupportsIndex) -> str:
        """Returns the row of an example, for messages."""
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


# Rows of the file, which is ordered by writer.
DIGITS_SPLITS = {"train": slice(0, 1438), "test": slice(1438, 1797)}


@dataclasses.dataclass(kw_only=True)
class Digits:
    """Handwritten digits, uint8 [8, 8, 1], ten classes; a file of scikit-learn.

    UCI optdigits, Kaynak 1995. The file is ordered by writer: `split` "train" is its
    first 1,438 images, "test" the last 359, mostly by other writers.
    """

    split: str = "train"

    def __post_init__(self):
        if self.split not in DIGITS_SPLITS:
            raise ValueError(
                f"split={self.split!r} of the digits is none of "
                f"{', '.join(DIGITS_SPLITS)}.{did_you_mean(self.split, DIGITS_SPLITS)}"
            )

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        table = _digits_table()[DIGITS_SPLITS[self.split]]
        # Stored as 0..16.
        images = np.round(table[:, :64] * (255 / 16)).astype(np.uint8)
        return images.reshape(-1, 8, 8, 1), table[:, 64].astype(np.int32)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple("0123456789")

    @functools.cached_property
    def fingerprint(self) -> str:
        images, labels = self._arrays
        return content_hash((images.tobytes(), labels.tobytes()))

    def __len__(self) -> int:
        return len(self._arrays[1])

    def __getitem__(self, index: SupportsIndex) -> Example:
        """Returns {"image": uint8 [8, 8, 1], "label": int}."""
        images, labels = self._arrays
        return {"image": images[index].copy(), "label": int(labels[index])}

    def name(self, index: SupportsIndex) -> str:
        """Returns the split and the row of an example, for messages."""
        return f"digits {self.split}: image {range(len(self))[index]}"

    def __getstate__(self) -> dict[str, Any]:
        return fields_of(self)


def _digits_table() -> np.ndarray:
    # Read from the file, because importing sklearn.datasets takes 3 s and 100 MB.
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "the digits are a file of scikit-learn, which is not installed; "
            "install it: pip install scikit-learn"
        )
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path) as file:
        return np.loadtxt(file, delimiter=",", dtype=np.uint8)


def fields_of(config: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass: a pickle state without open files or locks."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


@dataclasses.dataclass(kw_only=True)
class NoImages:
    """Names the classes of weights that came from `origin`; holds nothing to train on.

    To train on images of your own, start a recipe from the weights: --config.init.path.
    """

    classes: tuple[str, ...]
    origin: str

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    @property
    def fingerprint(self) -> str:
        return content_hash((self.origin, *self.classes))

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        self._refuse()

    def name(self, index: SupportsIndex) -> str:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(
            f"The weights of {self.origin} came without images. Give a recipe its own "
            f"data and --config.init.path={self.origin}"
        )


def content_hash(parts: Iterable[str | bytes | np.ndarray]) -> str:
    """Returns 16 hex digits that change with any part, its dtype or its shape."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(repr((part.shape, str(part.dtype))).encode())
            data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        else:
            data = part if isinstance(part, bytes) else os.fsencode(part)
        # The length keeps ("ab", "c") from ("a", "bc").
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
