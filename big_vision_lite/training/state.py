"""The train state: initialised sharded, with trained and frozen parameters apart."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from big_vision_lite import trees
from big_vision_lite.runtime import sharding
from big_vision_lite.training.forward import random_keys
from big_vision_lite.trees import STATISTICS
from big_vision_lite.types import Array, Model, Params


@struct.dataclass
class TrainState:
    """The train state: everything a step reads and writes and a checkpoint holds.

    `step` counts finished updates (int32). `frozen` parameters get no gradient and no
    optimizer state. `collections` are batch statistics, queues and the like. `ema` is
    an average of `params` or None; it starts as a copy (an alias could not be donated).
    `ema_statistics` {"batch_stats": ...} are averaged alike. A checkpoint, or a state
    to evaluate, has statistics measured for `ema` in `recalibrated` {"batches": how
    many, "batch_stats": ...}; a state that trains has None.
    """

    # Typed loosely: the tree also holds shapes, shardings and digests.
    step: Any
    params: Any
    frozen: Any
    collections: Any
    opt_state: Any
    ema: Any
    ema_statistics: Any = None
    recalibrated: Any = None


def frozen_names(patterns: Sequence[str], names: Sequence[str]) -> set[str]:
    """Returns the names of the parameters that `freeze` patterns match.

    Raises:
        ValueError: a pattern matches nothing, or everything is frozen.
    """
    rules = [(pattern, True) for pattern in patterns]
    matched = trees.match(rules, names, default=False, what="freeze pattern")
    frozen = {name for name, value in matched.items() if value}
    if frozen and len(frozen) == len(names):
        raise ValueError(
            f"freeze={tuple(patterns)} freezes all {len(names)} parameters, so nothing "
            'would train; leave some out, for example with "(?!head/).*".'
        )
    return frozen


def frozen_modules(frozen: set[str], names: Sequence[str]) -> set[str]:
    """Returns the modules whose parameters are all frozen, like "encoder/block_03"."""
    trained = {
        parent for name in names if name not in frozen for parent in _parents(name)
    }
    return {parent for name in frozen for parent in _parents(name)} - trained


def split(params: Params, frozen: set[str]) -> tuple[dict, dict]:
    """Splits nested parameters into (trained, frozen)."""
    leaves = trees.flatten(params)
    return (
        trees.unflatten({n: x for n, x in leaves.items() if n not in frozen}),
        trees.unflatten({n: x for n, x in leaves.items() if n in frozen}),
    )


def merge(trained: Params, frozen: Params) -> dict:
    """Merges trained and frozen parameters; undoes `split`."""
    return trees.unflatten(trees.flatten(trained) | trees.flatten(frozen))


def variables(state: TrainState, *, averaged: bool = False) -> dict[str, Any]:
    """Returns {name: leaf} of all parameters and batch statistics ("batch_stats/...").

    `averaged` takes the averaged parameters (EMA), if the state has them.
    """
    trained, collections = state.params, state.collections
    if averaged and state.ema is not None:
        trained, collections = with_average(state)
    statistics = {
        name: leaf
        for name, leaf in trees.flatten(collections).items()
        if name.startswith(STATISTICS)
    }
    return trees.flatten(merge(trained, state.frozen)) | statistics


def with_average(state: TrainState) -> tuple[Any, dict[str, Any]]:
    """Returns the averaged parameters and the collections that belong to them.

    Batch statistics are those measured for them or, without, averaged ones.
    """
    found = state.recalibrated or state.ema_statistics or {}
    statistics = {name: x for name, x in found.items() if name == "batch_stats"}
    return state.ema, {**state.collections, **statistics}


def copy_statistics(collections: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the batch statistics, {} without any."""
    statistics = {n: x for n, x in collections.items() if n == "batch_stats"}
    return jax.tree.map(jnp.copy, statistics)


def split_variables(named: Mapping[str, Any]) -> tuple[dict, dict]:
    """Returns nested (parameters, collections) from the {name: leaf} of `variables`."""
    inside = {name for name in named if name.startswith(STATISTICS)}
    return (
        trees.unflatten({n: x for n, x in named.items() if n not in inside}),
        trees.unflatten({n: x for n, x in named.items() if n in inside}),
    )


