"""Estimates memory and time of a recipe's train step on a machine, from shapes.

Nothing runs and no data is opened: the step is compiled for present or described
devices, and the compiled program is read. Times are estimates, and are labelled so.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from big_vision_lite import trees
from big_vision_lite.config import TrainConfig
from big_vision_lite.data import pipeline, unopened
from big_vision_lite.runtime import compiled, kernels, layout, sharding, targets
from big_vision_lite.runtime.compiled import Figures
from big_vision_lite.runtime.targets import Target
from big_vision_lite.training import program
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.program import Program

# Assumed speed of writing a checkpoint, in bytes per second.
DISK = 1e9
# Length of schedules if the number of examples is unknown.
UNKNOWN_STEPS = 100_000
# Bytes that XLA:TPU adds after placing the arrays, for code and collectives: 90 to 200
# MB for ViTs of 1 to 12 blocks.
ADDED_LATER = 200_000_000
_SIZE = r"([\d.]+)([KMGT]?)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimate of a recipe on a machine, as plain values for a table or JSON.

    Bytes, FLOPs and seconds are per device and step; `model_flops`, `checkpoint_bytes`
    and `images_per_second` are over all devices. `memory` is the peak by kind. If the
    compiler refuses, `fits` is False and only values known without it are set. Unknown
    values are None.
    """

    target: str
    mesh: dict[str, int]
    fits: bool
    memory: dict[str, int]
    memory_needed: int
    memory_there: float | None
    parameters: int
    trained: int
    batch: dict[str, str]
    model_flops: int
    checkpoint_bytes: int
    compile_seconds: float
    bytes_moved: int | None = None
    flops: int | None = None
    cycles: int | None = None
    kernels: int | None = None
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    step_seconds: float | None = None
    link_seconds: float | None = None
    bound_seconds: float | None = None
    images_per_second: float | None = None
    mfu: float | None = None
    top: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def outline(
    config: TrainConfig, mesh: jax.sharding.Mesh, num_steps: int | None = None
) -> Program:
    """Builds the recipe's program from shapes; opens no source.

    Raises:
        ValueError: the batch does not divide over the mesh, or the recipe's parts do
            not fit each other.
    """
    size = config.data.batch_size
    layout.check_batch_size(size, mesh, config.micro_batches)
    rows = unopened.rows(config.data.ops, config.preprocess, config.data.source)
    spec = pipeline.spec_of(rows, size, layout.batch_sharding(mesh))
    return program.build(
        config, mesh, spec, num_steps=num_steps or config.num_steps or UNKNOWN_STEPS
    )


def on_target(
    config: TrainConfig,
    target: Target,
    num_steps: int | None = None,
    *,
    dump: str = "",
    first: Callable[[Estimate], None] = lambda known: None,
) -> Estimate:
    """Returns the estimate of the step, compiled for a real or described machine.

    `first` is called with the values known before compiling. XLA:TPU dumps its HLO and
    memory reports into the folder `dump`, if given.

    Raises:
        ValueError: there is no such machine, or the recipe does not fit its devices.
    """
    mesh = sharding.make_mesh(config.mesh, target.describe())
    with jax.set_mesh(mesh), targets.lowering_without_gpu(target):
        built = outline(config, mesh, num_steps)
        first(_known_without_compiling(built, mesh, target, 0))
        return of_program(built, mesh, target, dump=dump)


