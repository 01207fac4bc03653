"""Measures batch statistics anew for averaged parameters, on training batches.

Running statistics follow the parameters of each step. Averaged parameters (EMA) give
other activations, so that even averaged running statistics do not fit them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from big_vision_lite import trees
from big_vision_lite.models.blocks.batch_norm import BatchNorm
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.forward import BoundModel
from big_vision_lite.training.state import TrainState
from big_vision_lite.types import Array, Batch, Model, backbone_of

# Folded into the seed's key in place of a step: it shares no key with any.
RECALIBRATION = 2**31 - 2
# Names of the mean that belongs to a variance: ours and those of Flax.
MEANS = {"variance": "mean", "var": "mean"}


@struct.dataclass
class Totals:
    """Sums over `batches`: the average of every statistic, and of its squared spread.

    The spread is that of a statistic over the batches, not of the values in a batch.
    """

    batches: Any
    average: Any
    spread: Any


def keeps_statistics(model: Model, abstract: TrainState) -> bool:
    """Returns whether training changes batch statistics of the model."""
    frozen = backbone_of(model)[1].statistics == "frozen"
    return "batch_stats" in abstract.collections and not frozen


def start(abstract: TrainState) -> Totals:
    """Returns the totals of no batch."""
    statistics = abstract.collections["batch_stats"]
    shapes = Totals(batches=abstract.step, average=statistics, spread=statistics)
    zeros = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
    )
    return zeros()


def make_statistics_step(
    model: Model, abstract: TrainState, *, seed: int = 0
) -> Callable[[TrainState, Batch, Totals], Totals]:
    """Returns the jitted `step(state, batch, totals)`, which adds a batch's statistics.

    The model runs with the averaged parameters and in training mode, on what
    `model.inputs` takes of the batch; frozen modules stay in evaluation mode. The state
    does not change.
    """
    frozen = set(trees.names(abstract.frozen))
    named = [*trees.names(abstract.params), *frozen]
    modules = frozenset(state_lib.frozen_modules(frozen, named))

    def step(state: TrainState, batch: Batch, totals: Totals) -> Totals:
        rng = jax.random.fold_in(jax.random.key(seed), RECALIBRATION)
        for number in (state.step, totals.batches):
            rng = jax.random.fold_in(rng, number)
        params, collections = state_lib.with_average(state)
        forward = BoundModel(
            model,
            state_lib.merge(params, state.frozen),
            collections,
            rng=rng,
            train=True,
            frozen_modules=modules,
        )
        with nn.intercept_methods(_without_memory):
            forward(**model.inputs(batch))
        count = totals.batches + 1
        found = forward.collections["batch_stats"]
        change = jax.tree.map(jnp.subtract, found, totals.average)
        average = jax.tree.map(lambda a, d: a + d / count, totals.average, change)
        spread = jax.tree.map(
            lambda s, d, x, a: s + d * (x - a), totals.spread, change, found, average
        )
        return Totals(batches=count, average=average, spread=spread)

    return jax.jit(step, donate_argnums=2)


def measured(totals: Totals) -> dict[str, Any]:
    """Returns {"batches": count, "batch_stats": statistics} of all batches together.

    The variance of all values is the mean of the batches' variances and the variance of
    their means (arXiv:2105.07576, section 3).
    """
    spread = trees.flatten(totals.spread)

    def whole(name: str, average: Array) -> Array:
        module, _, leaf = name.rpartition("/")
        mean = f"{module}/{MEANS[leaf]}" if leaf in MEANS else None
        return average + spread[mean] / totals.batches if mean in spread else average

    statistics = trees.map_named(whole, totals.average)
    return {"batches": totals.batches, "batch_stats": statistics}


def not_measured(state: TrainState) -> dict[str, Any]:
    """Returns the averaged running statistics, with "batches" 0."""
    return {
        "batches": jnp.zeros_like(state.step),
        "batch_stats": state.ema_statistics["batch_stats"],
    }


def describe(state: TrainState) -> str | None:
    """Says which batch statistics averaged parameters are used with; None without."""
    if state.ema is None or state.recalibrated is None:
        return None
    batches = int(state.recalibrated["batches"])
    if not batches:
        return "averaged parameters with averaged running statistics"
    return f"averaged parameters with statistics of {batches} training batches"


def saved(abstract: TrainState) -> TrainState:
    """Returns what a checkpoint holds of a state: with the statistics of its average.

    They are no part of the state that trains, which depends on no save or evaluation.
    """
    if not abstract.ema_statistics:
        return abstract
    return dataclasses.replace(
        abstract,
        recalibrated={"batches": abstract.step, **abstract.ema_statistics},
    )


def _without_memory(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Makes the running statistics those of the batch alone."""
    if isinstance(context.module, nn.BatchNorm | BatchNorm):
        # A module lives for one call, so this is local.
        object.__setattr__(context.module, "momentum", 0.0)
    return call(*args, **kwargs)
