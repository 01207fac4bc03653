"""torchvision's VisionTransformer (vit_b_16 and the like) and our ViT."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from big_vision_lite.conversion import preprocessing
from big_vision_lite.conversion.assumption import of_architecture
from big_vision_lite.conversion.engine import Entry
from big_vision_lite.conversion.families import libraries, vit
from big_vision_lite.conversion.formats import Architecture, Format, Library, Size
from big_vision_lite.conversion.tables import Rows, under
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions, grid_size
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

PATCHES, POSITIONS = "conv_proj.weight", "encoder.pos_embedding"
BLOCK = "encoder.layers.encoder_layer_{b}."
FIRST = BLOCK.format(b=0)
ROWS: Rows = {
    "patch_embedding": "conv_proj",
    **under(
        BLOCK,
        {
            "attention_norm": "ln_1",
            vit.QUERY_KEY_VALUE: "self_attention.in_proj_{leaf}",
            "attention/out": "self_attention.out_proj",
            "mlp_norm": "ln_2",
            "mlp/hidden": "mlp.0",
            "mlp/out": "mlp.3",
        },
        ours=vit.BLOCK,
    ),
    "encoder/norm": "encoder.ln",
    "head/pre_logits": "heads.pre_logits",
    "head": "heads.head",
}
# The number of heads in vit_h_14; in others a head has 64 channels.
HEADS = {1280: 16}
# Names of MLP layers in torchvision's first versions, which published files have.
FIRST_VERSION = {"mlp.linear_1.": "mlp.0.", "mlp.linear_2.": "mlp.3."}


class TorchvisionViT(Format):
    """torchvision's VisionTransformer: exact GELU, a class token with a position.

    Its representation_size is the width of the tanh layer before the head.
    """

    name = "torchvision ViT"
    library = Library.TORCHVISION
    model = ViT
    table = ROWS
    assumes = preprocessing.OF_TORCHVISION
    signs = (PATCHES, POSITIONS, f"{FIRST}ln_1.weight")
    requires = vit.requires(
        *("positions", "head.hidden_dim"),
        pooling=Pooling.CLASS_TOKEN,
        activation=Activation.GELU_ERF,
        head=Classifier,
    )

    def normalised_names(self, weights: Weights) -> Weights:
        """Returns the weights in the names of current versions."""
        arrays = {_renamed(name): array for name, array in weights.arrays.items()}
        return dataclasses.replace(weights, arrays=arrays)

    def architecture(self, weights: Weights) -> Architecture:
        weights = self.normalised_names(weights)
        sizes = weights.sizes(
            {
                PATCHES: "width channels patch_size patch_size",
                POSITIONS: "_ positions width",
                f"{FIRST}mlp.0.weight": "mlp_dim width",
            }
        )
        patch, count = sizes["patch_size"], sizes["positions"] - 1
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(
                f"{weights.path} has {count} positions of patches, which make no "
                "square as torchvision's do."
            )
        num_heads, notes = _num_heads(weights, sizes["width"])
        model = ViT(
            width=sizes["width"],
            depth=weights.count(BLOCK.format(b=r"(\d+)")),
            mlp_dim=sizes["mlp_dim"],
            num_heads=num_heads,
            patch_size=patch,
            pooling=Pooling.CLASS_TOKEN,
            positions=Positions.LEARNED,
            activation=Activation.GELU_ERF,
            head=_head(weights),
        )
        return Architecture(
            model=model,
            image_size_px=(side * patch, side * patch),
            channels=sizes["channels"],
            assumptions=of_architecture(*notes),
        )

    def special(self, model: ViT, size: Size) -> Sequence[Entry]:
        return [
            vit.tokens_and_positions(
                model,
                grid_size(*size, model.patch_size),
                positions=POSITIONS,
                theirs={"class_token": 1},
                ours={"class_token": 1},
                rows=(1,),
            )
        ]

    def describe(self, model: ViT, size: Size, channels: int) -> dict[str, Any]:
        vit.check_square(self.name, size)
        return libraries.torchvision(
            "VisionTransformer",
            model,
            channels,
            image_size=size[0],
            patch_size=model.patch_size,
            num_layers=model.depth,
            num_heads=model.num_heads,
            hidden_dim=model.width,
            mlp_dim=model.mlp_dim,
            representation_size=model.head.hidden_dim if model.head else None,
        )


def _renamed(name: str) -> str:
    for old, new in FIRST_VERSION.items():
        name = name.replace(old, new)
    return name


def _num_heads(weights: Weights, width: int) -> tuple[int, tuple[str, ...]]:
    """Returns the number of heads, which no shape shows, and notes for the user."""
    given = weights.config.get("arguments", {}).get("num_heads")
    if given is not None:
        return int(given), ()
    hint = 'Write a config.json beside it: {"arguments": {"num_heads": 6}}.'
    heads = vit.usual_heads(weights, width, HEADS, hint)
    return heads, (f"num_heads={heads} assumed of width={width}. If not: {hint}",)


def _head(weights: Weights) -> Classifier | None:
    head = weights.head("heads.head.weight")
    if head is None or "heads.pre_logits.weight" not in weights.arrays:
        return head
    hidden = weights.shape("heads.pre_logits.weight", 2)[0]
    return Classifier(num_classes=head.num_classes, hidden_dim=hidden)


FORMATS = (TorchvisionViT(),)
