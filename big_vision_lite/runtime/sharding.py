"""Builds the mesh of devices and shards the train state over it."""

import dataclasses
import enum
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from big_vision_lite import trees
from big_vision_lite.runtime import layout
from big_vision_lite.runtime.layout import AXES, FSDP_AXIS, TENSOR_AXIS
from big_vision_lite.types import Array

# A parameter above this many values that cannot be split over an axis is worth a
# warning (256 KB in float32); below, holding it everywhere costs nothing.
BIG_PARAMETER = 2**16
# The prefix of the names of the optimizer state in a train state.
OPTIMIZER_STATE = "opt_state/"


class Layout(enum.StrEnum):
    """The layout of a parameter, its average and its optimizer state over the mesh."""

    # Split over "fsdp": rows of matrices; else the smallest dimension that divides, the
    # last one only if no other does. Biases and other vectors are whole.
    FSDP = "fsdp"
    # Whole on every device.
    REPLICATE = "replicate"
    # Whole, but the optimizer state is split over "fsdp" (ZeRO-1, arXiv:1910.02054):
    # gradients are reduce-scattered, every device updates its share, shares are
    # gathered.
    OPTIMIZER = "optimizer"
    # Split over "tensor", and over "fsdp" by another dimension.
    # The first dimension, a layer's inputs: [H, D, W] of attention's output, [F, W].
    TENSOR_INPUTS = "tensor_inputs"
    # The last but one, heads: [W, H, D] and [H, D] of queries, keys and values.
    TENSOR_HEADS = "tensor_heads"
    # The last, a layer's outputs: [W, F] and [F].
    TENSOR_OUTPUTS = "tensor_outputs"


# The dimension that is split over "tensor".
_TENSOR_DIMENSIONS = {
    Layout.TENSOR_INPUTS: 0,
    Layout.TENSOR_HEADS: -2,
    Layout.TENSOR_OUTPUTS: -1,
}


@dataclasses.dataclass(kw_only=True)
class ShardingRule:
    """The layout of the parameters whose whole name matches the regex `pattern`."""

    pattern: str
    layout: Layout = Layout.FSDP


# Rules that split the heads and MLPs of a ViT over "tensor" (Megatron-LM,
# arXiv:1909.08053): two all-reduces of activations per block forward, two backward.
TENSOR_PARALLEL_VIT = (
    ShardingRule(
        pattern=".*attention/(query|key|value)/(kernel|bias)",
        layout=Layout.TENSOR_HEADS,
    ),
    ShardingRule(pattern=".*attention/out/kernel", layout=Layout.TENSOR_INPUTS),
    ShardingRule(
        pattern=".*mlp/hidden/(kernel|bias)",
        layout=Layout.TENSOR_OUTPUTS,
    ),
    ShardingRule(pattern=".*mlp/out/kernel", layout=Layout.TENSOR_INPUTS),
    ShardingRule(pattern=".*"),
)


