"""The tokens and positions of timm's ViTs, in one row there, each apart here."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from big_vision_lite.conversion.engine import Arrays, Entry, Shape
from big_vision_lite.models.blocks import patches
from big_vision_lite.models.blocks.patches import Positions, sincos
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT


def tokens_and_positions(
    model: ViT, grid: tuple[int, int], unread_class_token: bool = False
) -> Entry:
    """Ties timm's class, distillation and register tokens and positions to ours.

    timm's positions may begin with rows for those tokens (no_embed_class=False); ours
    never do, so that such rows are added to the tokens, the same function. On the way
    out there are none, but for the distilled DeiT, whose rows are always there: zeros.
    With `unread_class_token` their class token is our first register. Positions that
    are resampled at every use leave as those of `grid`.
    """
    class_token = int(model.pooling == Pooling.CLASS_TOKEN)
    distilled = int(model.distillation_token)
    ours = _present(
        class_token=class_token, distillation_token=distilled, registers=model.registers
    )
    theirs = _present(
        cls_token=class_token + unread_class_token,
        dist_token=distilled,
        reg_token=model.registers - unread_class_token,
    )
    count = sum(ours.values())
    learned = model.positions == Positions.LEARNED
    placed = model.positions != Positions.NONE

    def to_ours(arrays: Arrays, shapes: Sequence[Shape]) -> Arrays:
        tokens = _join(arrays[: len(theirs)], model.width)
        if not placed:
            return _split(tokens, ours)
        rows = arrays[-1].reshape(-1, model.width)
        before = len(rows) - grid[0] * grid[1]
        if before not in (0, count) or tokens.shape[1] != count:
            raise ValueError(
                f"{arrays[-1].shape} holds {len(rows)} positions, not those of "
                f"{grid[0]}x{grid[1]} patches, alone or after those of {count} tokens"
            )
        if before:
            tokens = tokens + rows[:before]
        patches = rows[before:]
        if learned:
            return [*_split(tokens, ours), patches.reshape(*grid, model.width)]
        if not np.array_equal(patches, sincos(*grid, model.width)):
            raise ValueError("the positions are not those of positions=sincos")
        return _split(tokens, ours)

    def to_theirs(arrays: Arrays) -> Arrays:
        tokens = _split(_join(arrays[: len(ours)], model.width), theirs)
        if not placed:
            return tokens
        patches = (
            _resampled(arrays[-1], grid) if learned else sincos(*grid, model.width)
        )
        before = np.zeros((count if distilled else 0, model.width), np.float32)
        rows = np.concatenate([before, patches.reshape(-1, model.width)])
        return [*tokens, rows[None]]

    return Entry(
        theirs=(*theirs, *(("pos_embed",) if placed else ())),
        ours=(*ours, *(("position_embedding",) if learned else ())),
        to_ours=to_ours,
        to_theirs=to_theirs,
    )


def _present(**counts: int) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


def _join(tokens: Arrays, width: int) -> np.ndarray:
    return np.concatenate([np.zeros((1, 0, width), np.float32), *tokens], axis=1)


def _split(tokens: np.ndarray, counts: dict[str, int]) -> Arrays:
    ends = np.cumsum(list(counts.values()), dtype=int)
    return np.split(tokens, ends, axis=1)[:-1]


def _resampled(positions: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    if positions.shape[:2] == grid:
        return positions
    return np.asarray(patches.resample_positions(jnp.asarray(positions), grid))
