"""Translates the preprocessing of other libraries into our ops."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from big_vision_lite.conversion.assumption import About, Assumption
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.data.ops import CentralCrop, Decode, Resize, ResizeSmall
from big_vision_lite.data.ops.resampling import Resampling, Rounding
from big_vision_lite.types import Op

Size = tuple[int, int]

# torchvision's, in 0..1.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# CLIP's (arXiv:2103.00020), in 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5,)
# Hugging Face's flag for BGR, in which Caffe's models were trained.
FLIP = "do_flip_channel_order"

INTERPOLATIONS = {
    "bilinear": Resampling.PIL_BILINEAR,
    "bicubic": Resampling.PIL_BICUBIC,
    "lanczos": Resampling.PIL_LANCZOS,
}
# Hugging Face writes PIL's numbers.
RESAMPLES = {
    1: Resampling.PIL_LANCZOS,
    2: Resampling.PIL_BILINEAR,
    3: Resampling.PIL_BICUBIC,
}
# Defaults of Hugging Face's image processors for keys that a file leaves out, by the
# beginning of their names.
PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"size": {"height": 224, "width": 224}, "resample": 2},
    "Siglip": {"size": {"height": 224, "width": 224}, "resample": 3},
    "Bit": {
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "do_center_crop": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    },
    "ConvNext": {"size": {"shortest_edge": 384}, "resample": 3, "crop_pct": 0.875},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Ops that make uint8 [*image_size_px, C] from a file; mean, std are in 0..255."""

    ops: tuple[Op, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size_px: Size
    assumptions: tuple[Assumption, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumed:
    """The preprocessing assumed for weights without one; `words` tell the user.

    `value_range` says how pixels are scaled. `make(image_size_px, channels)` gets None
    for a size that the weights leave open. `words_of_colour` are added to the range for
    images of 3 channels.
    """

    words: str
    value_range: str
    make: Callable[[Size | None, int], Preprocessing]
    words_of_colour: Callable[[Size], str] = lambda size: ""


def read(
    weights: Weights, assumed: Assumed, image_size_px: Size | None, channels: int = 3
) -> Preprocessing:
    """Returns the preprocessing that comes with weights, or what is assumed.

    `image_size_px` is (height, width) where the weights fix it: it then overrides the
    written size, and the resize before a crop is scaled with it.

    Raises:
        ValueError: our ops cannot express it; says why.
    """
    config = weights.config
    if weights.preprocessor.keys() & {"image_mean", "size", FLIP}:
        return from_huggingface(weights.preprocessor, image_size_px, channels)
    if "pretrained_cfg" in config or {"input_size", "mean"} <= config.keys():
        return from_timm(config, image_size_px, channels)
    made = assumed.make(image_size_px, channels)
    scaled = f"pixels are scaled to {assumed.value_range}, as there"
    if channels == 3:
        scaled += assumed.words_of_colour(made.image_size_px)
    none = f"no preprocessing comes with {weights.path}; assumed is {assumed.words}"
    assumptions = (
        Assumption(About.PREPROCESSING, none),
        Assumption(About.VALUE_RANGE, scaled),
    )
    return dataclasses.replace(made, assumptions=assumptions)


def from_timm(
    config: Mapping[str, Any], image_size_px: Size | None = None, channels: int = 3
) -> Preprocessing:
    """Returns what timm makes of a pretrained_cfg, or of the config.json around it.

    Raises:
        ValueError: a crop_pct above 1, another crop_mode or another interpolation.
    """
    config = config.get("pretrained_cfg") or config
    _, height, width = config.get("input_size") or (channels, 224, 224)
    written = (height, width)
    size = image_size_px or written
    fraction = config.get("crop_pct") or 0.875
    if fraction > 1:
        raise ValueError(
            f"crop_pct={fraction} puts a border around the image, which no op here "
            "does; use 1 or less."
        )
    mode = config.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise ValueError(f'crop_mode="{mode}" is not read; read are center and squash.')
    resampling = _resampling(INTERPOLATIONS, config.get("interpolation") or "bicubic")
    resized = _sides([math.floor(side / fraction) for side in size])
    if mode == "squash":
        resize: Op = Resize(**resized, resampling=resampling)
    else:
        # timm leaves squares to torchvision's Resize, and does other shapes itself.
        down = resized["width_px"] is None
        rounding = Rounding.DOWN if down else Rounding.NEAREST
        resize = ResizeSmall(**resized, resampling=resampling, rounding=rounding)
    return Preprocessing(
        ops=(
            Decode(channels=channels),
            resize,
            CentralCrop(**_sides(size), rounding=Rounding.NEAREST),
        ),
        mean=_pixels(config.get("mean") or IMAGENET_MEAN),
        std=_pixels(config.get("std") or IMAGENET_STD),
        image_size_px=size,
        assumptions=_wins(image_size_px, written),
    )


def from_torchvision(
    crop_size: Size = (224, 224),
    resize_size: int | None = None,
    interpolation: str = "bilinear",
    channels: int = 3,
) -> Preprocessing:
    """Returns the ImageClassification preset: Resize, CenterCrop, ImageNet's mean, std.

    `resize_size` None is 8/7 of the crop, 256 for 224 as with the first weights.
    """
    short = min(crop_size) * 8 // 7 if resize_size is None else resize_size
    resampling = _resampling(INTERPOLATIONS, interpolation)
    return Preprocessing(
        ops=(
            Decode(channels=channels),
            ResizeSmall(size_px=short, resampling=resampling, rounding=Rounding.DOWN),
            CentralCrop(**_sides(crop_size), rounding=Rounding.NEAREST),
        ),
        mean=_pixels(IMAGENET_MEAN),
        std=_pixels(IMAGENET_STD),
        image_size_px=crop_size,
    )


def from_big_vision(image_size_px: Size, channels: int = 3) -> Preprocessing:
    """Returns the evaluation of big_vision, vision_transformer and BiT: one resize."""
    return Preprocessing(
        ops=(Decode(channels=channels), Resize(**_sides(image_size_px))),
        mean=(127.5,),
        std=(127.5,),
        image_size_px=image_size_px,
    )


def from_huggingface(
    config: Mapping[str, Any], image_size_px: Size | None = None, channels: int = 3
) -> Preprocessing:
    """Returns what Hugging Face makes of a preprocessor_config.json.

    Raises:
        ValueError: BGR images, no input size, or another size or resampling.
    """
    config = _in_full(config)
    if config.get(FLIP):
        raise ValueError(
            f'The preprocessor has "{FLIP}": true, blue before red, but images here '
            "are RGB. Flip the input channels of the first convolution (in torch "
            f"weight.flip(1)) and remove {FLIP} from preprocessor_config.json."
        )
    short, squash, crop = _huggingface_sizes(config)
    written = crop or squash
    size = image_size_px or written
    if size is None:
        raise ValueError(
            "The preprocessor fixes no input size (no crop_size, no size with height "
            "and width); add one to preprocessor_config.json."
        )
    scale = size[0] / written[0] if written else 1.0
    resampling = _resampling(RESAMPLES, config.get("resample", 2))
    steps: list[Op] = [Decode(channels=channels)]
    if short:
        small, down = round(short * scale), Rounding.DOWN
        steps += [ResizeSmall(size_px=small, resampling=resampling, rounding=down)]
    elif squash:
        sides = [round(side * scale) for side in squash] if crop else size
        steps += [Resize(**_sides(sides), resampling=resampling)]
    if crop or short:
        steps += [CentralCrop(**_sides(size), rounding=Rounding.DOWN)]
    # The model there gets (p * factor - offset - mean) / std.
    factor = config.get("rescale_factor", 1 / 255) if _does(config, "rescale") else 1.0
    offset = 1.0 if config.get("rescale_offset") else 0.0
    mean, std = (0.0,), (1.0,)
    if _does(config, "normalize"):
        mean, std = config.get("image_mean", HALF), config.get("image_std", HALF)
    return Preprocessing(
        ops=tuple(steps),
        mean=_pixels([m + offset for m in mean], factor),
        std=_pixels(std, factor),
        image_size_px=size,
        assumptions=_wins(image_size_px, written),
    )


def _in_full(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with the processor's defaults, in the newest form."""
    kind = config.get("image_processor_type") or config.get("feature_extractor_type")
    known = [name for name in PROCESSORS if str(kind).startswith(name)]
    defaults = PROCESSORS[known[0]] if known else PROCESSORS["ViT"]
    full = {**defaults, **{k: v for k, v in config.items() if v is not None}}
    for name in ("size", "crop_size"):
        side = full.get(name)
        if isinstance(side, int):  # as the first versions wrote it
            short = name == "size" and "shortest_edge" in defaults["size"]
            square = {"height": side, "width": side}
            full[name] = {"shortest_edge": side} if short else square
    return full


class _Sizes(NamedTuple):
    """The resize, to the short side or both sides or none, and the crop after it."""

    short: int | None
    squash: Size | None
    crop: Size | None


def _huggingface_sizes(config: Mapping[str, Any]) -> _Sizes:
    size = config["size"] if _does(config, "resize") else {}
    if set(size) - {"height", "width", "shortest_edge"}:
        raise ValueError(
            f"The preprocessor's size={size} is not read; read are height and width, "
            "or shortest_edge."
        )
    crop = None
    if config.get("do_center_crop"):
        crop = config["crop_size"]["height"], config["crop_size"]["width"]
    short = size.get("shortest_edge")
    if short and config.get("crop_pct"):
        # ConvNeXt's form, which ResNets share: from 384 px on nothing is cut off.
        if short >= 384:
            return _Sizes(None, (short, short), crop)
        return _Sizes(int(short / config["crop_pct"]), None, crop or (short, short))
    squash = None if short or not size else (size["height"], size["width"])
    return _Sizes(short, squash, crop)


def _does(config: Mapping[str, Any], what: str) -> bool:
    return config.get(f"do_{what}") is not False


def _resampling(known: Mapping[Any, Resampling], name: Any) -> Resampling:
    if name not in known:
        choices = ", ".join(map(str, known))
        raise ValueError(f"The resampling {name} is not read; read are {choices}.")
    return known[name]


def _sides(size: Sequence[int]) -> dict[str, Any]:
    height, width = size
    return {"size_px": height, "width_px": None if height == width else width}


def _pixels(values: Sequence[float], factor: float = 1 / 255) -> tuple[float, ...]:
    """Returns values / factor, in 0..255; equal values as a single one."""
    # Multiplied by 255, not divided by 1/255, which would not give 127.5 for 0.5.
    scale = 255.0 if factor == 1 / 255 else 1 / factor
    scaled = tuple(float(value) * scale for value in values)
    return scaled[:1] if len(set(scaled)) == 1 else scaled


def _wins(image_size_px: Size | None, written: Size | None) -> tuple[Assumption, ...]:
    if image_size_px is None or written is None or image_size_px == written:
        return ()
    said, held = (f"{height}x{width} px" for height, width in (written, image_size_px))
    words = (
        f"the preprocessing is for {said}, the weights for {held}: images are resized "
        f"and cropped to {held} in proportion"
    )
    return (Assumption(About.PREPROCESSING, words),)


def _of_transformers_with_colour(size: Size) -> str:
    scale = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    line = json.dumps({"pretrained_cfg": {"input_size": [3, *size], **scale}})
    return (
        ". DeiT, MAE and DINO have ImageNet's mean and std: for these a config.json "
        f"with {line} beside the file."
    )


_HALF = {"mean": HALF, "std": HALF}
# AugReg's transformers and mixers, timm's most common cfg.
OF_TRANSFORMERS = Assumed(
    words="timm's for transformers: 0.9 central crop, bicubic",
    value_range="[-1, 1]",
    make=lambda size, channels: from_timm({"crop_pct": 0.9, **_HALF}, size, channels),
    words_of_colour=_of_transformers_with_colour,
)
OF_TIMMS_BIT = Assumed(
    words="timm's for BiT: 0.875 central crop, bilinear",
    value_range="[-1, 1]",
    make=lambda size, channels: from_timm(
        {"crop_pct": 0.875, "interpolation": "bilinear", **_HALF}, size, channels
    ),
)
OF_TORCHVISION = Assumed(
    words="torchvision's: 256, central 224, bilinear",
    value_range="ImageNet's mean and std",
    make=lambda size, channels: from_torchvision(size or (224, 224), channels=channels),
)
OF_BIG_VISION = Assumed(
    words="big_vision's: resized to the input, no antialias",
    value_range="[-1, 1]",
    make=lambda size, channels: from_big_vision(size or (224, 224), channels),
)
