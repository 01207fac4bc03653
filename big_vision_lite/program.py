"""What a recipe becomes on a mesh: the state's blueprint and the compiled step."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from big_vision_lite import flops
from big_vision_lite import state as state_lib
from big_vision_lite.config import TrainConfig
from big_vision_lite.state import TrainState
from big_vision_lite.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """`abstract` has shape, dtype and sharding of every leaf; `fresh()` initialises.

    `spec` describes the global batch, `train_step(state, batch)` donates the state.
    """

    num_steps: int
    spec: Mapping[str, jax.ShapeDtypeStruct]
    abstract: TrainState
    fresh: Callable[[], TrainState]
    train_step: Any
    flops_per_step: int


def build(
    config: TrainConfig, mesh: jax.sharding.Mesh, spec: Mapping[str, Any]
) -> Program:
    """Traces the model on the shapes of a batch; computes and compiles nothing yet.

    Raises:
        ValueError: a rule of the recipe (freeze, sharding, optimizer.rules) fits no
            parameter.
    """
    num_steps = config.resolve_steps(len(config.data.source))
    optimizer = config.optimizer.build(num_steps)
    initialize = state_lib.make_initializer(
        config.model,
        spec,
        optimizer,
        freeze=config.freeze,
        ema=config.ema is not None,
    )
    abstract = state_lib.blueprint(initialize, config.sharding, mesh)
    train_step = make_train_step(
        config.model,
        config.objective,
        optimizer,
        mesh,
        abstract,
        seed=config.seed,
        device_ops=config.data.device_ops,
        micro_batches=config.micro_batches,
        ema=config.ema,
    )
    # Gradients with respect to inputs and to weights cost as much as forward, each.
    forward = forward_flops(config, abstract, spec)
    return Program(
        num_steps=num_steps,
        spec=spec,
        abstract=abstract,
        fresh=functools.partial(state_lib.create, initialize, abstract, config.seed),
        train_step=train_step,
        flops_per_step=3 * config.data.batch_size * forward,
    )


def forward_flops(
    config: TrainConfig, abstract: TrainState, spec: Mapping[str, Any]
) -> int:
    """Returns the model's matmul and convolution FLOPs forward, for one image."""
    one = {
        name: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in spec.items()
    }
    params = state_lib.merge(abstract.params, abstract.frozen)

    def forward(params: Any, collections: Any, batch: Any) -> Any:
        variables = {"params": params, **collections}
        return config.model.apply(variables, **config.model.inputs(batch), train=False)

    return flops.count(forward, params, abstract.collections, one)
