"""The formats that are known, family by family, in the order they are tried in."""

from big_vision_lite.conversion.families import (
    bit,
    bit_archives,
    bit_huggingface,
    hybrid,
    mixer,
    ours,
    resnet,
    vit_archives,
    vit_huggingface,
    vit_huggingface_dinov2,
    vit_huggingface_siglip,
    vit_timm,
    vit_torchvision,
)
from big_vision_lite.conversion.formats import Format

FORMATS: tuple[Format, ...] = (
    *bit_huggingface.FORMATS,
    *bit_archives.FORMATS,
    *bit.FORMATS,
    *hybrid.FORMATS,
    *mixer.FORMATS,
    *ours.FORMATS,
    *resnet.FORMATS,
    *vit_huggingface.FORMATS,
    *vit_huggingface_dinov2.FORMATS,
    *vit_huggingface_siglip.FORMATS,
    *vit_archives.FORMATS,
    *vit_timm.FORMATS,
    *vit_torchvision.FORMATS,
)
