"""ViTs in the names of the repositories that timm's names come from.

Facebook's dinov2 and DeiT III: the same arrays, a few of which timm renamed.
"""

import dataclasses
import re

import numpy as np

from big_vision_lite.conversion.weights import Weights

# Theirs: timm's. DINOv2's SwiGLU has the gate in the first half of w12, as timm's fc1.
RENAMED = {
    r"(blocks\.\d+\.)gamma_([12])": r"\1ls\2.gamma",  # DeiT III
    r"(blocks\.\d+\.mlp\.)w12(\..*)": r"\1fc1\2",  # DINOv2, giant
    r"(blocks\.\d+\.mlp\.)w3(\..*)": r"\1fc2\2",
    r"register_tokens": "reg_token",  # DINOv2, with registers
}


def in_timm_names(weights: Weights) -> Weights:
    """Returns the weights in timm's names; those that have them already, as they are.

    Raises:
        ValueError: the positions have another number of axes than theirs.
    """
    arrays = {
        _renamed(name): array
        for name, array in weights.arrays.items()
        # Stands for masked patches in pretraining.
        if name != "mask_token"
    }
    theirs = {"register_tokens", "cls_token", "pos_embed"}
    if theirs <= weights.arrays.keys():
        # The positions begin with that of the class token; registers have none.
        weights.shape("cls_token", 3)
        weights.shape("pos_embed", 3)
        first, patches = np.split(arrays["pos_embed"], [1], axis=1)
        arrays |= {"cls_token": arrays["cls_token"] + first, "pos_embed": patches}
    return dataclasses.replace(weights, arrays=arrays)


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED.items():
        if found := re.fullmatch(pattern, name):
            return found.expand(replacement)
    return name
