"""timm's hybrids (vit_*_r50_s16_*, vit_*_r26_s32_*, vit_tiny_r_s16_p8_*)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from big_vision_lite.conversion.engine import Entry
from big_vision_lite.conversion.families import bit_tables, bit_timm, vit_timm
from big_vision_lite.conversion.families.hybrid_tables import (
    cells,
    check_stem,
    trunk_in,
    with_trunk,
)
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.vit import ViT

BACKBONE = "patch_embed.backbone."
# timm's hybrid with these units a stage; what follows the trunk are its arguments.
NAMES = {
    (): "vit_tiny_r_s16_p8_224",
    (2, 2, 2, 2): "vit_small_r26_s32_224",
    (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}
# Behind the trunk they are timm's ViT, name for name.
TRANSFORMER = vit_timm.FORMATS[0]
WIDTH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimmHybrid(Format):
    """A ResNetV2(preact=False, stem_type="same") before timm's ViT."""

    name: str = "timm hybrid ViT"
    library: Library = Library.TIMM
    model: type = ViT
    ignored: tuple[str, ...] = ()

    def recognises(self, weights: Weights) -> bool:
        arrays = weights.arrays
        roots = (f"{BACKBONE}stem.", BACKBONE)
        # Not those over ResNets with batch norm.
        return any(
            {f"{root}conv.weight", f"{root}norm.weight"} <= arrays.keys()
            and f"{root}norm.running_var" not in arrays
            for root in roots
        )

    def architecture(self, weights: Weights) -> Architecture:
        trunk = bit_timm.trunk_of(weights, BACKBONE)
        inner = dataclasses.replace(weights, config=_config_in_cells(weights, trunk))
        root = f"{BACKBONE}stem." if trunk.stages else BACKBONE
        channels = weights.shape(f"{root}conv.weight", 4)[1]
        return with_trunk(TRANSFORMER.architecture(inner), trunk, channels)

    def entries(
        self, model: ViT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        trunk = trunk_in(model)
        plain = model.clone(stem=None)
        return [
            *bit_timm.trunk_entries(trunk, BACKBONE, "stem"),
            *TRANSFORMER.entries(plain, cells(trunk, image_size)),
        ]

    def describe(
        self, model: ViT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        check_stem(model, lambda plain: TRANSFORMER.describe(plain, image_size))
        what, trunk = "timm's hybrid ViT", trunk_in(model)
        bit_tables.check_torch_form(trunk, what=what)
        if trunk.stages not in NAMES or (trunk.width, trunk.groups) != (
            WIDTH,
            bit_timm.GROUPS,
        ):
            raise ValueError(
                f"{what} has a trunk of width={WIDTH}, groups={bit_timm.GROUPS} and "
                f"stages of {', '.join(map(str, NAMES))}; this model has width="
                f"{trunk.width}, groups={trunk.groups} and stages={trunk.stages}. "
                "Export it with --to safetensors."
            )
        inner = cells(trunk, image_size)
        described = TRANSFORMER.describe(model.clone(stem=None), inner)
        arguments = described["model_args"] | {"img_size": list(image_size)}
        return {"architecture": NAMES[trunk.stages], "model_args": arguments}


def _config_in_cells(weights: Weights, trunk: Any) -> dict[str, Any]:
    """Returns the configuration with the image size in cells of the trunk's grid."""
    config = {**weights.config}
    if "model_args" in config:
        arguments = {**config["model_args"]}
        if (size := arguments.get("img_size")) is not None:
            height, width = (size, size) if isinstance(size, int) else size
            arguments["img_size"] = list(cells(trunk, (height, width)))
        config["model_args"] = arguments
    images = {**config.get("pretrained_cfg", {})}
    if "input_size" in images:
        channels, *size = images["input_size"]
        images["input_size"] = [channels, *cells(trunk, (size[0], size[1]))]
        config["pretrained_cfg"] = images
    return config


FORMATS = (TimmHybrid(),)
