"""Sees all pairs of a global batch in chunks that travel from device to device.

Of D devices each keeps its B / D rows, the columns go round: memory for pairs is that
of (B / D)^2, never of B^2 / D. Written once, for any loss over pairs.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from big_vision_lite.runtime import layout
from big_vision_lite.types import Array

# Arrays by name: of b = B / D examples [b, ...], or of none of them [].
Part = dict[str, Array]
# visit(rows, columns, of_rows, of_columns, shared) -> (of_rows, of_columns)
Visit = Callable[[Part, Part, Part, Part, Part], tuple[Part, Part]]


def all_pairs(
    visit: Visit,
    rows: Part,
    columns: Part,
    of_rows: Part,
    of_columns: Part,
    shared: Part,
) -> tuple[Part, Part]:
    """Returns what `visit` makes of all pairs of `rows` and `columns`, by row, column.

    `visit` gets a chunk of each [b, ...] and what is known of them so far, beginning
    with `of_rows` and `of_columns` [B, ...]; it returns that with these pairs taken
    into account. It must not mind the order of chunks. `shared` are numbers that all
    devices have. Its inside is computed again for the gradient, which is exact. Batches
    whose rows do not divide over the devices are refused by JAX.
    """
    shards = layout.batch_shards()
    if shards == 1:
        return visit(rows, columns, of_rows, of_columns, shared)
    axes = layout.batch_axes()
    ring = [(place, (place + 1) % shards) for place in range(shards)]
    # A scan is a barrier to common subexpressions by itself.
    visit = jax.checkpoint(visit, prevent_cse=False)

    def on_device(
        rows: Part, columns: Part, of_rows: Part, of_columns: Part, shared: Part
    ) -> tuple[Part, Part]:
        def turn(state: Any, _: None) -> tuple[Any, None]:
            columns, of_rows, of_columns = state
            of_rows, of_columns = visit(rows, columns, of_rows, of_columns, shared)
            # What is known of a column travels with it, and is home after D turns.
            columns, of_columns = jax.lax.ppermute((columns, of_columns), axes, ring)
            return (columns, of_rows, of_columns), None

        state = (columns, of_rows, of_columns)
        (_, of_rows, of_columns), _ = jax.lax.scan(turn, state, length=shards)
        return of_rows, of_columns

    split = PartitionSpec(axes)
    return jax.shard_map(
        on_device,
        in_specs=(split, split, split, split, PartitionSpec()),
        out_specs=(split, split),
        axis_names=set(axes),
        check_vma=False,
    )(rows, columns, of_rows, of_columns, shared)
