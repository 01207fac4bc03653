"""Hybrids in the npz archives of vision_transformer."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from big_vision_lite.conversion.engine import Entry
from big_vision_lite.conversion.families import bit_npz, vit_npz
from big_vision_lite.conversion.families.hybrid_tables import (
    cells,
    check_stem,
    trunk_in,
    with_trunk,
)
from big_vision_lite.conversion.families.vit_tables import check_fields
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

# Behind the trunk they are vision_transformer's ViT, name for name.
TRANSFORMER = next(f for f in vit_npz.FORMATS if f.token_position)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpzHybrid(Format):
    """vision_transformer's R+ViT: the trunk of big_vision's bit, then its ViT."""

    name: str = "vision_transformer hybrid ViT (npz)"
    library: Library = Library.NPZ
    model: type = ViT
    ignored: tuple[str, ...] = ("pre_logits",)

    def recognises(self, weights: Weights) -> bool:
        wanted = {
            *("conv_root/kernel", "gn_root/scale", "embedding/kernel"),
            TRANSFORMER.positions,
        }
        return wanted <= weights.arrays.keys()

    def architecture(self, weights: Weights) -> Architecture:
        trunk = bit_npz.trunk_of(weights)
        config = {**weights.config}
        if (size := config.get("image_size")) is not None:
            height, width = (size, size) if isinstance(size, int) else size
            config["image_size"] = list(cells(trunk, (height, width)))
        inner = dataclasses.replace(weights, config=config)
        channels = weights.shape("conv_root/kernel", 4)[2]
        return with_trunk(TRANSFORMER.architecture(inner), trunk, channels)

    def entries(
        self, model: ViT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        trunk = trunk_in(model)
        plain = model.clone(stem=None)
        return [
            *bit_npz.trunk_entries(trunk, "stem"),
            *TRANSFORMER.entries(plain, cells(trunk, image_size)),
        ]

    def describe(
        self, model: ViT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        check_stem(model, lambda plain: vit_npz.FORMATS[0].describe(plain, image_size))
        what = "vision_transformer's hybrid ViT"
        bit_npz.check_trunk(trunk_in(model), what)
        check_fields(
            model,
            what=what,
            expresses=("pooling", "positions", "pre_logits", "stem"),
            instead="Export it with --to safetensors.",
        )
        poolings = (Pooling.CLASS_TOKEN, Pooling.AVERAGE)
        if model.positions != Positions.LEARNED or model.pooling not in poolings:
            raise ValueError(
                f"{what} has positions=learned and pooling=class_token or average, "
                f"this model positions={model.positions} and pooling={model.pooling}. "
                "Export it with --to safetensors."
            )
        return {}


FORMATS = (NpzHybrid(),)
