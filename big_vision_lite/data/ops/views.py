"""Makes several views of one image: chains of ops, each image under its own key."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np

from big_vision_lite.data.ops.decode import Example, image_of
from big_vision_lite.data.ops.spatial import SPATIAL


# The Op of types.py, which ops cannot import: worker processes load no jax.
@runtime_checkable
class Op(Protocol):
    """One numpy transformation of one example on the host."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example: ...


@dataclasses.dataclass(kw_only=True)
class View:
    """A chain of ops that runs `count` times; its images go to the key `name`."""

    name: str
    ops: tuple[Op, ...] = ()
    count: int = 1

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(
                f"View {self.name!r}: count={self.count}; use 1 or more, or leave the "
                "view out."
            )
        for op in self.ops:
            if not callable(op) or isinstance(op, type):
                raise ValueError(
                    f"View {self.name!r} holds {op!r}, not an op; give objects such as "
                    "FlipLeftRight(), with the parentheses."
                )


@dataclasses.dataclass(kw_only=True)
class Views:
    """Makes views of a decoded image: uint8 [count, H, W, C] under the name of each.

    Views of the same name stand in one array, in their order: chains that differ.

    Two large and six small crops, for self-distillation:

        Views(views=(
            View(name="global", ops=(RandomResizedCrop(size_px=224),), count=2),
            View(name="local", ops=(RandomResizedCrop(size_px=96),), count=6),
        ))

    An op before decodes the image once. Every view starts from that image; all draw
    from one random stream. Only the image of a view is kept, with a leading axis even
    for a count of 1. "image", "mask" and "boxes" are dropped, unless `keep_image` keeps
    them unchanged; other keys stay.
    """

    views: tuple[View, ...]
    keep_image: bool = False

    def __post_init__(self):
        if not self.views:
            raise ValueError("Views has no views: give at least one View(name=...).")

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image_of(example, self)
        if taken := sorted({view.name for view in self.views} & set(example)):
            raise ValueError(
                f"Views would overwrite {taken} of the example; give these views other "
                "names."
            )
        dropped = () if self.keep_image else ("image", *SPATIAL)
        result = {key: value for key, value in example.items() if key not in dropped}
        made: dict[str, list[np.ndarray]] = {}
        for view in self.views:
            # One generator for all views: a spawned one depends on earlier spawns.
            images = [_viewed(view, example, rng) for _ in range(view.count)]
            made.setdefault(view.name, []).extend(images)
        for name, images in made.items():
            if len({image.shape for image in images}) > 1:
                sizes = sorted({"x".join(map(str, image.shape)) for image in images})
                raise ValueError(
                    f"View {name!r} made images of several sizes, "
                    f"{', '.join(sizes)}: end its ops with one that fixes the size, "
                    "such as RandomResizedCrop."
                )
            result[name] = np.stack(images)
        return result


def _viewed(view: View, example: Example, rng: np.random.Generator) -> np.ndarray:
    seen = dict(example)
    for op in view.ops:
        seen = op(seen, rng)
    return image_of(seen, view)
