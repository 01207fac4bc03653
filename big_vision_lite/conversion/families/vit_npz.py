"""ViT in the npz archives of big_vision and of vision_transformer."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from big_vision_lite.conversion.engine import Arrays, Entry, Shape, same
from big_vision_lite.conversion.families.vit_tables import (
    check_fields,
    tokens_and_positions,
)
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.patches import Positions, grid_size
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

POOLINGS = (Pooling.CLASS_TOKEN, Pooling.AVERAGE, Pooling.ATTENTION)
NORM = ("scale", "bias")
DENSE = ("kernel", "bias")
ATTENTION = tuple(
    f"{part}/{leaf}" for part in ("query", "key", "value", "out") for leaf in DENSE
)
# Ours: theirs, of one dense layer after another.
MLP = {
    f"{ours}/{leaf}": f"{theirs}/{leaf}"
    for ours, theirs in (("hidden", "Dense_0"), ("out", "Dense_1"))
    for leaf in DENSE
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpzViT(Format):
    """Both programs have tanh GELU and eps 1e-6; names and one addition differ.

    `submodel` are the names before all others ("img/" in image-text checkpoints).
    `stacked` archives hold all blocks in one array a name, depth first. `positions` is
    the name of [1, N, D], or with `token_position` of [1, 1 + N, D], where the class
    token has a position too. `norms`, `attention` and `mlp` are the names in a block.
    """

    name: str
    submodel: str = ""
    stacked: bool = False
    positions: str = "pos_embedding"
    token_position: bool = False
    norms: tuple[str, str] = ("LayerNorm_0", "LayerNorm_1")
    attention: str = "MultiHeadDotProductAttention_0"
    mlp: str = "MlpBlock_0"
    # Beside the image tower of image-text checkpoints: text, temperature, bias.
    # Archives without a representation layer may have an empty place for it.
    ignored: tuple[str, ...] = ("pre_logits",)
    library: Library = Library.NPZ
    model: type = ViT

    def recognises(self, weights: Weights) -> bool:
        root = self.submodel
        first = "encoderblock" if self.stacked else "encoderblock_0"
        wanted = {
            f"{root}embedding/kernel",
            f"{root}Transformer/{first}/{self.mlp}/Dense_0/kernel",
            f"{root}Transformer/{first}/{self.norms[1]}/scale",
        }
        # Hybrids have a stem of convolutions.
        return wanted <= weights.arrays.keys() and not any(
            name.startswith(f"{root}conv_root/") for name in weights.arrays
        )

    def architecture(self, weights: Weights) -> Architecture:
        root, arrays = self.submodel, weights.arrays
        patch, _, channels, width = weights.shape(f"{root}embedding/kernel", 4)
        block = "encoderblock" if self.stacked else "encoderblock_0"
        block = f"{root}Transformer/{block}"
        stack = int(self.stacked)
        query = weights.shape(f"{block}/{self.attention}/query/kernel", 3 + stack)
        hidden = weights.shape(f"{block}/{self.mlp}/Dense_0/kernel", 2 + stack)
        numbers = (
            int(found[1])
            for name in arrays
            if (found := re.match(rf"{root}Transformer/encoderblock_(\d+)/", name))
        )
        has_token = f"{root}cls" in arrays
        has_positions = f"{root}{self.positions}" in arrays
        model = ViT(
            width=width,
            depth=query[0] if self.stacked else max(numbers) + 1,
            mlp_dim=hidden[-1],
            num_heads=query[-2],
            patch_size=patch,
            pooling=_pooling(arrays, root),
            positions=Positions.LEARNED if has_positions else Positions.SINCOS,
            head=_head(weights, root),
        )
        notes: list[str] = []
        if self.submodel and model.head is not None:
            notes += ["the head is the projection to the space shared with text"]
        if not has_positions:
            notes += ["no positions in the file: fixed sines and cosines (sincos2d)"]
            return Architecture(model=model, channels=channels, notes=tuple(notes))
        count = weights.shape(f"{root}{self.positions}", 3)[1]
        count -= int(has_token and self.token_position)
        rows, columns = _grid(count, patch, weights)
        return Architecture(
            model=model,
            image_size=(rows * patch, columns * patch),
            channels=channels,
            notes=tuple(notes),
        )

    def entries(
        self, model: ViT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        root = self.submodel
        table = [
            same(f"{root}embedding/{leaf}", f"patch_embedding/{leaf}") for leaf in DENSE
        ]
        token = {f"{root}cls": "class_token"}
        has_token = model.pooling == Pooling.CLASS_TOKEN
        folds = has_token and self.token_position
        if model.positions == Positions.LEARNED or self.token_position:
            table += [
                tokens_and_positions(
                    model,
                    grid_size(*image_size, model.patch_size),
                    positions=f"{root}{self.positions}",
                    tokens=token if folds else None,
                )
            ]
        if has_token and not folds:
            table += [same(theirs, ours) for theirs, ours in token.items()]
        table += self._blocks(model.depth)
        table += [
            same(f"{root}Transformer/encoder_norm/{leaf}", f"encoder/norm/{leaf}")
            for leaf in NORM
        ]
        if model.pooling == Pooling.ATTENTION:
            table += [
                same(f"{root}MAPHead_0/{theirs}", f"pooling/{ours}")
                for ours, theirs in _PROBE.items()
            ]
        if model.head is not None:
            table += [same(f"{root}head/{leaf}", f"head/{leaf}") for leaf in DENSE]
            if model.head.hidden_dim is not None:
                table += [
                    same(f"{root}pre_logits/{leaf}", f"head/pre_logits/{leaf}")
                    for leaf in DENSE
                ]
        return table

    def describe(
        self, model: ViT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        if self != FORMATS[0]:
            raise ValueError(f"Archives are written as {FORMATS[0].name} only.")
        check_fields(
            model,
            what="big_vision's ViT",
            expresses=("pooling", "positions", "pre_logits"),
            instead="Export it with --to safetensors.",
        )
        if model.positions == Positions.NONE or model.pooling not in POOLINGS:
            raise ValueError(
                "big_vision's ViT has no counterpart for "
                f"positions={model.positions} with pooling={model.pooling}. Export it "
                "with --to safetensors."
            )
        return {}

    def _blocks(self, depth: int) -> list[Entry]:
        norms = dict(zip(("attention_norm", "mlp_norm"), self.norms, strict=True))
        names = {
            f"{ours}/{leaf}": f"{theirs}/{leaf}"
            for ours, theirs in norms.items()
            for leaf in NORM
        }
        names |= {f"attention/{leaf}": f"{self.attention}/{leaf}" for leaf in ATTENTION}
        names |= {f"mlp/{ours}": f"{self.mlp}/{theirs}" for ours, theirs in MLP.items()}
        root = f"{self.submodel}Transformer/encoderblock"
        blocks = [f"encoder/block_{index:02d}" for index in range(depth)]
        if self.stacked:
            return [
                _stacked(f"{root}/{theirs}", [f"{block}/{ours}" for block in blocks])
                for ours, theirs in names.items()
            ]
        return [
            same(f"{root}_{index}/{theirs}", f"{block}/{ours}")
            for index, block in enumerate(blocks)
            for ours, theirs in names.items()
        ]


_PROBE = {
    "probe": "probe",
    **{f"attention/{n}": f"MultiHeadDotProductAttention_0/{n}" for n in ATTENTION},
    **{f"norm/{leaf}": f"LayerNorm_0/{leaf}" for leaf in NORM},
    **{f"mlp/{ours}": f"MlpBlock_0/{theirs}" for ours, theirs in MLP.items()},
}


def _stacked(theirs: str, ours: list[str]) -> Entry:
    """Ties one array [depth, ...] to the arrays of the blocks."""

    def to_ours(arrays: Arrays, shapes: Sequence[Shape]) -> Arrays:
        if len(arrays[0]) != len(shapes):
            raise ValueError(f"{arrays[0].shape} holds not {len(shapes)} blocks")
        return list(arrays[0])

    return Entry(
        theirs=(theirs,),
        ours=tuple(ours),
        to_ours=to_ours,
        to_theirs=lambda arrays: [np.stack(arrays)],
    )


def _pooling(arrays: Mapping[str, np.ndarray], root: str) -> Pooling:
    if f"{root}MAPHead_0/probe" in arrays:
        return Pooling.ATTENTION
    return Pooling.CLASS_TOKEN if f"{root}cls" in arrays else Pooling.AVERAGE


def _head(weights: Weights, root: str) -> Classifier | None:
    representation, head = f"{root}pre_logits/kernel", f"{root}head/kernel"
    hidden_dim = None
    if representation in weights.arrays:
        hidden_dim = weights.shape(representation, 2)[1]
    if head in weights.arrays:
        classes = weights.shape(head, 2)[1]
        return Classifier(num_classes=classes, hidden_dim=hidden_dim)
    if hidden_dim is not None:
        raise ValueError(
            f"{weights.path} has a representation layer (pre_logits) but no head, "
            "which no model here is: remove the arrays of pre_logits from the archive "
            "to get the features before it."
        )
    return None


def _grid(count: int, patch: int, weights: Weights) -> tuple[int, int]:
    given = weights.config.get("image_size")
    if given is not None:
        height, width = given if isinstance(given, list | tuple) else (given, given)
        rows, columns = grid_size(height, width, patch)
        if rows * columns != count:
            raise ValueError(
                f"{weights.path} has positions for {count} patches of {patch} px, and "
                f"config.json says image_size {height}x{width}, which has "
                f"{rows}x{columns}. Correct config.json."
            )
        return rows, columns
    side = round(count**0.5)
    if side * side != count:
        raise ValueError(
            f"{weights.path} has positions for {count} patches, which are no square; "
            "how many rows they are, the archive does not say. Put a config.json "
            'beside it: {"image_size": [HEIGHT, WIDTH]}, in pixels.'
        )
    return side, side


_BIG_VISION = NpzViT(name="big_vision ViT (npz)")
_IMAGE_TEXT = dataclasses.replace(
    _BIG_VISION,
    name="big_vision image-text ViT (npz)",
    submodel="img/",
    ignored=("img/pre_logits", "txt/.*", "t", "b"),
)
FORMATS = (
    _BIG_VISION,
    dataclasses.replace(
        _BIG_VISION, name="big_vision ViT (npz, stacked blocks)", stacked=True
    ),
    _IMAGE_TEXT,
    dataclasses.replace(
        _IMAGE_TEXT,
        name="big_vision image-text ViT (npz, stacked blocks)",
        stacked=True,
    ),
    NpzViT(
        name="vision_transformer ViT (npz)",
        positions="Transformer/posembed_input/pos_embedding",
        token_position=True,
        norms=("LayerNorm_0", "LayerNorm_2"),
        attention="MultiHeadDotProductAttention_1",
        mlp="MlpBlock_3",
    ),
)
