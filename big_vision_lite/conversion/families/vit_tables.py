"""What the formats of ViTs share: refusing what has no counterpart, and positions."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from big_vision_lite.conversion.engine import Arrays, Entry, Shape
from big_vision_lite.models.blocks.patches import Positions, sincos
from big_vision_lite.models.vit import ViT

# Fields that change no number of a trained model, or sizes that every format has.
ANYWHERE = (
    *("width", "depth", "mlp_dim", "num_heads", "patch_size", "head", "mean", "std"),
    *("dropout", "stochastic_depth", "dtype", "attention", "remat", "parent", "name"),
    "mask_token",
)


def check_fields(
    model: ViT, *, what: str, expresses: Collection[str], instead: str
) -> None:
    """Refuses a model of which some field has no counterpart in another library.

    A field passes at its default, or when `expresses` names it; the tanh layer before
    the head goes by "pre_logits". `what` opens the message and `instead` ends it.
    """
    plain = {field.name: field.default for field in dataclasses.fields(ViT)}
    unfit = [
        f"{name}={getattr(model, name)}"
        for name, default in plain.items()
        if name not in (*ANYWHERE, *expresses) and getattr(model, name) != default
    ]
    if model.head is not None and model.head.hidden_dim is not None:
        unfit += [f"head.hidden_dim={model.head.hidden_dim}"]
        unfit = unfit[:-1] if "pre_logits" in expresses else unfit
    if unfit:
        raise ValueError(f"{what} has no counterpart for {', '.join(unfit)}. {instead}")


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
        if not np.array_equal(rows, _fixed(model, grid)):
            raise ValueError(f"the positions are not those of {model.positions}")
        return folded

    def to_theirs(arrays: Arrays) -> Arrays:
        width, count = model.width, len(tokens)
        patches = arrays[count] if learned else _fixed(model, grid)
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


def _fixed(model: ViT, grid: tuple[int, int]) -> np.ndarray:
    if model.positions == Positions.SINCOS:
        return sincos(*grid, model.width)
    return np.zeros((grid[0] * grid[1], model.width), np.float32)
