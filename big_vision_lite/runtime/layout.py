"""Shards batches and activations over the mesh; does nothing without a mesh."""

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

from big_vision_lite.types import Array

# The mesh axis over which parameters are split, and the axes of the batch's rows.
FSDP_AXIS = "fsdp"
BATCH_AXES = ("data", FSDP_AXIS)
# Along this axis every device has the same rows and its share of heads and MLPs.
TENSOR_AXIS = "tensor"
AXES = (*BATCH_AXES, TENSOR_AXIS)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of a global batch: rows over all batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the replicated sharding: every device holds the whole value."""
    return NamedSharding(mesh, PartitionSpec())


def split_axis(sharding: NamedSharding) -> int:
    """Returns the dimension that is split over "fsdp", -1 if none is."""
    for axis, names in enumerate(sharding.spec):
        if FSDP_AXIS in (names if isinstance(names, tuple) else (names,)):
            return axis
    return -1


def num_row_shares(mesh: jax.sharding.Mesh) -> int:
    """Returns the number of shards of a batch's rows."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(
    batch_size: int,
    mesh: jax.sharding.Mesh,
    micro_batches: int = 1,
    *,
    option: str = "--config.data.batch_size",
) -> None:
    """Checks that a batch divides evenly over the devices and the micro-batches.

    `option` is the flag of the batch size, for messages.

    Raises:
        ValueError: it does not divide; names the two nearest batch sizes that do.
    """
    shares = num_row_shares(mesh)
    unit = shares * micro_batches
    if batch_size > 0 and batch_size % unit == 0:
        return
    below = max(batch_size, 0) // unit * unit
    nearest = f"{below} or {below + unit}" if below else f"{unit} or {2 * unit}"
    over = f"{shares} devices" if shares > 1 else "1 device"
    if shares < mesh.size:
        over = f"data * fsdp = {shares} of {mesh.size} devices"
    if micro_batches > 1:
        over += f" times {micro_batches} micro-batches"
    raise ValueError(
        f"{option.removeprefix('--config.')}={batch_size} does not divide over {over}; "
        f"use {option}={nearest}."
    )


def pin_batch(x: Array) -> Array:
    """Constrains the rows of `x` to the batch axes.

    Without it the partitioner may move activations instead of weights, many times the
    bytes.
    """
    axes = batch_axes()
    if not axes or x.ndim == 0:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))


def pin_like(x: Array, sharding: NamedSharding) -> Array:
    """Constrains `x` to `sharding` on the mesh axes that the compiler partitions."""
    mesh = jax.sharding.get_abstract_mesh()
    names = [name if name in mesh.auto_axes else None for name in sharding.spec]
    if not any(names):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*names))


def gathers_by_hand() -> bool:
    """Returns whether `accumulation` gathers parameters layer by layer here."""
    mesh = jax.sharding.get_abstract_mesh()
    return FSDP_AXIS in mesh.manual_axes and mesh.shape[FSDP_AXIS] > 1


def gather(x: Array) -> Array:
    """Replicates a small `x` on every device."""
    return jax.lax.with_sharding_constraint(x, PartitionSpec()) if batch_axes() else x


def batch_shards() -> int:
    """Returns the number of devices that the rows of a batch are sharded over."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in batch_axes())


def tensor_shards() -> int:
    """Returns the number of devices that heads and MLPs are split over."""
    return jax.sharding.get_abstract_mesh().shape.get(TENSOR_AXIS, 1)


def batch_axes() -> tuple[str, ...]:
    """Returns the axes of the mesh over which the compiler splits rows, () without.

    Inside the shard_map of gradient accumulation the rows are split already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in BATCH_AXES if axis in mesh.auto_axes)
