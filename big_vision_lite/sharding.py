"""The mesh of devices, and where the arrays of the train state live on it."""

import dataclasses
import enum
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from big_vision_lite import layout, trees
from big_vision_lite.types import Array

# A parameter above this many values that cannot be split over "fsdp" is worth a warning
# (256 KB in float32); below, biases and norms, holding it everywhere costs nothing.
BIG_PARAMETER = 2**16


class Layout(enum.StrEnum):
    """Where a parameter lives: split over the "fsdp" axis, or whole on every device."""

    FSDP = "fsdp"
    REPLICATE = "replicate"


@dataclasses.dataclass(kw_only=True)
class ShardingRule:
    """Places the parameters whose whole name matches `pattern`."""

    pattern: str
    layout: Layout = Layout.FSDP


@dataclasses.dataclass(kw_only=True)
class Mesh:
    """How many devices each axis has; -1 stands for the rest of them.

    Rows of the batch are spread over both axes, parameters over "fsdp" only.
    """

    data: int = -1
    fsdp: int = 1

    def __post_init__(self) -> None:
        for axis in ("data", "fsdp"):
            size = getattr(self, axis)
            if size != -1 and size < 1:
                raise ValueError(
                    f"mesh.{axis}={size} is not a number of devices; use 1 or more, "
                    "or -1 for the rest of the devices."
                )
        if self.data == self.fsdp == -1:
            raise ValueError(
                "mesh.data and mesh.fsdp are both -1, the rest of the devices; give "
                "one of them, for example --config.mesh.fsdp=1."
            )


def make_mesh(config: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns the mesh of all devices (or of `devices`) with axes ("data", "fsdp").

    Devices go in process order, so that each host owns contiguous rows of a batch.

    Raises:
        ValueError: the axes do not multiply to the number of devices.
    """
    devices = process_major(jax.devices() if devices is None else devices)
    count = len(devices)
    data, fsdp = config.data, config.fsdp
    given = max(data, 1) * max(fsdp, 1)
    if count % given or (given != count and -1 not in (data, fsdp)):
        divisors = [str(n) for n in range(1, count + 1) if count % n == 0]
        fitting = f"={divisors[0]}" if count == 1 else f" one of {', '.join(divisors)}"
        raise ValueError(
            f"mesh.data={data} and mesh.fsdp={fsdp} do not make the {count} "
            f"{devices[0].platform} device{'s' * (count > 1)}. Use "
            f"--config.mesh.data=-1 with --config.mesh.fsdp{fitting}."
        )
    data = count // given if data == -1 else data
    fsdp = count // given if fsdp == -1 else fsdp
    return jax.sharding.Mesh(
        np.array(devices).reshape(data, fsdp),
        layout.BATCH_AXES,
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def process_major(devices: Sequence[Any]) -> list[Any]:
    """Orders devices by process, and within a process by id."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def shardings(
    abstract_tree: Any,
    rules: Sequence[ShardingRule],
    mesh: jax.sharding.Mesh,
    *,
    parameters: Any = None,
) -> Any:
    """Returns a NamedSharding for every leaf, by the first rule that matches its name.

    `rules` speak of the names of `parameters`, by default `abstract_tree` itself. Pass
    a whole train state as `abstract_tree` and its parameters, trained and frozen, as
    `parameters`: leaves whose name ends in a parameter's name and that have its shape
    (momentum, averages) live where the parameter lives, all others (counters, factored
    moments, batch statistics) whole on every device. Without rules all is replicated.

    Raises:
        ValueError: a rule matches no parameter, or a parameter no rule.
    """
    abstract_parameters = trees.flatten(
        abstract_tree if parameters is None else parameters
    )
    layouts: Mapping[str, Any] = dict.fromkeys(abstract_parameters, Layout.REPLICATE)
    if rules:
        layouts = trees.match(
            [(rule.pattern, rule.layout) for rule in rules],
            abstract_parameters,
            every_name=True,
            what="sharding rule",
        )
    placed = {
        name: _spec(tuple(leaf.shape), layouts[name], mesh.shape["fsdp"])
        for name, leaf in abstract_parameters.items()
    }
    _warn_whole(abstract_parameters, layouts, placed, mesh)

    def place(name: str, leaf: Any) -> NamedSharding:
        owner = _owner(name, abstract_parameters)
        if owner is None or abstract_parameters[owner].shape != leaf.shape:
            return layout.replicated(mesh)
        return NamedSharding(mesh, placed[owner])

    return trees.map_named(place, abstract_tree)


def put(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, Array]:
    """Makes global arrays, rows over the batch axes, from this host's rows.

    Each host passes its own contiguous rows, as many as every other host.
    """
    sharding = layout.batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows)
        for name, rows in batch.items()
    }


def _spec(shape: tuple[int, ...], layout: Layout | None, size: int) -> PartitionSpec:
    """Splits the largest dimension that divides over `size` devices, or none."""
    divisible = [axis for axis, n in enumerate(shape) if n and n % size == 0]
    # On an axis of one device "split" and "whole" are the same place; one spelling of
    # it keeps compiled programs and checkpoints comparable.
    if layout == Layout.REPLICATE or size == 1 or not divisible:
        return PartitionSpec()
    largest = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * largest, "fsdp")


def _owner(name: str, parameters: Mapping[str, Any]) -> str | None:
    """Returns the parameter whose name is the longest ending of `name`."""
    parts = name.split("/")
    endings = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((ending for ending in endings if ending in parameters), None)


def _warn_whole(
    parameters: Mapping[str, Any],
    layouts: Mapping[str, Any],
    placed: Mapping[str, PartitionSpec],
    mesh: jax.sharding.Mesh,
) -> None:
    size = mesh.shape["fsdp"]
    whole = [
        f"  {name} {trees.describe(leaf)}"
        for name, leaf in parameters.items()
        if layouts[name] == Layout.FSDP
        and size > 1
        and placed[name] == PartitionSpec()
        and np.prod(leaf.shape) > BIG_PARAMETER
    ]
    if whole:
        warnings.warn(
            f"No dimension of these parameters divides over mesh.fsdp={size}, so every "
            "device holds them whole:\n" + "\n".join(whole) + "\nChoose an fsdp that "
            "divides the widths, or silence this with a rule of layout replicate.",
            stacklevel=3,
        )
