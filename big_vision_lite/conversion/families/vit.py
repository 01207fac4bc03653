"""The common parts of all ViT formats: fields, tokens and positions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from big_vision_lite.conversion.engine import Arrays, Entry, Shape
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import (
    Positions,
    resample_positions,
    sincos,
)
from big_vision_lite.models.vit import ViT

BLOCK = "encoder/block_{b}/"
PARTS = ("query", "key", "value")
QUERY_KEY_VALUE = tuple(f"attention/{part}" for part in PARTS)
GELUS = [Activation.GELU_ERF, Activation.GELU_TANH]
# Fields that no format restricts: sizes, and those that change no trained model.
ANYWHERE = (
    *("width", "depth", "mlp_dim", "num_heads", "patch_size", "head", "mean", "std"),
    *("dropout", "stochastic_depth", "dtype", "attention", "remat", "parent", "name"),
    "mask_token",
)


def requires(*free: str, **values: Any) -> dict[str, Any]:
    """Returns what a format requires of our ViT: defaults, except for what is given.

    `free` fields may have any value, those in `values` this value, or one of a list.
    """
    plain = {field.name: field.default for field in dataclasses.fields(ViT)}
    plain |= {"head.hidden_dim": None}
    found = {n: v for n, v in plain.items() if n not in (*ANYWHERE, *free)}
    return {**values, **{n: v for n, v in found.items() if n not in values}}


def check_square(name: str, size: tuple[int, int]) -> None:
    """Raises ValueError unless `size` is square; `name` is the format's."""
    height, width = size
    if height != width:
        raise ValueError(
            f"{name} takes its positions for a square, this model is for images of "
            f"{height}x{width} px."
        )


def usual_heads(
    weights: Weights, width: int, others: Mapping[int, int], hint: str
) -> int:
    """Returns the heads of a width, which no shape shows: `others`, or width / 64.

    Raises:
        ValueError: 64 does not divide the width; `hint` ends the message.
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
    positions: str | None,
    theirs: Mapping[str, int] = {},
    ours: Mapping[str, int] = {},
    rows: Sequence[int] = (0,),
    leading: Shape = (1,),
) -> Entry:
    """Ties tokens [1, K, D] and positions [*leading, R + N, D] of patches to ours.

    `theirs` and `ours` are {name: number of tokens} in the same order. Their positions
    may begin with R rows for tokens, R one of `rows`; these are added to our tokens,
    which have no positions: the model computes the same. Export writes rows[0] rows of
    zeros. Fixed positions are written as a table, and read only if the file holds that
    table; learned ones are resampled to `grid` for export. `positions` None means that
    the format has none.
    """
    count = sum(ours.values())
    learned = model.positions == Positions.LEARNED

    def to_ours(arrays: Arrays, shapes: Sequence[Shape]) -> Arrays:
        tokens = _join(arrays[: len(theirs)], model.width)
        if tokens.shape[1] != count:
            raise ValueError(f"hold {tokens.shape[1]} tokens, not {count}")
        if positions is None:
            return _split(tokens, ours)
        table = arrays[-1].reshape(-1, arrays[-1].shape[-1])
        before = len(table) - grid[0] * grid[1]
        if before not in rows:
            raise ValueError(
                f"{arrays[-1].shape} holds {len(table)} positions, not "
                f"{' or '.join(str(r + grid[0] * grid[1]) for r in rows)}: "
                f"{' or '.join(map(str, rows))} of tokens and {grid[0]}x{grid[1]} of "
                "patches"
            )
        if before:
            tokens = tokens + table[:before]
        patches = table[before:]
        if learned:
            return [*_split(tokens, ours), patches.reshape(*grid, -1)]
        if not np.array_equal(patches, _fixed(model, grid)):
            raise ValueError(f"the positions are not those of {model.positions}")
        return _split(tokens, ours)

    def to_theirs(arrays: Arrays) -> Arrays:
        tokens = _split(_join(arrays[: len(ours)], model.width), theirs)
        if positions is None:
            return tokens
        patches = _resampled(arrays[-1], grid) if learned else _fixed(model, grid)
        before = np.zeros((rows[0], model.width), np.float32)
        table = np.concatenate([before, patches.reshape(-1, model.width)])
        return [*tokens, table.reshape(*leading, -1, model.width)]

    return Entry(
        theirs=(*theirs, *(() if positions is None else (positions,))),
        ours=(*ours, *(("position_embedding",) if learned else ())),
        to_ours=to_ours,
        to_theirs=to_theirs,
    )


def _fixed(model: ViT, grid: tuple[int, int]) -> np.ndarray:
    """Returns positions [N, D] that are no parameters: sincos2d, or zeros for none."""
    if model.positions == Positions.SINCOS:
        return sincos(*grid, model.width)
    return np.zeros((grid[0] * grid[1], model.width), np.float32)


def _join(tokens: Arrays, width: int) -> np.ndarray:
    return np.concatenate([np.zeros((1, 0, width), np.float32), *tokens], axis=1)


def _split(tokens: np.ndarray, counts: Mapping[str, int]) -> Arrays:
    ends = np.cumsum(list(counts.values()), dtype=int)
    return np.split(tokens, ends, axis=1)[:-1]


def _resampled(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    if positions.shape[:2] == grid:
        return positions
    return np.asarray(resample_positions(jnp.asarray(positions), grid))