@dataclasses.dataclass(kw_only=True)
class Mesh:
    """The number of devices on each axis; -1 stands for the remaining ones.

    Rows of the batch are spread over "data" and "fsdp", parameters over "fsdp". Devices
    along "tensor" have the same rows; rules of a tensor layout split layers over them.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if size != -1 and size < 1:
                raise ValueError(
                    f"mesh.{axis}={size} is not a number of devices; use 1 or more, "
                    "or -1 for the rest of the devices."
                )
        rest = [axis for axis in AXES if getattr(self, axis) == -1]
        if len(rest) > 1:
            many = "both" if len(rest) == 2 else "all"
            raise ValueError(
                f"mesh.{' and mesh.'.join(rest)} are {many}"
                " -1, the rest of the devices; only one can be. Use for example "
                f"--config.mesh.{rest[-1]}=1."
            )

    def shape(self, count: int) -> tuple[int, int, int] | None:
        """Returns the sizes of the axes on `count` devices, None if they do not fit."""
        sizes = [self.data, self.fsdp, self.tensor]
        given = int(np.prod([size for size in sizes if size != -1]))
        if count % given or (given != count and -1 not in sizes):
            return None
        data, fsdp, tensor = (count // given if n == -1 else n for n in sizes)
        return data, fsdp, tensor


def make_mesh(config: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Returns the mesh of all devices, or of `devices`, with axes data, fsdp, tensor.

    On TPUs neighbours along an axis are neighbours in the torus, and of several slices
    each holds "fsdp" and "tensor" whole. Elsewhere devices go in process order.

    Raises:
        ValueError: the axes do not multiply to the number of devices, or "fsdp" and
            "tensor" do not fit into a slice.
    """
    devices = process_major(jax.devices() if devices is None else devices)
    shape = config.shape(len(devices))
    if shape is None:
        _refuse_shape(config, devices)
    on_tpu = devices[0].platform == "tpu"
    order = _torus(shape, devices) if on_tpu else np.array(devices).reshape(shape)
    return jax.sharding.Mesh(order, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def process_major(devices: Sequence[Any]) -> list[Any]:
    """Orders devices by process, and within a process by id."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def _torus(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Arranges TPUs: axes along the links of a slice, only "data" across slices."""
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    data, fsdp, tensor = shape
    if data % num_slices:
        raise ValueError(
            f"mesh.fsdp={fsdp} times mesh.tensor={tensor} does not fit into a slice: "
            f"there are {num_slices} of {len(devices) // num_slices} devices, and only "
            '"data" goes across slices. Use a --config.mesh.fsdp that divides '
            f"{len(devices) // num_slices // tensor}."
        )
    inside, across = (data // num_slices, fsdp, tensor), (num_slices, 1, 1)

    def arrange(split: bool) -> np.ndarray:
        if num_slices > 1:
            return mesh_utils.create_hybrid_device_mesh(
                inside, across, devices, allow_split_physical_axes=split
            )
        return mesh_utils.create_device_mesh(
            inside, devices, allow_split_physical_axes=split
        )

    try:
        return arrange(split=False)
    except NotImplementedError:
        # An axis that is part of a dimension of the torus: 2 of a ring of 4.
        return arrange(split=True)
    except AssertionError:
        # Chips since v4 described as two cores each, which no program sees.
        return np.array(devices).reshape(shape)


def _refuse_shape(config: Mesh, devices: Sequence[Any]) -> NoReturn:
    count = len(devices)
    divisors = [str(n) for n in range(1, count + 1) if count % n == 0]
    fitting = f"={divisors[0]}" if count == 1 else f" one of {', '.join(divisors)}"
    sizes = [f"mesh.{axis}={getattr(config, axis)}" for axis in AXES]
    fix = "--config.mesh.data=-1"
    if config.tensor != 1:
        sizes, fix = sizes, f"{fix} --config.mesh.tensor=1"
    else:
        sizes = sizes[:2]
    raise ValueError(
        f"{', '.join(sizes[:-1])} and {sizes[-1]} do not make the {count} "
        f"{devices[0].platform} device{'s' * (count > 1)}. Use {fix} with "
        f"--config.mesh.fsdp{fitting}."
    )


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns XLA's options for programs whose parameters are split over "fsdp".

    By default XLA:TPU turns a product with the reduce-scatter after it, or the gather
    before it, into a chain of products and collective-permutes. For ViT-L/16 with
    fsdp=8 on v5e that reads and writes 1.5 times the bytes (libtpu 0.0.42.1).
    """
    if mesh.devices.flat[0].platform != "tpu" or mesh.shape[FSDP_AXIS] == 1:
        return {}
    return {
        "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
        "xla_tpu_enable_windowed_einsum_for_all_gather": False,
    }


def shardings(
    abstract_tree: Any,
    rules: Sequence[ShardingRule],
    mesh: jax.sharding.Mesh,
    *,
    parameters: Any = None,
) -> Any:
    """Returns a NamedSharding for every leaf, by the first rule that matches its name.

    `rules` match the names of `parameters`, by default `abstract_tree` itself. For a
    whole train state, pass it as `abstract_tree` and its parameters, trained and
    frozen, as `parameters`: a leaf whose name ends in a parameter's name and that has
    its shape (momentum, averages) gets the parameter's sharding; all others (counters,
    factored moments, batch statistics) are replicated. With layout "optimizer" only
    leaves under "opt_state" are split. Without rules all is replicated.

    Raises:
        ValueError: a rule matches no parameter, a parameter matches no rule, or a
            tensor layout does not divide its parameter.
    """
    abstract_parameters = trees.flatten(
        abstract_tree if parameters is None else parameters
    )
    layouts: Any = dict.fromkeys(abstract_parameters, Layout.REPLICATE)
    if rules:
        layouts = trees.match(
            [(rule.pattern, rule.layout) for rule in rules],
            abstract_parameters,
            every_name=True,
            what="sharding rule",
        )
    _check_tensor(abstract_parameters, layouts, mesh)
    placed = {
        name: _partition(_axes(name, tuple(leaf.shape), layouts[name], mesh))
        for name, leaf in abstract_parameters.items()
    }
    _warn_whole(abstract_parameters, layouts, placed, mesh)

    def place(name: str, leaf: Any) -> NamedSharding:
        owner = trees.owner(name, abstract_parameters)
        if owner is None or abstract_parameters[owner].shape != leaf.shape:
            return layout.replicated(mesh)
        if layouts[owner] == Layout.OPTIMIZER and not name.startswith(OPTIMIZER_STATE):
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


def _axes(
    name: str, shape: tuple[int, ...], rule: Layout, mesh: jax.sharding.Mesh
) -> list[str | None]:
    """Returns the axis, or None, over which each dimension of a parameter is split."""
    axes: list[str | None] = [None] * len(shape)
    dimension = _TENSOR_DIMENSIONS.get(rule)
    # On an axis of one device "split" and "whole" mean the same; one spelling keeps
    # compiled programs and checkpoints comparable.
    tensor, fsdp = mesh.shape[TENSOR_AXIS], mesh.shape[FSDP_AXIS]
    if dimension is not None and tensor > 1:
        axes[dimension] = TENSOR_AXIS
    free = [
        axis
        for axis, size in enumerate(shape)
        if axes[axis] is None and size and size % fsdp == 0
    ]
    # Biases, norms and tokens: gathering takes long for the little memory it saves.
    vector = name.endswith("bias") or sum(size > 1 for size in shape) <= 1
    if rule != Layout.REPLICATE and fsdp > 1 and free and not vector:
        # Gradients are reduce-scattered over this axis. In bfloat16 XLA:TPU can do so
        # over the last axis only in multiples of 256, and over H but not always over W
        # of [W, H, D]; otherwise it sums the whole gradient on every device. So the
        # last axis is the last choice, and of the others the smallest, here H, wins.
        outer = [axis for axis in free if axis < len(shape) - 1] or free
        axes[min(outer, key=lambda axis: shape[axis])] = FSDP_AXIS
    return axes


def _partition(axes: Sequence[str | None]) -> PartitionSpec:
    last = max((i + 1 for i, axis in enumerate(axes) if axis is not None), default=0)
    return PartitionSpec(*axes[:last])


def _check_tensor(
    parameters: Mapping[str, Any], layouts: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> None:
    """Checks that "tensor" divides every parameter of a tensor layout.

    Raises:
        ValueError: it does not; names all such parameters.
    """
    size = mesh.shape[TENSOR_AXIS]
    wrong = []
    for name, leaf in parameters.items():
        dimension = _TENSOR_DIMENSIONS.get(layouts[name])
        if dimension is None:
            continue
        fits = -len(leaf.shape) <= dimension < len(leaf.shape)
        if not fits or leaf.shape[dimension] % size:
            wrong.append(f"  {name} {trees.describe(leaf)} as {layouts[name]}")
    if wrong:
        raise ValueError(
            f"These parameters do not divide over mesh.tensor={size} (heads by "
            "tensor_heads, else the first or the last dimension):\n"
            + "\n".join(wrong)
            + "\nUse a --config.mesh.tensor that divides num_heads and mlp_dim, or "
            "another layout in config.sharding."
        )


def _warn_whole(
    parameters: Mapping[str, Any],
    layouts: Mapping[str, Any],
    placed: Mapping[str, PartitionSpec],
    mesh: jax.sharding.Mesh,
) -> None:
    size = mesh.shape[FSDP_AXIS]
    whole = [
        f"  {name} {trees.describe(leaf)}"
        for name, leaf in parameters.items()
        if layouts[name] != Layout.REPLICATE
        and size > 1
        and FSDP_AXIS not in placed[name]
        and np.prod(leaf.shape) > BIG_PARAMETER
    ]
    if whole:
        warnings.warn(
            f"No dimension of these parameters divides over mesh.fsdp={size}, so every "
            "device holds them whole:\n" + "\n".join(whole) + "\nChoose an fsdp that "
            "divides the widths, or silence this with a rule of layout replicate.",
            stacklevel=3,
        )