def make_initializer(
    model: Model,
    batch_spec: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    *,
    freeze: Sequence[str] = (),
    ema: bool = False,
) -> Callable[[Array], TrainState]:
    """Returns `init(key) -> TrainState`, to be traced by `blueprint` and `create`.

    `batch_spec` gives shape and dtype of the batch's arrays.
    """
    # Shapes of parameters do not depend on the number of rows; one is the cheapest.
    example = {
        name: jax.ShapeDtypeStruct((1, *spec.shape[1:]), spec.dtype)
        for name, spec in batch_spec.items()
    }

    def init(key: Array) -> TrainState:
        batch = {name: jnp.zeros(s.shape, s.dtype) for name, s in example.items()}
        # Parameters depend on the key "params" alone, not on the others.
        rngs = {"params": key, **random_keys(model, key, 0)}
        try:
            inputs = model.inputs(batch)
        except KeyError as error:
            raise ValueError(
                f"{type(model).__name__}.inputs asks for {error}, the batch has "
                f"{', '.join(sorted(batch))}: keep it in the ops of data, as "
                "Views(keep_image=True) does, or give the model inputs() of its own."
            ) from error
        variables = dict(model.init(rngs, **inputs, train=False))
        params = variables.pop("params")
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        frozen = frozen_names(freeze, trees.names(params)) if freeze else set()
        trained, kept = split(params, frozen)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=trained,
            frozen=kept,
            collections=variables,
            opt_state=optimizer.init(trained),
            ema=jax.tree.map(jnp.copy, trained) if ema else None,
            ema_statistics=copy_statistics(variables) if ema else None,
        )

    return init


def blueprint(
    initialize: Callable[[Array], TrainState],
    rules: Sequence[sharding.ShardingRule],
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Returns the abstract state (shapes, dtypes, shardings) and computes nothing."""
    # The key is made inside eval_shape, because described devices compute nothing.
    shapes = jax.eval_shape(lambda: initialize(jax.random.key(0)))
    parameters = merge(shapes.params, shapes.frozen)
    places = sharding.shardings(shapes, rules, mesh, parameters=parameters)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place
        ),
        shapes,
        places,
    )


def gradient_shardings(abstract: TrainState) -> Any:
    """Returns the shardings of the complete gradients of the trained parameters.

    A gradient has the sharding of its parameter or, if that is replicated, of the
    optimizer state of the parameter's shape.
    """
    places = {
        name: leaf.sharding for name, leaf in trees.flatten(abstract.params).items()
    }
    shapes = {name: leaf.shape for name, leaf in trees.flatten(abstract.params).items()}
    for name, leaf in trees.flatten(abstract.opt_state).items():
        owner = trees.owner(name, places)
        if owner is not None and leaf.shape == shapes[owner]:
            if places[owner].is_fully_replicated:
                places[owner] = leaf.sharding
    return trees.unflatten(places)


def with_variables(state: TrainState, named: Mapping[str, Any]) -> TrainState:
    """Returns `state` with parameters, their average and batch statistics of `named`.

    `named` has the names of `variables`; the average becomes a copy of the
    parameters. Other collections do not change.
    """

    def put(name: str, leaf: Array) -> Array:
        return jax.device_put(named[name], leaf.sharding)

    def put_statistics(name: str, leaf: Array) -> Array:
        return put(name, leaf) if name.startswith(STATISTICS) else leaf

    trained = trees.map_named(put, state.params)
    collections = trees.map_named(put_statistics, state.collections)
    average = statistics = None
    if state.ema is not None:
        average = jax.tree.map(jnp.copy, trained)
        statistics = copy_statistics(collections)
    return dataclasses.replace(
        state,
        params=trained,
        frozen=trees.map_named(put, state.frozen),
        collections=collections,
        ema=average,
        ema_statistics=statistics,
    )


def create(
    init: Callable[[Array], TrainState], abstract: TrainState, seed: int
) -> TrainState:
    """Initialises the state on its devices, every leaf in the sharding of `abstract`.

    No device ever holds a whole sharded parameter.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def check_same(expected: TrainState, state: TrainState) -> None:
    """Asserts that shapes, dtypes and shardings are as expected: no recompilation."""
    for (name, want), have in zip(
        trees.flatten(expected).items(), jax.tree.leaves(state), strict=True
    ):
        same = want.shape == have.shape and want.dtype == have.dtype
        assert same and have.sharding.is_equivalent_to(want.sharding, have.ndim), (
            f"{name}: expected {trees.describe(want)} {want.sharding}, "
            f"have {trees.describe(have)} {have.sharding}"
        )


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]