def of_program(
    built: Program, mesh: jax.sharding.Mesh, target: Target, *, dump: str = ""
) -> Estimate:
    """Returns the estimate of a program, compiled for the devices of its mesh.

    Raises:
        jax.errors.JaxRuntimeError: the compiler failed for a reason other than memory.
    """
    start = time.perf_counter()
    traced = built.train_step.trace(built.abstract, dict(built.spec))
    lowered = traced.lower()
    options = target.compiler_options
    if dump and target.kind == "tpu":
        options |= {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
    try:
        step = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        needed = refused_bytes(str(error))
        if needed is None:
            raise
        found = _known_without_compiling(built, mesh, target, needed)
        spent = time.perf_counter() - start
        return dataclasses.replace(found, fits=False, compile_seconds=spent)
    pallas = kernels.pallas_kernels(traced.jaxpr.jaxpr)
    figures = compiled.read(step, target.chip, pallas)
    memory = figures.memory
    found = _known_without_compiling(built, mesh, target, memory.total)
    placed = {
        "activations and gradients": memory.temporaries,
        "program": memory.code,
    }
    return dataclasses.replace(
        found,
        compile_seconds=time.perf_counter() - start,
        memory=found.memory | placed,
        bytes_moved=figures.bytes_moved,
        flops=figures.flops,
        cycles=figures.cycles,
        kernels=figures.launches,
        collectives={
            kind: dataclasses.asdict(sums) for kind, sums in figures.collectives.items()
        },
        top=compiled.top(figures, target.chip),
        **_times(built, figures, target, mesh.size),
    )


def refused_bytes(message: str) -> int | None:
    """Returns the bytes that a compiler's memory error names; None for other errors."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in (rf"Used {_SIZE} of", rf"temporaries \({_SIZE}\)", rf"{_SIZE}i?B? "):
        if found := re.search(pattern, message):
            power = " KMGT".index(found[2] or " ")
            return int(float(found[1]) * 1024**power)
    return 0


def add_reported(known: Estimate, report: str) -> Estimate:
    """Returns an estimate with the memory that XLA:TPU reports before its code."""
    found = re.search(r"\(color=0\)\nTotal bytes: (\d+)", report)
    needed = int(found[1]) if found else 0
    there = known.memory_there
    total = needed + ADDED_LATER
    placed = {
        "activations and gradients": max(0, needed - sum(known.memory.values())),
        "program": ADDED_LATER,
    }
    return dataclasses.replace(
        known,
        fits=there is None or total <= there,
        memory=known.memory | placed,
        memory_needed=total,
    )


def shard_bytes(tree: Any) -> int:
    """Returns the bytes per device of a tree of shapes with shardings."""
    return sum(
        _bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )


def whole_bytes(tree: Any) -> int:
    """Returns the bytes of a tree of shapes, each array counted once."""
    return sum(_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def _known_without_compiling(
    built: Program, mesh: jax.sharding.Mesh, target: Target, needed: int
) -> Estimate:
    abstract = built.abstract
    parameters = trees.flatten(state_lib.merge(abstract.params, abstract.frozen))
    there = target.memory
    return Estimate(
        target=target.name,
        mesh=dict(mesh.shape),
        fits=there is None or needed <= there,
        memory={
            "parameters": shard_bytes((abstract.params, abstract.frozen)),
            "optimizer": shard_bytes(abstract.opt_state),
            "averages and statistics": shard_bytes(
                (abstract.ema, abstract.ema_statistics, abstract.collections)
            ),
            "batch": shard_bytes(dict(built.spec)),
        },
        memory_needed=needed,
        memory_there=there,
        parameters=sum(leaf.size for leaf in parameters.values()),
        trained=sum(leaf.size for leaf in jax.tree.leaves(abstract.params)),
        batch={name: trees.describe(leaf) for name, leaf in built.spec.items()},
        model_flops=built.flops_per_step,
        checkpoint_bytes=whole_bytes(abstract),
        compile_seconds=0.0,
    )


def _times(
    built: Program, figures: Figures, target: Target, devices: int
) -> dict[str, float]:
    """Returns the fields of an estimate that are times or derived from times."""
    chip = target.chip
    if chip is None:
        return {}
    bound = figures.bound_seconds(chip)
    link = figures.link_seconds(chip, devices)
    # Overlap is unknown: at best, communication hides behind compute, and no step is
    # faster than its roofline.
    seconds = max(figures.seconds(chip), link, bound)
    rows = next(iter(built.spec.values())).shape[0]
    return {
        "bound_seconds": bound,
        "link_seconds": link,
        "step_seconds": seconds,
        "images_per_second": rows / seconds,
        "mfu": built.flops_per_step / devices / seconds / chip.flops,
    }


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * dtype.itemsize
