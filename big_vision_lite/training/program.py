"""Builds a recipe's program on a mesh: the abstract state and the train step."""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from big_vision_lite.config import TrainConfig
from big_vision_lite.messages import did_you_mean, some
from big_vision_lite.models.blocks import attention
from big_vision_lite.recipes import mistakes
from big_vision_lite.runtime import cpu, flops
from big_vision_lite.training import recalibration
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.forward import BoundModel, MissingOutput
from big_vision_lite.training.gradient_point import GradientPoint
from big_vision_lite.training.state import TrainState
from big_vision_lite.training.step import call_objective, make_train_step
from big_vision_lite.types import (
    Array,
    Batch,
    DeviceOp,
    Model,
    Objective,
    layers_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A recipe's program: the abstract state, its initialisation and the train step.

    `abstract` has shape, dtype and sharding of every leaf of the state that `fresh()`
    initialises. `spec` describes the global batch; `train_step(state, batch)` donates
    the state. A context that frees the host's memory on exit.
    """

    num_steps: int
    spec: Mapping[str, jax.ShapeDtypeStruct]
    abstract: TrainState
    fresh: Callable[[], TrainState]
    train_step: Any
    flops_per_step: int
    # Adds the batch statistics of averaged parameters on a batch; None if not needed.
    statistics_step: Any | None = None
    # What the model gives the objective: "logits" of a head, "pooled" features, ...
    outputs: tuple[str, ...] = ()
    # What users should know of the program, one line each.
    notes: tuple[str, ...] = ()
    # The train step on a CPU, which keeps its memory between steps.
    steady: cpu.SteadyStep | None = None

    def make_room(self) -> None:
        """Frees the step's host memory, for an evaluation, until the next step."""
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
    """Builds the program by tracing a batch's shapes; computes and compiles nothing.

    With `num_steps` the source is not opened, and the head is assumed to fit its
    classes. `saving()` returns whether threads of this process write a checkpoint.

    Raises:
        ValueError: a rule of the recipe (freeze, sharding, optimizer.rules) matches no
            parameter, or the head does not fit the classes.
    """
    names = None
    if num_steps is None:
        num_steps = config.resolve_steps(len(config.data.source))
        names = tuple(config.data.source.class_names)
    optimizer = config.optimizer.build(num_steps, layers_of(config.model))
    point = GradientPoint.of(config.optimizer, config.ema)
    initialize = state_lib.make_initializer(
        config.model,
        spec,
        optimizer,
        freeze=config.freeze,
        ema=point.average is not None,
    )
    abstract = state_lib.blueprint(initialize, config.sharding, mesh)
    device = mesh.devices.flat[0]
    on_cpu = device.platform == "cpu"
    model = config.model
    if config.deterministic and device.platform in ("gpu", "cuda"):
        # cuDNN's backward pass does not guarantee its order of summation.
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
        point=point,
        num_steps=num_steps,
        compiler_options=cpu.COMPILER_OPTIONS if on_cpu else None,
    )
    steady = cpu.SteadyStep(train_step, mesh, saving) if on_cpu else None
    with attention.calls() as calls:
        counting = CountingForward(model, abstract)
        try:
            used = trace_objective(
                counting, config.objective, spec, config.data.device_ops
            )
            unused = names and "label" in spec and "label" not in used
        except ValueError:
            # If head and classes differ, raise the error that names the options.
            check_head(config, counting.outputs, names)
            raise
    check_head(config, counting.outputs, names)
    return Program(
        num_steps=num_steps,
        spec=spec,
        abstract=abstract,
        fresh=functools.partial(state_lib.create, initialize, abstract, config.seed),
        train_step=steady or train_step,
        statistics_step=_statistics_step(config, point, model, abstract),
        flops_per_step=point.passes * counting.flops,
        outputs=tuple(counting.outputs),
        notes=(
            *config.model.notes(spec),
            *(unused_labels(config, counting.outputs) if unused else ()),
            *(
                ()
                if on_cpu
                else attention.describe(calls, device.platform, device.device_kind)
            ),
        ),
        steady=steady,
    )


def _statistics_step(
    config: TrainConfig, point: GradientPoint, model: Model, abstract: TrainState
) -> Any:
    if point.average is None or not point.average.recalibrate_statistics:
        return None
    if not recalibration.keeps_statistics(model, abstract):
        return None
    return recalibration.make_statistics_step(model, abstract, seed=config.seed)


