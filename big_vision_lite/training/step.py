"""The train step and the eval step, written as if there were one device."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vision_lite import trees
from big_vision_lite.runtime import layout, sharding
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.accumulation import accumulate_gradients
from big_vision_lite.training.forward import BoundModel, progress_of
from big_vision_lite.training.gradient_point import GradientPoint
from big_vision_lite.training.state import TrainState
from big_vision_lite.types import (
    Array,
    Batch,
    DeviceOp,
    Forward,
    Model,
    Objective,
    backbone_of,
)

# Folded into the seed's key in place of a step: evaluation shares no key with any.
EVALUATION = 2**31 - 1


def make_train_step(
    model: Model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    abstract: TrainState,
    *,
    seed: int = 0,
    device_ops: Sequence[DeviceOp] = (),
    micro_batches: int = 1,
    point: GradientPoint | None = None,
    num_steps: int | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Any:
    """Returns the jitted `train_step(state, batch) -> (state, metrics)`.

    The state is donated. `point` is where gradients are taken, by default at the
    parameters. `num_steps`, the length of the run, serves `forward.progress` and an
    average whose decay grows. `metrics` are scalars of this step: the means of the
    objective's metrics, "loss", "gradient_norm" (before clipping) and "finite". If loss
    or gradient is not finite, the step changes only the step counter, which leaves the
    state for inspection.

    Raises:
        ValueError: micro-batches with batch statistics, or with an objective that needs
            the whole batch; at the first step, an objective that does not return one
            loss per example.
    """
    at = point or GradientPoint()
    frozen_names = set(trees.names(abstract.frozen))
    named = [*trees.names(abstract.params), *frozen_names]
    modules = frozenset(state_lib.frozen_modules(frozen_names, named))

    def loss_of(
        params: Any,
        frozen: Any,
        collections: Any,
        averages: Any,
        batch: Any,
        rng: Any,
        progress: Any,
    ) -> Any:
        average, statistics = averages
        forward = BoundModel(
            model,
            state_lib.merge(params, frozen),
            collections,
            rng=jax.random.fold_in(rng, 0),
            train=True,
            progress=progress,
            ema=None if average is None else state_lib.merge(average, frozen),
            ema_statistics=statistics,
            frozen_modules=modules,
        )
        key = jax.random.fold_in(rng, 1)
        losses, metrics = call_objective(objective, forward, batch, key)
        metrics = {n: jnp.broadcast_to(x, losses.shape) for n, x in metrics.items()}
        sums = {name: weighted_sum(x, batch) for name, x in metrics.items()}
        sums["loss"] = weighted_sum(losses, batch)
        weight = weighted_sum(jnp.ones(losses.shape[:1]), batch)
        # A micro-batch of padding alone has weight 0 and must give 0, not NaN.
        mean = sums["loss"] / jnp.maximum(weight, 1)
        return mean, (sums, weight, forward.collections)

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    places = state_lib.gradient_shardings(abstract)

    part, pretrained = backbone_of(model)
    read_only = {"batch_stats"} if pretrained.statistics == "frozen" else set()
    keeps = [name for name in abstract.collections if name not in read_only]
    if micro_batches > 1 and keeps:
        option = ".".join(("config", "model", *(part.split("/") if part else ())))
        frozen = f", or for fine-tuning --{option}.statistics=frozen"
        raise ValueError(
            f"micro_batches={micro_batches} with a model that keeps "
            f"{', '.join(keeps)}: batch statistics of a part are not those of the "
            "batch. Use --config.micro_batches=1"
            f"{frozen if keeps == ['batch_stats'] else ''}."
        )
    if micro_batches > 1 and objective.needs_whole_batch:
        raise ValueError(
            f"micro_batches={micro_batches} with {type(objective).__name__}, which "
            "compares the examples of the whole batch: a part holds other pairs. Use "
            "--config.micro_batches=1, and more devices or a smaller "
            "--config.data.batch_size if memory is short."
        )

    def whole_batch(params: Any, *others: Any) -> Any:
        (_, (sums, weight, collections)), gradients = gradient(params, *others)
        gradients = jax.tree.map(layout.pin_like, gradients, places)
        return gradients, sums, weight, collections

    accumulate = accumulate_gradients(loss_of, mesh, abstract, places, micro_batches)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        for index, op in enumerate(device_ops):
            batch = op(batch, jax.random.fold_in(rng, 2 + index))
        compute = whole_batch if micro_batches == 1 else accumulate
        progress = progress_of(state.step, num_steps)
        averages = (state.ema, state.ema_statistics)
        where = at.interpolated(state.params, state.ema)
        others = (state.frozen, state.collections, averages, batch, rng, progress)
        gradients, sums, weight, collections = compute(where, *others)
        if at.radius:
            # What the second pass says of the batch is not that of the parameters.
            gradients, *_ = compute(at.ascended(where, gradients), *others)
        metrics = {name: total / weight for name, total in sums.items()}
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, where)
        params = optax.apply_updates(state.params, updates)
        average, statistics = state.ema, state.ema_statistics
        if average is not None:
            decay = at.decay(opt_state, progress)
            average = jax.tree.map(
                lambda old, new: decay * old + (1 - decay) * new, average, params
            )
            # As a difference: frozen statistics must not drift by rounding.
            statistics = jax.tree.map(
                lambda old, new: old + (1 - decay) * (new - old),
                statistics,
                {name: collections[name] for name in statistics},
            )
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        stepped = dataclasses.replace(
            state,
            params=params,
            opt_state=opt_state,
            collections=collections,
            ema=average,
            ema_statistics=statistics,
        )
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), stepped, state
        )
        metrics["finite"] = finite
        return dataclasses.replace(kept, step=state.step + 1), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, layout.batch_sharding(mesh)),
        out_shardings=(shardings, layout.replicated(mesh)),
        compiler_options=sharding.compiler_options(mesh) | (compiler_options or {}),
    )


def make_eval_step(
    model: Model,
    function: Callable[[Forward, Batch, Array], Any],
    *,
    seed: int = 0,
    num_steps: int | None = None,
    part: str = "",
) -> Callable[..., Any]:
    """Returns `function(forward, batch, rng)` jitted: `step(state, batch, ordinal=0)`.

    The model is in evaluation mode, with the averaged parameters if the state has them.
    Random keys depend only on the seed and the `ordinal` of the batch in its set.
    `part` is the path of `model` in the state's model, "" for all of it.
    """

    def eval_step(state: TrainState, batch: Batch, ordinal: Any = 0) -> Any:
        params, collections = state.params, state.collections
        if state.ema is not None:
            params, collections = state_lib.with_average(state)
        rng = jax.random.fold_in(jax.random.key(seed), EVALUATION)
        rng = jax.random.fold_in(rng, jnp.asarray(ordinal, jnp.int32))
        merged = trees.part(state_lib.merge(params, state.frozen), part)
        forward = BoundModel(
            model,
            merged,
            {name: trees.part(x, part) for name, x in collections.items()},
            rng=jax.random.fold_in(rng, 0),
            progress=progress_of(state.step, num_steps),
            ema=None if state.ema is None else merged,
        )
        return function(forward, batch, jax.random.fold_in(rng, 1))

    return jax.jit(eval_step)


# Metric names that records already use.
RESERVED = ("loss", "gradient_norm", "finite", "examples", "unreadable")


def call_objective(
    objective: Objective, forward: Forward, batch: Batch, rng: Array
) -> tuple[Array, dict[str, Array]]:
    """Calls the objective; returns losses [B] and metrics, [B] or [] each.

    Raises:
        ValueError: the objective returned other types or shapes, or a reserved metric
            name; the message says what came and how to correct it.
    """
    returned: Any = objective(forward, batch, rng)
    rows = len(jax.tree.leaves(dict(batch))[0])
    name = type(objective).__name__
    pair = isinstance(returned, tuple) and len(returned) == 2
    if not pair or not isinstance(returned[1], Mapping):
        kinds = type(returned).__name__
        if isinstance(returned, tuple):
            kinds = f"({', '.join(type(part).__name__ for part in returned)})"
        raise ValueError(
            f"{name} returned {kinds}; return losses and metrics, (losses, {{}}) where "
            "there are none."
        )
    losses, metrics = returned
    taken = [key for key in metrics if key in RESERVED]
    if taken:
        raise ValueError(
            f'{name} returned a metric named "{taken[0]}", which records have of their '
            "own; give it another name."
        )
    if jnp.shape(losses) != (rows,):
        raise ValueError(
            f"{name} returned losses of shape {jnp.shape(losses)} for a batch of {rows}"
            f" examples; the program takes the mean itself, so return one value an "
            f"example, ({rows},): sum or average over all axes but the first, "
            f"losses.reshape({rows}, -1).mean(axis=1)."
        )
    for key, value in metrics.items():
        if jnp.shape(value) not in ((rows,), ()):
            raise ValueError(
                f'{name} returned metric "{key}" of shape {jnp.shape(value)} for a '
                f"batch of {rows} examples; return one value an example, ({rows},), or "
                "a number of the whole batch, ()."
            )
    return losses, {key: jnp.asarray(value) for key, value in metrics.items()}


def weighted_sum(values: Array, batch: Batch) -> Array:
    """Sums values [B], one per example, in float32, without rows that are not valid."""
    values = values.astype(jnp.float32)
    if "valid" in batch:
        values = jnp.where(batch["valid"], values, 0)
    return values.sum()
