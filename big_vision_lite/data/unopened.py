"""Derives counts and shapes of training data without opening it.

A plan needs no data: a made-up image goes through the recipe's ops.
"""

import time
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from big_vision_lite.data import sources
from big_vision_lite.data.host_batch import HostBatch
from big_vision_lite.data.sources import arrays
from big_vision_lite.data.sources.tfds import prepared_set
from big_vision_lite.data.sources.tfds.values import renamed
from big_vision_lite.types import Op

# Number of images in the splits of common sets, from the TFDS catalogue.
EXAMPLES = {
    "imagenet2012": {"train": 1_281_167, "validation": 50_000, "test": 100_000},
    "places365_small": {"train": 1_803_460, "validation": 36_500, "test": 328_500},
    "fashion_mnist": {"train": 60_000, "test": 10_000},
    "mnist": {"train": 60_000, "test": 10_000},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "svhn_cropped": {"train": 73_257, "test": 26_032, "extra": 531_131},
    "food101": {"train": 75_750, "validation": 25_250},
    "oxford_iiit_pet": {"train": 3_680, "test": 3_669},
    "oxford_flowers102": {"train": 1_020, "test": 6_149, "validation": 1_020},
}
# The most common height and width of a stored ImageNet photo.
PHOTO = (375, 500)


def count(source: Any) -> int | None:
    """Returns the number of examples of Digits or a set in `EXAMPLES`, else None.

    Opens nothing. Raises ValueError for a split that the set does not have.
    """
    if isinstance(source, sources.Digits):
        rows = arrays.DIGITS_SPLITS[source.split]
        return rows.stop - rows.start
    known = getattr(source, "dataset", "").partition(":")[0]
    if not isinstance(source, sources.Tfds) or known not in EXAMPLES:
        return None
    nowhere = prepared_set.Path(known)
    splits = {
        name: prepared_set.Split(name=name, shards=((nowhere, size),), num_bytes=0)
        for name, size in EXAMPLES[known].items()
    }
    whole = prepared_set.PreparedSet(
        folder=nowhere, version="", file_format="", splits=splits, features={}
    )
    return sum(part.stop - part.start for part in whole.ranges(source.split))


def example(source: Any, image: Any) -> dict[str, Any]:
    """Returns a made-up example with `image` and the keys of `source`, unopened.

    The fields of a Tfds, an ImageFolder or a Table name the keys; for any other source
    they are an image and a label. The label is 0, "boxes" one box of the whole image,
    "mask" zeros, every other key a word.
    """
    # One that repeats another gives its examples.
    if isinstance(source, sources.Tags):
        found = example(source.source, image)
        found.pop(source.key, None)
        return {**found, "label": np.zeros(source.max_tags, np.int32)}
    if hasattr(source, "source"):
        return example(source.source, image)
    if isinstance(source, sources.ImageFolder) and not source.labels:
        return {"image": image}
    if isinstance(source, sources.Table):
        return {"image": image, **_of_table(source)}
    if not isinstance(source, sources.Tfds):
        return {"image": image, "label": 0}
    found: dict[str, Any] = {}
    if source.image_key is not None:
        found["image"] = image
    if source.label_key is not None:
        found["label"] = 0
    for name in renamed(source.keys):
        found[name] = "word"
        if name == "boxes":
            found[name] = np.array([[0, 0, 1, 1]], np.float32)
        if name == "mask":
            pixels = _pixels(image) if isinstance(image, bytes) else image
            mask = np.zeros(pixels.shape[:2], np.uint8)
            found[name] = cv2.imencode(".png", mask)[1].tobytes()
            if not isinstance(image, bytes):
                found[name] = mask
    return found


def _of_table(table: sources.Table) -> dict[str, Any]:
    kinds = sources.LabelKind
    if table.kind == kinds.CLASS:
        return {"label": 0}
    if table.kind == kinds.CLASSES:
        # Only the table knows how many, where they are not pinned.
        return {"label": np.zeros(len(table.classes or table.class_names), np.float32)}
    if table.kind == kinds.TAGS:
        return {"tags": ("word",)}
    key = "target" if table.kind == kinds.NUMBERS else "label"
    return {key: np.zeros(len(table.label), np.float32)}


def rows(
    ops: Sequence[Op], preprocess: Sequence[Op], source: Any = None
) -> dict[str, np.ndarray]:
    """Returns the arrays [1, ...] that `ops` make of a made-up example of `source`.

    The image has the size that `preprocess` gives, the only known one where `ops` keep
    the size of the images.
    """
    batch = HostBatch(step=1, rows=range(1))
    batch.store(0, _made(ops, photo(*native_size(preprocess)), source))
    return batch.arrays


def native_size(preprocess: Sequence[Op]) -> tuple[int, int, int]:
    """Returns height, width and channels of what `preprocess` makes of a photo."""
    shape = np.shape(_made(preprocess, photo(*PHOTO, 3))["image"])
    height, width, channels = shape
    return int(height), int(width), int(channels)


def seconds_an_image(
    ops: Sequence[Op],
    preprocess: Sequence[Op],
    patience: float = 0.5,
    source: Any = None,
) -> float:
    """Returns the median CPU seconds that one thread of this machine takes an image.

    The image is a photo as large as ImageNet's, or as `preprocess` gives where `ops`
    keep its size. Runs 8 to 1,000 times, until `patience` CPU seconds have passed.
    """
    native = native_size(preprocess)
    image = photo(*PHOTO, 3)
    of_photo = {k: np.shape(x) for k, x in _made(ops, image, source).items()}
    needed = rows(ops, preprocess, source)
    if of_photo != {key: row.shape[1:] for key, row in needed.items()}:
        image = photo(*native)
    spent: list[float] = []
    while len(spent) < 8 or (sum(spent) < patience and len(spent) < 1000):
        start = time.thread_time()
        _made(ops, image, source)
        spent.append(time.thread_time() - start)
    return float(np.median(spent))


def photo(height: int, width: int, channels: int) -> bytes:
    """Returns a JPEG with about as much detail, and as many bytes, as a photo."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, channels), np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image = image.reshape(height, width, channels)
    noise = rng.integers(-12, 13, image.shape, np.int16)
    image = np.clip(image.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


def _pixels(image: bytes) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels is not None, "just encoded"
    return pixels.reshape(*pixels.shape[:2], -1)


def _made(ops: Sequence[Op], image: bytes, source: Any = None) -> dict[str, Any]:
    """Returns what the ops make of a JPEG, or of its pixels where none decodes."""
    failure: Exception | None = None
    for form in (image, _pixels(image)):
        made = example(source, form)
        try:
            rng = np.random.default_rng(0)
            for op in ops:
                made = op(made, rng)
        except ValueError as error:
            failure = error
            continue
        # Views replace "image" by keys of their own; a set may have text alone.
        if "image" not in example(source, form) or any(
            np.ndim(value) >= 3 for value in made.values()
        ):
            return made
    raise ValueError(
        "The recipe's ops made no image of a made-up photo, neither of its JPEG nor of "
        f"its pixels{f': {failure}' if failure else ''}. Put an op that decodes first, "
        "such as Decode()."
    ) from failure
