"""Gradient accumulation over micro-batches, keeping FSDP shards split."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import PartitionSpec

from big_vision_lite.runtime import layout
from big_vision_lite.training.state import TrainState
from big_vision_lite.types import Array, Batch

# Primitives that move or relabel values unchanged: a cast may come before them.
MOVES = {"reshape", "transpose", "squeeze", "slice", "concatenate", "copy"}
# Primitives that backward recomputes: gathered parameters, and what a layer joins or
# reshapes them into before its product.
REMADE = {"all_gather", "broadcast_in_dim", "concatenate", "reshape"}


def accumulate_gradients(
    loss_of: Callable[..., Any],
    mesh: jax.sharding.Mesh,
    abstract: TrainState,
    places: Any,
    micro_batches: int,
) -> Callable[..., Any]:
    """Returns a function that accumulates the global batch's gradients.

    Every device iterates over its own rows: of m micro-batches, i takes rows i, i + m,
    i + 2m..., so no image moves and micro-batches are the same on any number of
    devices. A parameter sharded over "fsdp" is gathered per layer, in the layer's
    compute dtype, in forward and again in backward; its gradient is reduce-scattered in
    every micro-batch and accumulated sharded. The other sums over devices, and all
    gradients of replicated parameters, follow once, after the last micro-batch.

    `loss_of(params, frozen, collections, ema, batch, rng, progress)` returns the mean
    and (sums, weight, collections); `ema` is (averaged parameters, statistics). The
    function takes the same arguments and returns (gradients, sums, weight,
    collections), gradients with the shardings `places`.
    """
    averages = (abstract.ema, abstract.ema_statistics)
    held = (abstract.params, abstract.frozen, averages)
    split = jax.tree.map(lambda leaf: layout.split_axis(leaf.sharding), held)
    wanted = jax.tree.map(layout.split_axis, places)
    any_split = max(jax.tree.leaves(split)) >= 0

    def local(
        params: Any,
        frozen: Any,
        collections: Any,
        ema: Any,
        batch: Batch,
        rng: Array,
        progress: Any,
    ) -> Any:
        key = jax.random.fold_in(rng, jax.lax.axis_index(layout.BATCH_AXES))
        parts = jax.tree.map(lambda x: _strided(x, micro_batches), dict(batch))
        first = jax.tree.map(lambda x: x[0], parts)
        held = (params, frozen, ema)
        if any_split:
            held = _cast(held, loss_of, abstract, (collections, first, key, progress))
        one = functools.partial(
            _part, loss_of, split if any_split else None, key, progress
        )

        def body(carry: Any, inputs: Any) -> Any:
            totals, collections = carry
            # Gathered in every micro-batch: the compiler would hoist values that do
            # not change out of the loop, and hold them whole.
            now = _after(totals[2], held, split) if any_split else held
            *new, collections = one(now, collections, *inputs)
            return (jax.tree.map(jnp.add, totals, new), collections), None

        indices = jnp.arange(micro_batches)
        *totals, _ = jax.eval_shape(one, held, collections, indices[0], first)
        start = jax.tree.map(_zeros, totals)
        start[0] = jax.tree.map(layout.pin_like, start[0], places)
        (totals, collections), _ = jax.lax.scan(
            body, (start, collections), (indices, parts)
        )
        gradients, sums, weight = totals
        sums, weight = jax.lax.psum((sums, weight), layout.BATCH_AXES)
        gradients = _reduce(gradients, split[0], wanted, mesh)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        return gradients, sums, weight, collections

    rows, whole = PartitionSpec(layout.BATCH_AXES), PartitionSpec()
    params, frozen, ema = jax.tree.map(_manual_spec, split)
    # With one device on the tensor axis, all axes are manual: cuDNN's attention fails
    # if some axes are left to the compiler.
    alone = mesh.shape[layout.TENSOR_AXIS] == 1
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(params, frozen, whole, ema, rows, whole, whole),
        out_specs=(jax.tree.map(_manual_spec, wanted), whole, whole, whole),
        axis_names=set(layout.AXES if alone else layout.BATCH_AXES),
        check_vma=False,
    )


def _part(
    loss_of: Callable[..., Any],
    split: Any | None,
    key: Array,
    progress: Array | None,
    held: Any,
    collections: Any,
    index: Array,
    part: Batch,
) -> Any:
    """Returns (sum of gradients, sums, weight, collections) of one micro-batch.

    `held` is (params, frozen, ema), `split` their sharded axes, None if none are.
    """
    key = jax.random.fold_in(key, index)
    num_rows = len(jax.tree.leaves(part)[0])

    def loss(held: Any) -> Any:
        params, frozen, ema = jax.tree.map(_gather, held, split) if split else held
        mean, (sums, weight, new) = loss_of(
            params, frozen, collections, ema, part, key, progress
        )
        # Micro-batches and devices with padding rows count less.
        return mean * jnp.maximum(weight, 1) / num_rows, (sums, weight, new)

    gradients, kept = _gradient(loss, held, split)
    # Multiplied here, not after the loop: XLA:TPU would hoist the reduce-scatter of a
    # plain sum out of the loop, and carry whole gradients in float32.
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * num_rows, gradients)
    return gradients, *kept


def _cast(
    held: Any, loss_of: Callable[..., Any], abstract: TrainState, inputs: Any
) -> Any:
    """Casts (params, frozen, ema) to the dtypes of `loss_of`, before any gather."""
    averages = (abstract.ema, abstract.ema_statistics)
    whole = (abstract.params, abstract.frozen, averages)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), whole)
    collections, part, key, progress = inputs

    def function(held: Any) -> Any:
        params, frozen, ema = held
        return loss_of(params, frozen, collections, ema, part, key, progress)

    dtypes = used_dtypes(function, shapes)
    return jax.tree.map(lambda x, dtype: x.astype(dtype), held, dtypes)


def used_dtypes(function: Callable[[Any], Any], shapes: Any) -> Any:
    """Returns the dtype in which `function` uses each leaf of `shapes`.

    That is the dtype to which all its uses cast it, else the leaf's. A cast is
    elementwise, so it can come before a gather.
    """
    closed = jax.make_jaxpr(function)(shapes)
    leaves, tree = jax.tree.flatten(shapes)
    found = []
    for leaf, variable in zip(leaves, closed.jaxpr.invars, strict=True):
        used = set(_uses(closed.jaxpr, variable))
        found.append(used.pop() if len(used) == 1 else leaf.dtype)
    return jax.tree.unflatten(tree, found)


def _uses(jaxpr: core.Jaxpr, variable: Any) -> Iterable[Any]:
    """Yields the dtypes that `variable` is cast to, its own for uses without a cast."""
    if any(variable is out for out in jaxpr.outvars):
        yield variable.aval.dtype
    for equation in jaxpr.eqns:
        for position, read in enumerate(equation.invars):
            if read is not variable:
                continue
            inner = _inner(equation)
            if equation.primitive.name == "convert_element_type":
                yield equation.params["new_dtype"]
            elif equation.primitive.name in MOVES:
                yield from _uses(jaxpr, equation.outvars[0])
            elif inner is not None:
                yield from _uses(inner, inner.invars[position])
            else:
                yield variable.aval.dtype


def _inner(equation: Any) -> core.Jaxpr | None:
    """Returns the jaxpr that an equation runs once on its own inputs, None if none."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(name)
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and len(inner.invars) == len(equation.invars):
            return inner
    return None