class CountingForward:
    """A `forward` for objectives that only counts FLOPs and returns shapes.

    `flops` are those of the matrix products and convolutions so far, `outputs` the
    shapes that calls with trained parameters returned. Trained parameters count forward
    and backward, frozen and averaged ones forward. A call counts with the inputs it
    gets, which may be a quarter of the tokens.
    """

    def __init__(self, model: Model, abstract: TrainState):
        self.flops = 0
        self.outputs: dict[str, Any] = {}
        # Not a jax array: described devices compute nothing.
        self.progress: Any = np.zeros((), np.float32)
        self._model = model
        self._abstract = abstract

    def __call__(
        self,
        *,
        method: str | None = None,
        capture: tuple[str, ...] = (),
        params: str = "online",
        statistics: str = "running",
        **inputs: Any,
    ) -> dict[str, Any]:
        state = self._abstract
        trained = params == "online"
        leaves, tree = jax.tree.flatten(inputs)
        places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]
        arrays = [leaves[i] for i in places]

        def call(parameters: Any, frozen: Any, collections: Any, arrays: Any) -> Any:
            known = dict(zip(places, arrays, strict=True))
            given = [known.get(i, leaf) for i, leaf in enumerate(leaves)]
            merged = state_lib.merge(parameters, frozen)
            forward = BoundModel(
                self._model,
                merged,
                collections,
                rng=jax.random.key(0),
                train=trained,
                ema=None if state.ema is None else merged,
            )
            return forward(
                method=method,
                capture=capture,
                params=params,
                statistics=statistics,
                **jax.tree.unflatten(tree, given),
            )

        groups = (state.params, state.frozen, state.collections, arrays)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), groups)
        jaxpr, outputs = jax.make_jaxpr(call, return_shape=True)(*shapes)
        first = flops.Kind.TRAINED if trained else flops.Kind.FIXED
        kinds = (first, flops.Kind.FIXED, flops.Kind.FIXED, flops.Kind.DATA)
        named = [
            kind
            for kind, group in zip(kinds, shapes, strict=True)
            for _ in jax.tree.leaves(group)
        ]
        self.flops += flops.count_training(jaxpr.jaxpr, named)
        if trained:
            self.outputs |= outputs
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)


def trace_objective(
    forward: CountingForward,
    objective: Objective,
    spec: Mapping[str, Any],
    device_ops: Sequence[DeviceOp] = (),
) -> set[str]:
    """Traces the objective on a batch's shapes; `forward` counts and keeps shapes.

    Returns the keys of the batch that its losses or metrics depend on.

    Raises:
        ValueError: the objective needs a key that the batch lacks, or does not return
            one loss per example.
    """

    def run(batch: Batch, rng: Array) -> Any:
        for op in device_ops:
            batch = op(batch, rng)
        try:
            return call_objective(objective, forward, batch, rng)
        except MissingOutput as error:
            raise ValueError(f"{type(objective).__name__}: {error}") from error
        except KeyError as error:
            if error.args[0] in batch or not isinstance(error.args[0], str):
                raise
            raise ValueError(
                f"{type(objective).__name__} asks for {error}, which the batch "
                f"({some(sorted(batch))}) has not.{did_you_mean(error.args[0], batch)} "
                "Give it by the source and the ops of data, or use another objective."
            ) from error

    shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in spec.items()}
    jaxpr = jax.make_jaxpr(run)(shapes, jax.eval_shape(lambda: jax.random.key(0)))
    inputs = zip(sorted(shapes), jaxpr.jaxpr.invars, strict=False)
    return {name for name, variable in inputs if _reaches(jaxpr.jaxpr, variable)}


def _reaches(jaxpr: core.Jaxpr, variable: Any) -> bool:
    """Returns whether an output of `jaxpr` may depend on `variable`."""
    reached = {variable}
    for equation in jaxpr.eqns:
        if any(
            not isinstance(x, core.Literal) and x in reached for x in equation.invars
        ):
            reached.update(equation.outvars)
    return any(not isinstance(x, core.Literal) and x in reached for x in jaxpr.outvars)


def unused_labels(config: TrainConfig, outputs: Mapping[str, Any]) -> list[str]:
    """Returns a sentence on labels that the objective does not use."""
    # With logits the classes of the data are those of the head.
    if "logits" in outputs:
        return []
    ways = {"label_key": "none", "labels": "false"}
    there = [name for name in ways if hasattr(config.data.source, name)]
    flags = [f"--config.data.source.{name}={ways[name]}" for name in there]
    leave_out = f"; {flags[0]} leaves them out" if flags else ""
    return [
        f"labels of data.source are read but {type(config.objective).__name__} does "
        f"not use them{leave_out}."
    ]


def check_head(
    config: TrainConfig,
    outputs: Mapping[str, Any],
    names: tuple[str, ...] | None,
) -> None:
    """Checks that the head has one output for every class of the data.

    A label without an output would train like an image without a label. If the class
    `names` are unknown (None), only the labels must fit the head.

    Raises:
        ValueError: head, labels and data differ; the message names options to change.
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
        # None: a mixture of images alone.
        and value not in (None, classes)
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
