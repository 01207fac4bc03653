"""What the formats of ViTs share: which fields a library has, tokens and positions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from big_vision_lite.conversion.engine import Arrays, Entry, Shape
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions, sincos
from big_vision_lite.models.vit import ViT

BLOCK = "encoder/block_{b}/"
PARTS = ("query", "key", "value")
QUERY_KEY_VALUE = tuple(f"attention/{part}" for part in PARTS)
GELUS = [Activation.GELU_ERF, Activation.GELU_TANH]
# Fields that change no number of a trained model, or sizes that every format has.
ANYWHERE = (
    *("width", "depth", "mlp_dim", "num_heads", "patch_size", "head", "mean", "std"),
    *("dropout", "stochastic_depth", "dtype", "attention", "remat", "parent", "name"),
    "mask_token",
)


def requires(*free: str, **values: Any) -> dict[str, Any]:
    """Returns what a format requires of our ViT: all at its default, but what is given.

    `free` fields may have any value, those in `values` the one, or one of a list.
    """
    plain = {field.name: field.default for field in dataclasses.fields(ViT)}
    plain |= {"head.hidden_dim": None}
    found = {n: v for n, v in plain.items() if n not in (*ANYWHERE, *free)}
    return {**values, **{n: v for n, v in found.items() if n not in values}}


def check_square(name: str, image_size: tuple[int, int]) -> None:
    """Refuses images that are no squares, for the format of a name."""
    height, width = image_size
    if height != width:
        raise ValueError(
            f"{name} takes its positions for a square, this model is for images of "
            f"{height}x{width} px."
        )


def usual_heads(
    weights: Weights, width: int, others: Mapping[int, int], hint: str
) -> int:
    """Returns the heads of a width, which no shape shows: of 64 channels, or `others`.

    Raises:
        ValueError: such heads do not make the width; `hint` ends the message.
    """
    if width % 64 and width not in others:
        raise ValueError(
            f"{weights.path} does not say how many heads of attention it has, and its "
            f"width {width} is no multiple of 64. {hint}"
        )
    return others.get(width, width // 64)


def tokens_and_positions(
    model: ViT,
    grid: tuple[int, int],
    *,
    positions: str,
    tokens: Mapping[str, str] | None = None,
    leading: Shape = (1,),
) -> Entry:
    """Ties positions [*leading, K + N, D] and K `tokens` {theirs: ours} to ours.

    Ours have no positions for those tokens: they are added to the tokens on the way
    in, and are zeros on the way out. Fixed positions go out as the table that they
    are, and come in only where they are that table.
    """
    tokens = tokens or {}
    learned = model.positions == Positions.LEARNED

    def to_ours(arrays: Arrays, shapes: Sequence[Shape]) -> Arrays:
        *found, table = arrays
        width, count = table.shape[-1], len(found)
        rows = table.reshape(-1, width)
        wanted = count + grid[0] * grid[1]
        if len(rows) != wanted:
            raise ValueError(
                f"{table.shape} holds {len(rows)} positions, not {wanted}: {count} of "
                f"tokens and {grid[0]}x{grid[1]} of patches"
            )
        folded = [t + row for t, row in zip(found, rows[:count], strict=True)]
        rows = rows[count:]
        if learned:
            return [*folded, rows.reshape(*grid, width)]
        if not np.array_equal(rows, fixed(model, grid)):
            raise ValueError(f"the positions are not those of {model.positions}")
        return folded

    def to_theirs(arrays: Arrays) -> Arrays:
        width, count = model.width, len(tokens)
        patches = arrays[count] if learned else fixed(model, grid)
        rows = np.concatenate(
            [np.zeros((count, width), np.float32), patches.reshape(-1, width)]
        )
        return [*arrays[:count], rows.reshape(*leading, -1, width)]

    return Entry(
        theirs=(*tokens, positions),
        ours=(*tokens.values(), *(("position_embedding",) if learned else ())),
        to_ours=to_ours,
        to_theirs=to_theirs,
    )


def fixed(model: ViT, grid: tuple[int, int]) -> np.ndarray:
    """Returns positions [N, D] that are no parameters: sines, or zeros for none."""
    if model.positions == Positions.SINCOS:
        return sincos(*grid, model.width)
    return np.zeros((grid[0] * grid[1], model.width), np.float32)
