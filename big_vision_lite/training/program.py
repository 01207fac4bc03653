"""What a recipe becomes on a mesh: the state's blueprint and the compiled step."""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import jax

from big_vision_lite.config import TrainConfig
from big_vision_lite.models.blocks import attention
from big_vision_lite.recipes import mistakes
from big_vision_lite.runtime import cpu, flops
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.state import TrainState
from big_vision_lite.training.step import make_train_step
from big_vision_lite.types import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """`abstract` has shape, dtype and sharding of every leaf; `fresh()` initialises.

    `spec` describes the global batch, `train_step(state, batch)` donates the state.
    Used as a context, at whose end the host's memory is free again.
    """

    num_steps: int
    spec: Mapping[str, jax.ShapeDtypeStruct]
    abstract: TrainState
    fresh: Callable[[], TrainState]
    train_step: Any
    flops_per_step: int
    # What a user of an accelerator should know of the program, a line each.
    notes: tuple[str, ...] = ()
    # The train step where a CPU computes it and its memory is kept.
    steady: cpu.SteadyStep | None = None

    def make_room(self) -> None:
        """Leaves the host's memory to others, an evaluation, until the next step."""
        if self.steady is not None:
            self.steady.give_back()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.steady is not None:
            self.steady.close()


def build(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    spec: Mapping[str, Any],
    *,
    num_steps: int | None = None,
    saving: Callable[[], bool] | None = None,
) -> Program:
    """Traces the model on the shapes of a batch; computes and compiles nothing yet.

    With `num_steps` the source is not opened: its classes are taken to be those of the
    head. `saving()` says whether a checkpoint is being written, by threads of this
    process.

    Raises:
        ValueError: a rule of the recipe (freeze, sharding, optimizer.rules) fits no
            parameter, or the head does not fit the classes.
    """
    names = None
    if num_steps is None:
        num_steps = config.resolve_steps(len(config.data.source))
        names = tuple(config.data.source.class_names)
    optimizer = config.optimizer.build(num_steps)
    initialize = state_lib.make_initializer(
        config.model,
        spec,
        optimizer,
        freeze=config.freeze,
        ema=config.ema is not None,
    )
    abstract = state_lib.blueprint(initialize, config.sharding, mesh)
    device = mesh.devices.flat[0]
    on_cpu = device.platform == "cpu"
    model = config.model
    if config.deterministic and device.platform in ("gpu", "cuda"):
        # Nobody promises that cuDNN's backward pass adds up in the same order.
        model = attention.without_fused(model)
    train_step = make_train_step(
        model,
        config.objective,
        optimizer,
        mesh,
        abstract,
        seed=config.seed,
        device_ops=config.data.device_ops,
        micro_batches=config.micro_batches,
        ema=config.ema,
        compiler_options=cpu.COMPILER_OPTIONS if on_cpu else None,
    )
    steady = cpu.SteadyStep(train_step, mesh, saving) if on_cpu else None
    with attention.calls() as calls:
        outline = trace_forward(model, abstract, spec)
    check_head(config, outline.outputs, names)
    return Program(
        num_steps=num_steps,
        spec=spec,
        abstract=abstract,
        fresh=functools.partial(state_lib.create, initialize, abstract, config.seed),
        train_step=steady or train_step,
        # Gradients with respect to inputs and to weights cost as much as forward, each.
        flops_per_step=3 * config.data.batch_size * outline.flops,
        notes=()
        if on_cpu
        else tuple(attention.describe(calls, device.platform, device.device_kind)),
        steady=steady,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outline:
    """What the model does with one image: the shapes it gives, what they cost."""

    outputs: Mapping[str, Any]
    flops: int


def trace_forward(
    model: Model, abstract: TrainState, spec: Mapping[str, Any]
) -> Outline:
    """Returns the model's outputs, and its matmul and convolution FLOPs forward."""
    one = {
        name: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in spec.items()
    }
    params = state_lib.merge(abstract.params, abstract.frozen)

    def forward(params: Any, collections: Any, batch: Any) -> Any:
        variables = {"params": params, **collections}
        return model.apply(variables, **model.inputs(batch), train=False)

    traced = jax.make_jaxpr(forward, return_shape=True)
    jaxpr, outputs = traced(params, abstract.collections, one)
    return Outline(outputs=outputs, flops=flops.count_jaxpr(jaxpr.jaxpr))


def check_head(
    config: TrainConfig,
    outputs: Mapping[str, Any],
    names: tuple[str, ...] | None,
) -> None:
    """Refuses a head that has not one output for every class of the data.

    A label that no output stands for would train as an image without a label. Where
    nobody knows the `names` of the classes, the labels need fit the head only.

    Raises:
        ValueError: says which options are to be changed.
    """
    logits = outputs.get("logits")
    if logits is None or names == ():
        return
    width = logits.shape[-1]
    classes = width if names is None else len(names)
    wrong = {
        path: value
        for path, value, _ in mistakes.list_leaves(config)
        if path.endswith("num_classes")
        and value != classes
        and (value == width or path.startswith("data.device_ops["))
    }
    if width == classes and not wrong:
        return
    shown = "as many as the head has outputs"
    if names is not None:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    found = [f"{width} logits", *(f"{path}={value}" for path, value in wrong.items())]
    options = [shlex.quote(f"--config.{path}={classes}") for path in wrong]
    raise ValueError(
        f"data.source has {classes} classes ({shown}), the model and its labels "
        f"have {', '.join(found)}; every class needs one logit. Use "
        f"{' '.join(options) or f'a head of {classes} outputs'}, or the recipe's "
        "own argument for the number of classes, if it takes one."
    )