def _gradient(loss: Callable[..., Any], held: Any, split: Any | None) -> Any:
    """Returns (gradients of held[0], auxiliary output of `loss`).

    With `split`, the sharded axes, backward gathers the parameters again instead of
    keeping those of forward.
    """
    params, *rest = held

    def of_params(params: Any) -> Any:
        return loss((params, *rest))

    if split is None:
        return jax.grad(of_params, has_aux=True)(params)
    remade = jax.checkpoint(
        of_params,
        policy=lambda primitive, *_, **__: primitive.name not in REMADE,
        # The CSE barrier would write everything backward needs to memory.
        prevent_cse=False,
    )
    total, backward, kept = jax.vjp(remade, params, has_aux=True)
    # The compiler would gather equal values once, and hold the result from forward to
    # backward.
    again = jax.tree.leaves(_after(total, held, split))
    new = dict(zip(map(id, jax.tree.leaves(held)), again, strict=True))
    backward = jax.tree.map(lambda x: new.get(id(x), x), backward)
    return backward(jnp.ones_like(total))[0], kept


def _after(number: Array, held: Any, split: Any) -> Any:
    """Makes the sharded leaves of `held` depend on `number`, by adding 0 * number."""

    def one(x: Array, axis: int) -> Array:
        return x if axis < 0 else x + (0 * number).astype(x.dtype)

    return jax.tree.map(one, held, split)


def _gather(leaf: Array, axis: int) -> Array:
    if axis < 0:
        return leaf
    shape = leaf.shape
    if axis == 0 and shape[0] % 8 == 0:
        # As a matrix: XLA:TPU would lay out [W, H, D] with W last, and cannot always
        # reduce-scatter that in bfloat16. Rows come in tiles of 8.
        leaf = leaf.reshape(shape[0], -1)
    whole = jax.lax.all_gather(leaf, layout.FSDP_AXIS, axis=axis, tiled=True)
    return whole.reshape(*whole.shape[:1], *shape[1:]) if axis == 0 else whole


def _reduce(gradients: Any, split: Any, wanted: Any, mesh: jax.sharding.Mesh) -> Any:
    """Sums gradients over the mesh axes where they are still partial."""
    leaves, tree = jax.tree.flatten(gradients)
    axes = list(zip(jax.tree.leaves(split), jax.tree.leaves(wanted), strict=True))
    for index, (have, want) in enumerate(axes):
        if have < 0 <= want:
            leaves[index] = jax.lax.psum_scatter(
                leaves[index],
                layout.FSDP_AXIS,
                scatter_dimension=want,
                tiled=True,
            )
    whole = [i for i, (_, want) in enumerate(axes) if want < 0]
    parts = [i for i, (_, want) in enumerate(axes) if want >= 0]
    for indices, over in ((whole, layout.BATCH_AXES), (parts, ("data",))):
        if not indices or all(mesh.shape[axis] == 1 for axis in over):
            continue
        summed = jax.lax.psum([leaves[i] for i in indices], over)
        for index, leaf in zip(indices, summed, strict=True):
            leaves[index] = leaf
    return jax.tree.unflatten(tree, leaves)


def _strided(x: Array, parts: int) -> Array:
    """Returns [parts, rows / parts, ...]: part i has rows i, i + parts, ..."""
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1)


def _zeros(shape: Any) -> Array:
    # Sums of many small numbers: float32, whatever the dtype of a micro-batch's.
    return jnp.zeros(shape.shape, jnp.promote_types(shape.dtype, jnp.float32))


def _manual_spec(axis: int) -> PartitionSpec:
    return (
        PartitionSpec(*(None,) * axis, layout.FSDP_AXIS)
        if axis >= 0
        else (PartitionSpec())
    )
