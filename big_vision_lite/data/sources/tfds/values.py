"""Reads the features beside image and label of a prepared TFDS set."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from big_vision_lite.data.sources.tfds import features as tfds_features
from big_vision_lite.messages import did_you_mean, some

RENAMES = "=>"
# The order of corners, which TFDS writes down since 4.9.7; before it was the only one.
BOX_FORMAT = "REL_YXYX"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueFeature:
    """One feature; `dtype` is str for text, bytes for images and byte strings.

    `shape` is that of the array, -1 for an unknown length, () for a single value.
    """

    key: str
    dtype: Any
    shape: tuple[int, ...]

    def read(self, values: Sequence[Any] | np.ndarray) -> Any:
        """Returns a single value, a list of str or bytes, or a numpy array.

        Raises:
            ValueError: the record holds another number of values.
        """
        if self.dtype is str:
            values = [text.decode("utf-8", "replace") for text in values]
        if self.shape == () and len(values) != 1:
            raise ValueError(f"{len(values)} values of {self.key!r}; expected one.")
        if self.dtype in (str, bytes):
            return list(values) if self.shape else values[0]
        kind = np.float64 if self.dtype == np.float32 else np.int64
        try:
            array = np.asarray(values, kind).reshape(self.shape).astype(self.dtype)
        except ValueError as error:
            raise ValueError(
                f"{len(values)} values of {self.key!r}; expected the shape "
                f"{list(self.shape)}."
            ) from error
        return array if self.shape else array.item()


def renamed(keys: Sequence[str], taken: Sequence[str] = ()) -> dict[str, str]:
    """Returns {name in the example: feature} of names and "feature=>name" pairs.

    Raises:
        ValueError: a pair lacks a side, or a name is used twice or is in `taken`.
    """
    names: dict[str, str] = {}
    for pair in keys:
        feature, arrow, name = pair.partition(RENAMES)
        name = name if arrow else feature
        if not feature or not name:
            raise ValueError(
                f'keys: "{pair}" is not of the form "feature" or "feature=>name", for '
                'example "segmentation_mask=>mask".'
            )
        if name in (*names, *taken):
            raise ValueError(
                f'keys={tuple(keys)}: "{name}" would be written twice; give one of the '
                f'features another name: "{feature}=>NAME".'
            )
        names[name] = feature
    return names


def value_feature(
    features: Mapping[str, tfds_features.Node], key: str, where: Path
) -> ValueFeature:
    """Returns how feature `key` is stored; `objects/bbox` names a nested feature.

    Raises:
        ValueError: there is no such feature, or it is of a kind that is not read.
    """
    node, depth = tfds_features.walk(features, key)
    if node is None:
        there = tfds_features.paths(features)
        raise ValueError(
            f"keys: {key!r} does not exist in {where}; features there: {some(there)}."
            f"{did_you_mean(key, there)}"
        )
    content = tfds_features.content
    listed = (-1,) * depth
    if content(node, "text", "Text") is not None and depth < 2:
        return ValueFeature(key=key, dtype=str, shape=listed)
    if content(node, "classLabel", "ClassLabel") is not None and depth < 2:
        return ValueFeature(key=key, dtype=np.dtype(np.int64), shape=listed)
    box = content(node, "boundingBox", "BBoxFeature")
    if (
        box is not None
        and depth < 2
        and box.get("bboxFormat", BOX_FORMAT) == BOX_FORMAT
    ):
        return ValueFeature(key=key, dtype=np.dtype(np.float32), shape=(*listed, 4))
    image = content(node, "image", "Image") or content(node, "image", "LabeledImage")
    if image is not None and "int" in str(image.get("dtype", "uint8")) and not depth:
        return ValueFeature(key=key, dtype=bytes, shape=())
    tensor = content(node, "tensor", "Tensor") or content(node, "tensor", "Scalar")
    if tensor is not None and str(tensor.get("encoding", "none")).lower() == "none":
        shape = (*listed, *_dimensions(tensor.get("shape") or ()))
        if shape.count(-1) < 2:
            return ValueFeature(key=key, dtype=_dtype(tensor), shape=shape)
    kind = str(node.get("pythonClassName") or node.get("type")).rpartition(".")[2]
    raise ValueError(
        f"keys: {key!r} in {where} is a {kind}{' in lists' * bool(depth)} of a form "
        "that is not read; read are encoded images of 8 or 16 bit, text, classes, "
        f"boxes of {BOX_FORMAT}, and plain numbers with at most one unknown side."
    )


def _dimensions(shape: Any) -> tuple[int, ...]:
    sides = shape.get("dimensions", ()) if isinstance(shape, Mapping) else shape
    return tuple(-1 if side is None else int(side) for side in sides)


def _dtype(tensor: Mapping[str, Any]) -> Any:
    name = str(tensor.get("dtype", "float32"))
    if name in ("string", "object", "bytes"):
        return bytes
    # Records store every float in 32 bits.
    return np.dtype(np.float32 if "float" in name else name)
