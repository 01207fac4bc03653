"""Translates our preprocessing for timm, torchvision and Hugging Face."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from big_vision_lite.conversion.preprocessing import (
    INTERPOLATIONS,
    RESAMPLES,
    Preprocessing,
    Size,
)
from big_vision_lite.data.ops import (
    CentralCrop,
    Decode,
    Resize,
    ResizeSmall,
    ToGray,
    geometry,
)
from big_vision_lite.data.ops.resampling import Resampling, Rounding
from big_vision_lite.types import Op

# The nearest filters of theirs, all of which antialias.
FILTERS = {
    **{ours: name for name, ours in INTERPOLATIONS.items()},
    Resampling.BILINEAR: "bilinear",
    Resampling.ANTIALIAS: "bilinear",
    Resampling.AREA: "bilinear",
    Resampling.BICUBIC: "bicubic",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """The preprocessing of another library; `inexact` says where its pixels differ.

    With an empty `inexact`, timm and torchvision make the same pixels. Hugging Face's
    fast processors resize with torch's own code, which differs by 1 of 255 in places.
    """

    config: dict[str, Any]
    inexact: tuple[str, ...]


def to_timm(preprocessing: Preprocessing, channels: int = 3) -> Written:
    """Returns the part of a pretrained_cfg that timm.data.create_transform reads.

    Raises:
        ValueError: there are ops beside a resize and a central crop, or no crop_pct
            gives the resize.
    """
    resize, crop = _steps(preprocessing.ops)
    size = preprocessing.image_size_px
    resized = _resized(resize, size)
    square = resized[0] == resized[1]
    return Written(
        config={
            "input_size": (channels, *size),
            "interpolation": _filter(resize),
            "crop_pct": _fraction(size, resized),
            "crop_mode": "center" if isinstance(resize, ResizeSmall) else "squash",
            "mean": _unit(preprocessing.mean, channels),
            "std": _unit(preprocessing.std, channels),
        },
        inexact=_inexact(
            resize,
            crop,
            long_side=Rounding.DOWN if square else Rounding.NEAREST,
            offset=Rounding.NEAREST,
        )
        + _turned(preprocessing.ops),
    )


def to_torchvision(preprocessing: Preprocessing) -> Written:
    """Returns the arguments of torchvision's preset ImageClassification.

    Raises:
        ValueError: the ops are not a resize of the short side and a square crop.
    """
    resize, crop = _steps(preprocessing.ops)
    height, width = preprocessing.image_size_px
    if not isinstance(resize, ResizeSmall) or resize.width_px or height != width:
        raise ValueError(
            "torchvision's preset resizes the short side and cuts a square; use "
            "ResizeSmall(size_px=...) and CentralCrop(size_px=...), or export it with "
            "--to timm."
        )
    return Written(
        config={
            "crop_size": height,
            "resize_size": resize.size_px,
            "interpolation": _filter(resize),
            "mean": _unit(preprocessing.mean, 3),
            "std": _unit(preprocessing.std, 3),
        },
        inexact=_inexact(resize, crop, long_side=Rounding.DOWN, offset=Rounding.NEAREST)
        + _turned(preprocessing.ops),
    )


def to_huggingface(preprocessing: Preprocessing, channels: int = 3) -> Written:
    """Returns the content of preprocessor_config.json.

    It begins with an image. transformers' pipelines turn what they read of a file as
    its EXIF says, its processors do not.

    Raises:
        ValueError: there are ops beside a resize and a central crop, or the resize
            covers a shape that is no square.
    """
    resize, crop = _steps(preprocessing.ops)
    height, width = preprocessing.image_size_px
    if isinstance(resize, ResizeSmall):
        if resize.width_px is not None:
            raise ValueError(
                "Hugging Face resizes the short side, or both, never to cover a shape; "
                "use ResizeSmall without width, or Resize."
            )
        sides = {"shortest_edge": resize.size_px}
    else:
        sides = dict(
            zip(("height", "width"), _resized(resize, (height, width)), strict=True)
        )
    codes = {INTERPOLATIONS[name]: name for name in INTERPOLATIONS}
    numbers = {codes[ours]: number for number, ours in RESAMPLES.items()}
    return Written(
        config={
            "image_processor_type": "BitImageProcessor"
            if crop
            else "ViTImageProcessor",
            "do_resize": True,
            "size": sides,
            "resample": numbers[_filter(resize)],
            "do_center_crop": crop is not None,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(_unit(preprocessing.mean, channels)),
            "image_std": list(_unit(preprocessing.std, channels)),
        },
        inexact=_inexact(resize, crop, long_side=Rounding.DOWN, offset=Rounding.DOWN)
        + _turned(preprocessing.ops),
    )


def _steps(ops: Sequence[Op]) -> tuple[Resize | ResizeSmall | None, CentralCrop | None]:
    """Returns the resize and the crop of a preprocessing that has no other steps.

    Raises:
        ValueError: it has other steps, or ResizeSmall without a crop.
    """
    steps: list[Any] = [op for op in ops if not isinstance(op, Decode | ToGray)]
    resize: Resize | ResizeSmall | None = None
    crop: CentralCrop | None = None
    if steps and isinstance(steps[0], Resize | ResizeSmall):
        resize, *steps = steps
    if steps and isinstance(steps[0], CentralCrop):
        crop, *steps = steps
    if steps or (isinstance(resize, ResizeSmall) and crop is None):
        names = ", ".join(type(op).__name__ for op in ops)
        raise ValueError(
            f"preprocess=({names}) has no counterpart elsewhere; others know Resize or "
            "ResizeSmall, then CentralCrop."
        )
    return resize, crop


def _resized(resize: Resize | ResizeSmall | None, size: Size) -> Size:
    """Returns the target of the resize; without one, images have `size` already."""
    return size if resize is None else geometry.target(resize)


def _filter(resize: Resize | ResizeSmall | None) -> str:
    return "bilinear" if resize is None else FILTERS[resize.resampling]


def _fraction(size: Size, resized: Size) -> float:
    """Returns the crop_pct from which timm computes `resized` for a crop of `size`."""
    candidates = [
        side / (larger + more)
        for side, larger in zip(size, resized, strict=True)
        for more in (0, 0.5)
    ]
    for fraction in candidates:
        if tuple(math.floor(side / fraction) for side in size) == resized:
            return fraction
    raise ValueError(
        f"timm has no crop_pct that resizes to {resized} px before it cuts {size} px; "
        "resize both sides by the same factor."
    )


def _unit(values: Sequence[float], channels: int) -> tuple[float, ...]:
    repeated = tuple(values) * (channels if len(values) == 1 else 1)
    return tuple(value / 255 for value in repeated)


def _inexact(
    resize: Resize | ResizeSmall | None,
    crop: CentralCrop | None,
    *,
    long_side: Rounding,
    offset: Rounding,
) -> tuple[str, ...]:
    """Returns notes on another filter and on sides and offsets that round otherwise."""
    said = []
    if resize is not None and resize.resampling not in INTERPOLATIONS.values():
        said.append(
            f"resampling={resize.resampling} is replaced by PIL's {_filter(resize)}, "
            "which antialiases"
        )
    if isinstance(resize, ResizeSmall) and resize.rounding != long_side:
        said.append(
            f"the long side is rounded {resize.rounding} here, {long_side} there"
        )
    if crop is not None and crop.rounding != offset:
        said.append(
            f"offsets of the crop are rounded {crop.rounding} here, {offset} there: "
            "half a pixel at odd margins"
        )
    return tuple(said)


def _turned(ops: Sequence[Op]) -> tuple[str, ...]:
    """Returns the note on EXIF, of which no other library's file has a word."""
    if any(isinstance(op, Decode) and op.orientation != "ignore" for op in ops):
        return (
            "images are turned as their EXIF says here; there turn them before: image "
            "= PIL.ImageOps.exif_transpose(image)",
        )
    return ()
