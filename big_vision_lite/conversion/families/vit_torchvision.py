"""torchvision's VisionTransformer (vit_b_16 and the like) and our ViT."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from big_vision_lite.conversion.engine import (
    Entry,
    conv,
    linear,
    norm,
    output_projection,
    projection_biases,
    projections,
    same,
)
from big_vision_lite.conversion.families import vit_tables
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions, grid_size
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

PATCHES = "conv_proj.weight"
POSITIONS = "encoder.pos_embedding"
BLOCK = "encoder.layers.encoder_layer_{}"
FIRST = BLOCK.format(0)
# Heads have 64 channels but in vit_h_14.
HEADS = {1280: 16}
# As its first versions wrote the layers of an MLP, in which the published files are.
FIRST_VERSION = {"mlp.linear_1.": "mlp.0.", "mlp.linear_2.": "mlp.3."}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchvisionViT(Format):
    """A class token with a position, exact GELU, one projection for queries to values.

    Its representation_size is the width of the tanh layer before the head.
    """

    name: str = "torchvision ViT"
    library: Library = Library.TORCHVISION
    model: type = ViT
    ignored: tuple[str, ...] = ()

    def normalised_names(self, weights: Weights) -> Weights:
        """Returns the weights in the names of today's version."""
        arrays = {_renamed(name): array for name, array in weights.arrays.items()}
        return dataclasses.replace(weights, arrays=arrays)

    def recognises(self, weights: Weights) -> bool:
        return {PATCHES, POSITIONS, f"{FIRST}.ln_1.weight"} <= weights.arrays.keys()

    def architecture(self, weights: Weights) -> Architecture:
        weights = self.normalised_names(weights)
        width, channels, patch, _ = weights.shape(PATCHES, 4)
        _, count, _ = weights.shape(POSITIONS, 3)
        mlp_dim, _ = weights.shape(f"{FIRST}.mlp.0.weight", 2)
        side = math.isqrt(count - 1)
        if side * side != count - 1:
            raise ValueError(
                f"{weights.path} has {count - 1} positions of patches, which make no "
                "square as torchvision's do."
            )
        num_heads, notes = _num_heads(weights, width)
        blocks = {
            int(found[1])
            for name in weights.arrays
            if (found := re.match(BLOCK.format(r"(\d+)\."), name))
        }
        model = ViT(
            width=width,
            depth=len(blocks),
            mlp_dim=mlp_dim,
            num_heads=num_heads,
            patch_size=patch,
            pooling=Pooling.CLASS_TOKEN,
            positions=Positions.LEARNED,
            activation=Activation.GELU_ERF,
            head=_head(weights),
        )
        return Architecture(
            model=model,
            image_size=(side * patch, side * patch),
            channels=channels,
            notes=notes,
        )

    def entries(
        self, model: ViT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        table = [
            conv(PATCHES, "patch_embedding/kernel"),
            same("conv_proj.bias", "patch_embedding/bias"),
            vit_tables.tokens_and_positions(
                model,
                grid_size(*image_size, model.patch_size),
                positions=POSITIONS,
                tokens={"class_token": "class_token"},
            ),
            *norm("encoder.ln", "encoder/norm"),
        ]
        for index in range(model.depth):
            table += _block(BLOCK.format(index), f"encoder/block_{index:02d}")
        if model.head is not None:
            if model.head.hidden_dim is not None:
                table += linear("heads.pre_logits", "head/pre_logits")
            table += linear("heads.head", "head")
        return table

    def describe(
        self, model: ViT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        vit_tables.check_fields(
            model,
            what="torchvision's VisionTransformer",
            expresses=("pooling", "positions", "activation", "pre_logits"),
            instead="Use --to timm, --to huggingface, or --to safetensors.",
        )
        height, width = image_size
        for unfit, what in (
            (model.pooling != Pooling.CLASS_TOKEN, f"pooling={model.pooling}"),
            (model.activation != Activation.GELU_ERF, f"activation={model.activation}"),
            (model.head is None, "head=none"),
            (height != width, f"images of {height}x{width} px"),
        ):
            if unfit:
                raise ValueError(
                    f"torchvision's VisionTransformer has no counterpart for {what}: "
                    "it reads a class token of a square, with the exact GELU, into a "
                    "head. Use --to timm."
                )
        assert model.head is not None
        return {
            "builder": "VisionTransformer",
            "arguments": {
                "image_size": height,
                "patch_size": model.patch_size,
                "num_layers": model.depth,
                "num_heads": model.num_heads,
                "hidden_dim": model.width,
                "mlp_dim": model.mlp_dim,
                "num_classes": model.head.num_classes,
                "representation_size": model.head.hidden_dim,
            },
        }


def _renamed(name: str) -> str:
    for old, new in FIRST_VERSION.items():
        name = name.replace(old, new)
    return name


def _num_heads(weights: Weights, width: int) -> tuple[int, tuple[str, ...]]:
    """Returns the number of heads, which no shape shows, and what is to be said."""
    given = weights.config.get("arguments", {}).get("num_heads")
    if given is not None:
        return int(given), ()
    hint = 'Write a config.json beside it: {"arguments": {"num_heads": 6}}.'
    if width % 64:
        raise ValueError(
            f"{weights.path} does not say how many heads of attention it has, and its "
            f"width {width} is no multiple of 64. {hint}"
        )
    heads = HEADS.get(width, width // 64)
    return heads, (f"num_heads={heads} assumed of width={width}. If not: {hint}",)


def _head(weights: Weights) -> Classifier | None:
    if "heads.head.weight" not in weights.arrays:
        return None
    hidden = None
    if "heads.pre_logits.weight" in weights.arrays:
        hidden = weights.shape("heads.pre_logits.weight", 2)[0]
    num_classes = weights.shape("heads.head.weight", 2)[0]
    return Classifier(num_classes=num_classes, hidden_dim=hidden)


def _block(theirs: str, ours: str) -> Iterator[Entry]:
    parts = [f"{ours}/attention/{part}" for part in ("query", "key", "value")]
    attention = f"{theirs}.self_attention"
    yield from norm(f"{theirs}.ln_1", f"{ours}/attention_norm")
    yield projections(f"{attention}.in_proj_weight", *(f"{p}/kernel" for p in parts))
    yield projection_biases(f"{attention}.in_proj_bias", *(f"{p}/bias" for p in parts))
    out = f"{ours}/attention/out"
    yield output_projection(f"{attention}.out_proj.weight", f"{out}/kernel")
    yield same(f"{attention}.out_proj.bias", f"{out}/bias")
    yield from norm(f"{theirs}.ln_2", f"{ours}/mlp_norm")
    yield from linear(f"{theirs}.mlp.0", f"{ours}/mlp/hidden")
    yield from linear(f"{theirs}.mlp.3", f"{ours}/mlp/out")


FORMATS = (TorchvisionViT(),)
