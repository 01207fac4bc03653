"""Hybrids, a ViT over the grid of a trunk: timm's and vision_transformer's."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from big_vision_lite.conversion.engine import Entry
from big_vision_lite.conversion.families import bit, bit_archives, vit
from big_vision_lite.conversion.families.vit_archives import VisionTransformerViT
from big_vision_lite.conversion.families.vit_timm import TimmViT
from big_vision_lite.conversion.formats import Architecture, Size
from big_vision_lite.conversion.tables import Rows, under
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.bit_v1 import Trunk, stride_of
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

BACKBONE = "patch_embed.backbone."
# timm's hybrid with these units per stage; arguments set the ViT after the trunk.
NAMES = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}


class TimmHybrid(TimmViT):
    """timm's ResNetV2(preact=False, stem_type="same") followed by its ViT."""

    name = "timm hybrid ViT"
    requires = {
        **TimmViT.requires,
        "stem": Trunk,
        **bit.in_field("stem", {**bit.TORCH_FORM, "width": 64, "groups": bit.GROUPS}),
    }
    hints = bit.hints_on("stem")

    def recognises(self, weights: Weights) -> bool:
        arrays = weights.arrays
        # Hybrids over ResNets with batch norm are not read.
        return any(
            {f"{root}conv.weight", f"{root}norm.weight"} <= arrays.keys()
            and f"{root}norm.running_var" not in arrays
            for root in (f"{BACKBONE}stem.", BACKBONE)
        )

    def architecture(self, weights: Weights) -> Architecture:
        trunk, channels = bit.timm_trunk(weights, BACKBONE)
        inner = dataclasses.replace(weights, config=_config_in_cells(weights, trunk))
        return _over(trunk, channels, super().architecture(inner))

    def rows(self, model: ViT) -> Rows:
        trunk: Rows = bit.TIMM_TRUNK
        if not _trunk_in(model).stages:
            # A trunk without stages is its stem alone, without "stem." in the names.
            trunk = {**trunk, "conv_root": "conv", "gn_root": "norm"}
        return {**under(BACKBONE, trunk, ours="stem/"), **super().rows(model)}

    def special(self, model: ViT, size: Size) -> Sequence[Entry]:
        return super().special(model, cells(_trunk_in(model), size))

    def describe(self, model: ViT, size: Size, channels: int) -> dict[str, Any]:
        stages = _trunk_in(model).stages
        if stages not in NAMES:
            raise ValueError(
                f"{self.name} has a trunk with stages of {', '.join(map(str, NAMES))}; "
                f"this model has stages={stages}."
            )
        described = super().describe(model, size, channels)
        return {**described, "architecture": NAMES[stages]}


class ArchivedHybrid(VisionTransformerViT):
    """vision_transformer's R+ViT: the trunk of big_vision's bit followed by its ViT."""

    name = "vision_transformer hybrid ViT (npz)"
    requires = {
        **vit.requires(
            "head.hidden_dim",
            stem=Trunk,
            positions=Positions.LEARNED,
            pooling=[Pooling.CLASS_TOKEN, Pooling.AVERAGE],
        ),
        **bit.in_field("stem", bit_archives.ARCHIVE_FORM),
    }
    hints = bit.hints_on("stem")
    signs = ("conv_root/kernel", "gn_root/scale", "embedding/kernel")

    def recognises(self, weights: Weights) -> bool:
        return {*self.signs, self.positions} <= weights.arrays.keys()

    def architecture(self, weights: Weights) -> Architecture:
        trunk, channels = bit_archives.archived_trunk(weights)
        config = {**weights.config}
        if (size := config.get("image_size")) is not None:
            config["image_size"] = _in_cells(trunk, size)
        inner = dataclasses.replace(weights, config=config)
        return _over(trunk, channels, super().architecture(inner))

    def rows(self, model: ViT) -> Rows:
        trunk = under("", bit_archives.ARCHIVE_TRUNK, ours="stem/")
        return {**trunk, **super().rows(model)}

    def special(self, model: ViT, size: Size) -> Sequence[Entry]:
        return super().special(model, cells(_trunk_in(model), size))

    def describe(self, model: ViT, size: Size, channels: int) -> dict[str, Any]:
        return {}


def _trunk_in(model: ViT) -> Trunk:
    assert isinstance(model.stem, Trunk)
    return model.stem


def cells(trunk: Trunk, image_size_px: tuple[int, int]) -> tuple[int, int]:
    """Returns (rows, columns) of the trunk's grid for an image, rounded up."""
    stride = stride_of(trunk)
    return -(-image_size_px[0] // stride), -(-image_size_px[1] // stride)


def _over(trunk: Trunk, channels: int, found: Architecture) -> Architecture:
    """Returns a ViT that was read as one over cells as one over images."""
    size, stride = found.image_size_px, stride_of(trunk)
    return dataclasses.replace(
        found,
        model=found.model.clone(stem=trunk),
        image_size_px=None if size is None else (size[0] * stride, size[1] * stride),
        channels=channels,
    )


def _in_cells(trunk: Trunk, size: Any) -> list[int]:
    height, width = (size, size) if isinstance(size, int) else size
    return list(cells(trunk, (height, width)))


def _config_in_cells(weights: Weights, trunk: Trunk) -> dict[str, Any]:
    """Returns the configuration with the image size in cells of the trunk's grid."""
    config = {**weights.config}
    if (size := config.get("model_args", {}).get("img_size")) is not None:
        given = {"img_size": _in_cells(trunk, size)}
        config["model_args"] = {**config["model_args"], **given}
    images = config.get("pretrained_cfg", {})
    if "input_size" in images:
        channels, *size = images["input_size"]
        given = {"input_size": [channels, *_in_cells(trunk, size)]}
        config["pretrained_cfg"] = {**images, **given}
    return config


FORMATS = (ArchivedHybrid(), TimmHybrid())
