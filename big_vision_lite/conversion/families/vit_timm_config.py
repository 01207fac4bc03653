"""Reads from timm's configuration what shapes do not show: heads, GELU, pooling."""

import math
import re
from typing import Any, NamedTuple

import numpy as np

from big_vision_lite.conversion.families.vit import usual_heads
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions, sincos
from big_vision_lite.models.blocks.pooling import Pooling

# A model of each width in timm; arguments set everything else.
BASES = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    512: "vit_medium_patch16_gap_256",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1152: "vit_so400m_patch14_siglip_224",
    1280: "vit_huge_patch14_224",
    1408: "vit_giant_patch14_224",
    1664: "vit_gigantic_patch14_224",
}
# {width: heads} unless a head has 64 channels: arXiv:2106.04560 Table 2,
# arXiv:2305.13035.
HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
# Other exceptions, by the beginning of timm's name.
NAMED_HEADS = {
    "vit_base_patch16_gap_": 16,
    "vit_giantopt_": 16,
    "test_vit4": 3,
    "test_vit": 2,
}
# timm's models with the tanh GELU; its other SigLIPs have the exact one.
TANH = re.compile(
    r"vit_(base_patch32|giantopt_patch16|so400m_patch16)_siglip_|"
    r"vit_large_patch16_siglip_(gap_)?512"
)
ACTIVATIONS = {"gelu": Activation.GELU_ERF, "gelu_tanh": Activation.GELU_TANH}
POOLINGS = {
    "avg": Pooling.AVERAGE,
    "token": Pooling.CLASS_TOKEN,
    "map": Pooling.ATTENTION,
}


class Found(NamedTuple):
    """A value, and a note for the user if it was assumed."""

    value: Any
    note: str | None = None


def arguments_of(weights: Weights) -> dict[str, Any]:
    """Returns the constructor's arguments in the configuration beside the weights.

    Raises:
        ValueError: they ask for something that no ViT here does.
    """
    config = weights.config
    if "_rpn_" in config.get("architecture", ""):
        # Its names and shapes are those of any other ViT.
        raise ValueError(
            f"{weights.path} normalises after each branch, which no ViT here does."
        )
    arguments = {**config.get("model_args", {})}
    if config.get("global_pool"):
        arguments.setdefault("global_pool", config["global_pool"])
    norm = arguments.get("norm_layer", "layernorm")
    pool = arguments.get("global_pool")
    if norm not in ("layernorm", None):
        raise ValueError(f"{weights.path}: norm_layer={norm}; here it is layernorm.")
    if pool and pool not in POOLINGS:
        raise ValueError(
            f"{weights.path}: global_pool={pool}; here it is one of "
            f"{', '.join(POOLINGS)}."
        )
    include = config.get("architecture") == "test_vit3"
    if arguments.get("pool_include_prefix", include) and pool != "token":
        raise ValueError(
            f"{weights.path}: pool_include_prefix=True; here only patches are pooled."
        )
    return arguments


def pooling_of(weights: Weights) -> Pooling:
    """Returns how tokens are pooled, by the names and the configuration."""
    arrays, arguments = weights.arrays, arguments_of(weights)
    pool = arguments.get("global_pool")
    if "attn_pool.latent" in arrays:
        return Pooling.ATTENTION
    if "cls_token" not in arrays or pool == "avg":
        return Pooling.AVERAGE
    # By default timm has fc_norm, a norm after pooling, only where it averages.
    asked = pool == "token" or arguments.get("fc_norm")
    if "fc_norm.weight" in arrays and not asked:
        return Pooling.AVERAGE
    return Pooling.CLASS_TOKEN


