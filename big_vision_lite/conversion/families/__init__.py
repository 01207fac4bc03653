"""The formats that are known, family by family, in the order they are tried in."""

import importlib

from big_vision_lite.conversion.formats import Format

FAMILIES = (
    "bit_huggingface",
    "bit_archives",
    "bit",
    "hybrid",
    "mixer",
    "ours",
    "resnet",
    "two_tower_huggingface",
    "vit_huggingface",
    "vit_huggingface_dinov2",
    "vit_huggingface_siglip",
    "vit_archives",
    "vit_timm",
    "vit_torchvision",
)
FORMATS: tuple[Format, ...] = tuple(
    form
    for family in FAMILIES
    for form in importlib.import_module(f"{__name__}.{family}").FORMATS
)
