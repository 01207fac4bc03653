"""The train step and the eval step, written as if there were one device."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vision_lite import trees
from big_vision_lite.runtime import layout, sharding
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.accumulation import accumulate_gradients
from big_vision_lite.training.forward import BoundModel
from big_vision_lite.training.state import TrainState
from big_vision_lite.types import Array, Batch, DeviceOp, Forward, Model, Objective


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
    ema: float | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Any:
    """Returns the jitted `train_step(state, batch) -> (state, metrics)`.

    The state is donated. `metrics` are scalars of this step: the objective's means,
    "loss", "gradient_norm" (before clipping) and "finite". A step whose loss or
    gradient is not finite leaves everything but the counter as it was, so that what
    went wrong can still be looked at.

    Raises:
        ValueError: micro-batches with batch statistics, or with an objective that needs
            the whole batch.
    """
    frozen_names = set(trees.names(abstract.frozen))
    named = [*trees.names(abstract.params), *frozen_names]
    modules = frozenset(state_lib.frozen_modules(frozen_names, named))

    def loss_of(params: Any, frozen: Any, collections: Any, ema: Any, batch: Any, rng):
        forward = BoundModel(
            model,
            state_lib.merge(params, frozen),
            collections,
            rng=jax.random.fold_in(rng, 0),
            ema=None if ema is None else state_lib.merge(ema, frozen),
            frozen_modules=modules,
        )
        losses, metrics = objective(forward, batch, jax.random.fold_in(rng, 1))
        sums = {name: weighted_sum(x, batch) for name, x in metrics.items()}
        sums["loss"] = weighted_sum(losses, batch)
        weight = weighted_sum(jnp.ones(losses.shape[:1]), batch)
        # A micro-batch of padding alone has weight 0 and must give 0, not NaN.
        mean = sums["loss"] / jnp.maximum(weight, 1)
        return mean, (sums, weight, forward.collections)

    gradient = jax.value_and_grad(loss_of, has_aux=True)
    places = state_lib.gradient_shardings(abstract)

    keeps = jax.tree.leaves(abstract.collections)
    if micro_batches > 1 and keeps and getattr(model, "statistics", None) != "frozen":
        raise ValueError(
            f"micro_batches={micro_batches} with a model that keeps "
            f"{', '.join(abstract.collections)}: batch statistics of a part are not "
            "those of the batch. Use --config.micro_batches=1, or for fine-tuning "
            "--config.model.statistics=frozen."
        )
    if micro_batches > 1 and getattr(objective, "needs_whole_batch", False):
        raise ValueError(
            f"micro_batches={micro_batches} with {type(objective).__name__}, which "
            "compares the examples of the whole batch: a part holds other pairs. Use "
            "--config.micro_batches=1, and more devices or a smaller "
            "--config.data.batch_size if memory is short."
        )

    def whole_batch(
        params: Any, frozen: Any, collections: Any, ema: Any, batch: Batch, rng: Array
    ) -> Any:
        (_, (sums, weight, collections)), gradients = gradient(
            params, frozen, collections, ema, batch, rng
        )
        gradients = jax.tree.map(layout.pin_like, gradients, places)
        return gradients, sums, weight, collections

    accumulate = accumulate_gradients(loss_of, mesh, abstract, places, micro_batches)
    decay = 0.0 if ema is None else ema

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        for index, op in enumerate(device_ops):
            batch = op(batch, jax.random.fold_in(rng, 2 + index))
        compute = whole_batch if micro_batches == 1 else accumulate
        gradients, sums, weight, collections = compute(
            state.params, state.frozen, state.collections, state.ema, batch, rng
        )
        metrics = {name: total / weight for name, total in sums.items()}
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.ema
        if average is not None:
            average = jax.tree.map(
                lambda old, new: decay * old + (1 - decay) * new, average, params
            )
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        stepped = dataclasses.replace(
            state,
            params=params,
            opt_state=opt_state,
            collections=collections,
            ema=average,
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
    model: Model, function: Callable[[Forward, Batch], Any]
) -> Callable[[TrainState, Batch], Any]:
    """Jits `function(forward, batch)` with the state's parameters in evaluation mode.

    The averaged parameters are used when the state has them.
    """

    def eval_step(state: TrainState, batch: Batch) -> Any:
        params = state.params if state.ema is None else state.ema
        merged = state_lib.merge(params, state.frozen)
        return function(BoundModel(model, merged, state.collections), batch)

    return jax.jit(eval_step)


def weighted_sum(values: Array, batch: Batch) -> Array:
    """Sums one value an example [B] in float32, leaving out rows that are not valid."""
    values = values.astype(jnp.float32)
    if "valid" in batch:
        values = jnp.where(batch["valid"], values, 0)
    return values.sum()
