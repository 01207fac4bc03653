"""MLP-Mixer in the npz archives of vision_transformer and big_vision, of one form."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from big_vision_lite.conversion.engine import Entry, same
from big_vision_lite.conversion.families.mixer_timm import grid_of
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.mixer import MlpMixer

DENSE = ("kernel", "bias")
NORM = ("scale", "bias")
# Theirs in a block: ours, and the leaves.
BLOCK = {
    "LayerNorm_0": ("token_norm", NORM),
    "token_mixing/Dense_0": ("token_mixing/hidden", DENSE),
    "token_mixing/Dense_1": ("token_mixing/out", DENSE),
    "LayerNorm_1": ("channel_norm", NORM),
    "channel_mixing/Dense_0": ("channel_mixing/hidden", DENSE),
    "channel_mixing/Dense_1": ("channel_mixing/out", DENSE),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpzMixer(Format):
    """The names of both programs, which have tanh GELU and eps 1e-6, as here."""

    name: str = "big_vision MLP-Mixer (npz)"
    library: Library = Library.NPZ
    model: type = MlpMixer
    ignored: tuple[str, ...] = ()

    def recognises(self, weights: Weights) -> bool:
        wanted = {"stem/kernel", "MixerBlock_0/token_mixing/Dense_0/kernel"}
        return wanted <= weights.arrays.keys()

    def architecture(self, weights: Weights) -> Architecture:
        arrays = weights.arrays
        block = "MixerBlock_0"
        patch, _, channels, width = weights.shape("stem/kernel", 4)
        patches, tokens = weights.shape(f"{block}/token_mixing/Dense_0/kernel", 2)
        _, hidden = weights.shape(f"{block}/channel_mixing/Dense_0/kernel", 2)
        blocks = {
            found[1]
            for name in arrays
            if (found := re.match(r"MixerBlock_(\d+)", name))
        }
        model = MlpMixer(
            width=width,
            depth=len(blocks),
            token_mlp_dim=tokens,
            channel_mlp_dim=hidden,
            patch_size=patch,
            head=Classifier(num_classes=weights.shape("head/kernel", 2)[1])
            if "head/kernel" in arrays
            else None,
        )
        size = weights.config.get("image_size")
        size = (size, size) if isinstance(size, int) else size and tuple(size)
        rows, columns = grid_of(patches, patch, size, weights)
        return Architecture(
            model=model, image_size=(rows * patch, columns * patch), channels=channels
        )

    def entries(
        self, model: MlpMixer, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        names = {
            "stem": ("patch_embedding", DENSE),
            "pre_head_layer_norm": ("norm", NORM),
        }
        for index in range(model.depth):
            names |= {
                f"MixerBlock_{index}/{theirs}": (f"block_{index:02d}/{ours}", leaves)
                for theirs, (ours, leaves) in BLOCK.items()
            }
        if model.head is not None:
            names["head"] = ("head", DENSE)
        return [
            same(f"{theirs}/{leaf}", f"{ours}/{leaf}")
            for theirs, (ours, leaves) in names.items()
            for leaf in leaves
        ]

    def describe(
        self, model: MlpMixer, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        if model.activation != Activation.GELU_TANH:
            raise ValueError(
                f"big_vision's MLP-Mixer has the tanh GELU, not {model.activation}. "
                "Export it with --to timm or safetensors."
            )
        if model.head is not None and model.head.hidden_dim is not None:
            raise ValueError(
                "big_vision's MLP-Mixer has no counterpart for "
                f"head.hidden_dim={model.head.hidden_dim}. Export it with --to "
                "safetensors."
            )
        return {}


FORMATS = (NpzMixer(),)
