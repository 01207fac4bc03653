"""Reads features.json of a prepared TFDS set: images, labels and nested features."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from big_vision_lite.messages import did_you_mean, some

# One feature as features.json describes it.
Node = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelFeature:
    """The key of a label, its class names, and whether an example has several."""

    key: str
    class_names: tuple[str, ...]
    multiple: bool


def children(node: Node) -> Mapping[str, Node]:
    """Returns the features of a FeaturesDict by name, {} for another feature."""
    inner = content(node, "featuresDict", "FeaturesDict")
    if inner is None:
        return {}
    plain = "type" in node and not node.get("proto_cls")
    return inner if plain else inner.get("features", {})


def check_image(features: Mapping[str, Node], key: str, where: Path) -> None:
    """Raises ValueError unless feature `key` is an image stored as an encoded file."""
    node = features.get(key)
    image = None if node is None else content(node, "image", "Image")
    if image is None:
        images = [
            k for k, v in features.items() if content(v, "image", "Image") is not None
        ]
        what = "is not an image feature" if node is not None else "does not exist"
        raise ValueError(
            f"image_key={key!r} {what} in {where}; images there: {some(images)}."
            f"{did_you_mean(key, images)}"
        )
    dtype = str(image.get("dtype", "uint8"))
    if "int" not in dtype:
        raise ValueError(
            f"image_key={key!r} in {where} holds {dtype} pixels; read are images "
            "stored as encoded files of 8 or 16 bit."
        )


def label_feature(features: Mapping[str, Node], key: str, where: Path) -> LabelFeature:
    """Returns the label feature `key`, whose values are a class or a list of classes.

    Raises:
        ValueError: it is another feature, or its names and its count of classes differ.
    """
    node, depth = walk(features, key)
    # TFDS stores a list of lists in another way.
    label = None
    if node is not None and depth < 2:
        label = content(node, "classLabel", "ClassLabel")
    if label is None:
        labels = [k for k in paths(features) if _is_label(features, k)]
        what = "does not exist" if node is None else "is not a class label"
        raise ValueError(
            f"label_key={key!r} {what} in {where}; class labels there: {some(labels)}."
            f"{did_you_mean(key, labels)}"
        )
    count = int(label.get("numClasses") or label.get("num_classes") or 0)
    names = tuple(str(number) for number in range(count))
    # If the classes have names, TFDS writes them to this file, one a line.
    path = where / f"{key.replace('/', '-')}.labels.txt"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").split("\n")
        names = tuple(line.strip() for line in lines if line.strip())
    if count and len(names) != count:
        raise ValueError(
            f"{path} names {len(names)} classes, features.json counts {count}; "
            "copy or prepare the set again."
        )
    return LabelFeature(key=key, class_names=names, multiple=depth > 0)


def walk(features: Mapping[str, Node], key: str) -> tuple[Node | None, int]:
    """Returns the feature at `objects/label` and the number of lists around it.

    Returns (None, 0) if there is no such feature.
    """
    node, depth, rest = None, 0, key.split("/")
    while rest:
        node = features.get(rest.pop(0))
        if node is None:
            return None, 0
        while (sequence := content(node, "sequence", "Sequence")) is not None:
            node, depth = sequence["feature"], depth + 1
        features = children(node)
    return node, depth


def paths(features: Mapping[str, Node], prefix: str = "") -> list[str]:
    """Returns the names of all features, nested ones as `objects/label`."""
    found = []
    for name, node in features.items():
        sequence = content(node, "sequence", "Sequence")
        inner = children(node if sequence is None else sequence["feature"])
        found += paths(inner, f"{prefix}{name}/") if inner else [prefix + name]
    return found


def _is_label(features: Mapping[str, Node], key: str) -> bool:
    node, _ = walk(features, key)
    return node is not None and content(node, "classLabel", "ClassLabel") is not None


def content(node: Node, field: str, class_name: str) -> Mapping[str, Any] | None:
    """Returns the content of a feature of `class_name`, None for another feature.

    `field` is its name in today's form; the older form has `class_name`.
    """
    if field in node:
        return node[field]
    if str(node.get("type", "")).rpartition(".")[2] != class_name:
        return None
    described = node.get("content", {})
    return json.loads(described) if isinstance(described, str) else described
