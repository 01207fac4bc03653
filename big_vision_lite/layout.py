"""Where arrays live on the mesh, by logical name: no-ops when there is no mesh."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from big_vision_lite.types import Array

# The mesh axes over which the rows of a batch are spread.
BATCH_AXES = ("data", "fsdp")


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of a global batch: rows over all batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def pin_batch(x: Array) -> Array:
    """Keeps the rows of `x` on the batch axes, so that weights move, not activations.

    Without it the partitioner may move activations, many times the bytes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.ndim == 0:
        return x
    # Inside shard_map, where gradients are accumulated, rows stay by themselves.
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.auto_axes)
    if not axes:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))
