"""Reports shapes, sizes and memory of a run without training: `train --dry_run`."""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from big_vision_lite import trees
from big_vision_lite.config import TrainConfig
from big_vision_lite.data import pipeline
from big_vision_lite.messages import some
from big_vision_lite.runs import image_folders
from big_vision_lite.runs.picture_grid import write_grid
from big_vision_lite.runtime import files, layout, sharding, targets
from big_vision_lite.training import estimate, program
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.estimate import Estimate
from big_vision_lite.training.state import TrainState

GIGA = 1e9
GRID = 8


def dry_run(config: TrainConfig, workdir: epath.Path) -> str:
    """Returns a report of shapes, sizes, lengths and memory of the run.

    Compiles the train step but runs nothing on the device. Writes the first batch as
    `workdir/first_batch.png`.

    Raises:
        OSError: `workdir` cannot be written; raised before anything is computed.
    """
    image_folders.refuse_workdir_inside(config, workdir)
    files.make_folder(workdir)
    paragraph = image_folders.paragraph(config)
    mesh = sharding.make_mesh(config.mesh)
    layout.check_batch_size(config.data.batch_size, mesh, config.micro_batches)
    examples = len(config.data.source)
    with (
        jax.set_mesh(mesh),
        pipeline.open_batches(config.data, config.seed, mesh) as batches,
    ):
        built = program.build(config, mesh, batches.spec())
        found = estimate.of_program(built, mesh, targets.here())
        batch = next(iter(batches.starting_at(1)))
        picture = workdir / "first_batch.png"
        if "image" in batch:
            write_grid(batch["image"][: GRID * GRID], picture, columns=GRID)
    per_epoch = examples / config.data.batch_size
    note = config.length_note()
    lines = [
        *_parameter_lines(built.abstract),
        "",
        *_batch_lines(built.spec),
        *paragraph,
        _outputs_line(config.data.source.class_names, "target" in built.spec),
        f"examples     {examples:,} in {config.data.source.fingerprint}",
        f"steps        {built.num_steps:,} of {config.data.batch_size} "
        f"({per_epoch:.1f} an epoch, {built.num_steps / per_epoch:.2f} epochs)",
        *([f"length       {note}"] if note else []),
        f"model FLOPs  {built.flops_per_step / GIGA:.3g} G a step",
        f"mesh         {dict(mesh.shape)} of {jax.devices()[0].device_kind}",
        f"memory       {_memory(found)} a device",
        *_times(found, built.num_steps),
        f"first batch  {picture if 'image' in batch else 'has no image to show'}",
    ]
    return "\n".join(lines)


def _parameter_lines(abstract: TrainState) -> list[str]:
    params = trees.flatten(state_lib.merge(abstract.params, abstract.frozen))
    trained = set(trees.names(abstract.params))
    width = max(map(len, params))
    lines = [
        f"{name:{width}}  {trees.describe(leaf)}"
        + ("" if name in trained else "  frozen")
        for name, leaf in params.items()
    ]
    total = sum(leaf.size for leaf in params.values())
    kept = sum(params[name].size for name in trained)
    return [*lines, f"parameters   {total:,} ({kept:,} trained)"]


def _batch_lines(spec: Any) -> list[str]:
    return [
        f"batch        {name} {trees.describe(leaf)}" for name, leaf in spec.items()
    ]


def _outputs_line(names: Sequence[str], are_numbers: bool) -> str:
    return (
        f"targets      {some(names)}" if are_numbers else f"classes      {len(names)}"
    )


def _memory(found: Estimate) -> str:
    """Returns a text of the compiled step's peak memory."""
    later = ("activations and gradients", "program")
    state = sum(size for kind, size in found.memory.items() if kind not in later)
    rest = found.memory.get("activations and gradients", 0)
    said = (
        f"{found.memory_needed / GIGA:.2f} GB (state and batch {state / GIGA:.2f}, "
        f"activations and gradients {rest / GIGA:.2f})"
    )
    if found.memory_there is None:
        return said
    verdict = "which fits" if found.fits else "WHICH DOES NOT FIT"
    return f"{said} of {found.memory_there / GIGA:.2f}, {verdict},"


def _times(found: Estimate, num_steps: int) -> list[str]:
    """Returns a line of a step's estimated time, [] for a device of unknown rates."""
    if found.step_seconds is None:
        return []
    return [
        f"estimated    {1e3 * found.step_seconds:.1f} ms a step, "
        f"{found.images_per_second:,.0f} images/s, {found.mfu:.1%} MFU, "
        f"{num_steps * found.step_seconds / 3600:.1f} h; not run"
    ]