def num_heads_of(weights: Weights) -> Found:
    """Returns the number of heads, which only the shape of a QK norm shows."""
    arrays, arguments = weights.arrays, arguments_of(weights)
    width = weights.shape("blocks.0.norm1.weight", 1)[0]
    if "num_heads" in arguments:
        return Found(int(arguments["num_heads"]))
    if "blocks.0.attn.q_norm.weight" in arrays:
        return Found(width // weights.shape("blocks.0.attn.q_norm.weight", 1)[0])
    architecture = weights.config.get("architecture", "")
    for beginning, heads in NAMED_HEADS.items():
        if architecture.startswith(beginning):
            return Found(heads)
    hint = 'Write a config.json beside it: {"model_args": {"num_heads": 6}}.'
    heads = usual_heads(weights, width, HEADS, hint)
    note = f"num_heads={heads} assumed of width={width}: no configuration came along."
    return Found(heads, None if architecture else note)


def activation_of(weights: Weights, gated: bool) -> Found:
    """Returns the activation; `gated` means that fc1 makes twice what fc2 reads."""
    if gated:
        return Found(Activation.SWIGLU)
    name = arguments_of(weights).get("act_layer")
    architecture = weights.config.get("architecture", "")
    if name is not None:
        if name not in ACTIVATIONS:
            raise ValueError(
                f"{weights.path}: act_layer={name}; here it is one of "
                f"{', '.join(ACTIVATIONS)}."
            )
        return Found(ACTIVATIONS[name])
    if TANH.match(architecture):
        return Found(Activation.GELU_TANH)
    note = (
        "activation=gelu_erf assumed, timm's default: no configuration came along. "
        'For the tanh form: a config.json with {"model_args": {"act_layer": '
        '"gelu_tanh"}} beside the file.'
    )
    return Found(Activation.GELU_ERF, None if architecture else note)


class Placed(NamedTuple):
    """The kind of positions; `image_size_px` is (height, width), None if unknown."""

    positions: Positions
    image_size_px: tuple[int, int] | None
    note: str | None = None


def positions_of(weights: Weights, patch: int) -> Placed:
    """Returns kind and image size of timm's positions, which are stored as one row.

    Raises:
        ValueError: they fill neither a square nor the image size of a configuration.
    """
    arrays = weights.arrays
    size = _configured_size(weights)
    if "pos_embed" not in arrays:
        return Placed(Positions.NONE, size)
    _, _, width = weights.shape("pos_embed", 3)
    table = arrays["pos_embed"][0]
    special = sum(
        weights.shape(name, 3)[1]
        for name in ("cls_token", "dist_token", "reg_token")
        if name in arrays
    )
    given = (size[0] // patch, size[1] // patch) if size else None
    grids: list[tuple[tuple[int, int], int]] = []
    for first in (0, special):
        count = len(table) - first
        side = math.isqrt(max(0, count))
        grids += [(given, first)] if given and given[0] * given[1] == count else []
        grids += [((side, side), first)] if side and side * side == count else []
    if not grids:
        raise ValueError(
            f"{weights.path} has {len(table)} positions, which make no square. Write "
            'its image size into a config.json beside it: {"model_args": {"img_size": '
            "[height, width]}}."
        )
    # The configuration takes precedence over a square.
    grid, first = next((g for g in grids if g[0] == given), grids[0])
    fixed = width % 4 == 0 and np.array_equal(table[first:], sincos(*grid, width))
    image_size_px = (grid[0] * patch, grid[1] * patch)
    note = None
    if size is not None and grid == given and size != image_size_px:
        note = (
            f"Images of {size[0]}x{size[1]} px are no multiple of patches of {patch} "
            "px: timm leaves out the rest on the right and below, here they are "
            f"resized to {image_size_px[0]}x{image_size_px[1]}."
        )
    return Placed(Positions.SINCOS if fixed else Positions.LEARNED, image_size_px, note)


def _configured_size(weights: Weights) -> tuple[int, int] | None:
    size = arguments_of(weights).get("img_size")
    if size is None:
        images = weights.config.get("pretrained_cfg", weights.config)
        size = images.get("input_size", (0, None))[1:]
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    return (height, width) if height and width else None
