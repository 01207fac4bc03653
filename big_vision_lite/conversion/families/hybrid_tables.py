"""What the formats of hybrids share: a ViT that counts cells of a trunk's grid."""

import dataclasses
from collections.abc import Callable
from typing import Any

from big_vision_lite.conversion.formats import Architecture
from big_vision_lite.models.bit_v1 import Trunk, stride_of
from big_vision_lite.models.vit import ViT


def cells(trunk: Trunk, image_size: tuple[int, int]) -> tuple[int, int]:
    """Returns (rows, columns) of the trunk's grid; sizes of the image round up."""
    stride = stride_of(trunk)
    return -(-image_size[0] // stride), -(-image_size[1] // stride)


def with_trunk(found: Architecture, trunk: Trunk, channels: int) -> Architecture:
    """Returns a ViT that was read as one over cells, over images."""
    size, stride = found.image_size, stride_of(trunk)
    return dataclasses.replace(
        found,
        model=found.model.clone(stem=trunk),
        image_size=None if size is None else (size[0] * stride, size[1] * stride),
        channels=channels,
    )


def trunk_in(model: ViT) -> Trunk:
    assert isinstance(model.stem, Trunk)
    return model.stem


def check_stem(model: ViT, describe: Callable[[ViT], Any]) -> None:
    """Refuses a model that is no hybrid; `describe` is that of the ViTs without stem.

    Where that refuses, too, its reason is the one to be said.
    """
    if model.stem is None:
        describe(model)
        raise ValueError("This ViT has no stem: it goes out as a plain ViT.")
    if not isinstance(model.stem, Trunk):
        raise ValueError(
            f"stem={type(model.stem).__name__} has no counterpart in another library; "
            "bit_v1.Trunk has. Export it with --to safetensors."
        )
