"""The formats that are known, family by family, in the order they are tried in."""

from big_vision_lite.conversion import preprocessing
from big_vision_lite.conversion.families import (
    bit,
    bit_archives,
    bit_huggingface,
    hybrid_npz,
    hybrid_timm,
    mixer,
    ours,
    resnet,
    vit_huggingface,
    vit_huggingface_dinov2,
    vit_huggingface_siglip,
    vit_npz,
    vit_timm,
    vit_torchvision,
)
from big_vision_lite.conversion.formats import Format

FORMATS: tuple[Format, ...] = (
    *bit_huggingface.FORMATS,
    *bit_archives.FORMATS,
    *bit.FORMATS,
    *hybrid_npz.FORMATS,
    *hybrid_timm.FORMATS,
    *mixer.FORMATS,
    *ours.FORMATS,
    *resnet.FORMATS,
    *vit_huggingface.FORMATS,
    *vit_huggingface_dinov2.FORMATS,
    *vit_huggingface_siglip.FORMATS,
    *vit_npz.FORMATS,
    *vit_timm.FORMATS,
    *vit_torchvision.FORMATS,
)

# Until these families are tables, too.
for _form in FORMATS:
    if _form.library == "npz" or _form.name == "big_vision_lite":
        type(_form).assumes = preprocessing.OF_BIG_VISION
    elif _form.name == "torchvision ViT":
        type(_form).assumes = preprocessing.OF_TORCHVISION
    elif _form.name.startswith(("timm BiT", "timm ResNetV2")):
        type(_form).assumes = preprocessing.OF_TIMMS_BIT
