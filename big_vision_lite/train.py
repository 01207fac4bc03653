"""Trains a model from a recipe; the same command, or --workdir alone, resumes it.

python -m big_vision_lite.train --config configs/quickstart.py --workdir runs/first
python -m big_vision_lite.train --workdir runs/first
"""

import functools
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from big_vision_lite.config import TrainConfig
from big_vision_lite.recipes import command_line, serialize
from big_vision_lite.runs import dry_run, integrity, step_folder, suggestions
from big_vision_lite.runs.evaluations import Evaluations
from big_vision_lite.runs.folder import read_config
from big_vision_lite.runs.init import initial_state
from big_vision_lite.runs.session import Run
from big_vision_lite.runtime import files, layout, processes, startup
from big_vision_lite.runtime.sharding import make_mesh
from big_vision_lite.training.program import build
from big_vision_lite.training.state import TrainState


def train(
    config: TrainConfig,
    workdir: epath.Path,
    *,
    first_params: Mapping[str, Any] | None = None,
    command: str | None = None,
    quiet: bool = False,
) -> TrainState:
    """Runs `config` to its last step, resuming from `workdir` if it holds a checkpoint.

    `first_params` {name: array, statistics as "batch_stats/..."} replace the checkpoint
    of `config.init`. `command` resumes the run; messages quote it.

    Raises:
        ValueError, OSError: the recipe, the data or the folder is wrong; the message
            says what came, what is allowed and what to type.
        FloatingPointError: the loss is not finite; the message says where it began.
        Stopped: a signal arrived and the state was saved.
    """
    mesh = make_mesh(config.mesh)
    layout.check_batch_size(config.data.batch_size, mesh, config.micro_batches)
    with (
        jax.set_mesh(mesh),
        Run(config, workdir, mesh, command=command, quiet=quiet) as run,
        build(config, mesh, run.batch_spec(), saving=run.is_saving) as program,
    ):
        # Wrong paths and classes raise here, not after hours.
        evaluations = Evaluations(run, program)
        state = run.restore(program)
        if state is None:
            state = initial_state(
                config,
                program,
                first_params,
                log=run.say,
                note_origin=run.note_origin,
            )
        run.begin(program, state)
        # If the run was killed between a save and its evaluations, run them now.
        evaluations.run_due(run.done, state)
        for step, batch in run.steps():
            state, metrics = program.train_step(state, batch)
            run.note(step, metrics)
            # The order matters: the record of a step, then its checkpoint, then its
            # evaluations, so that a score can be traced to a file.
            if run.logs_at(step):
                run.log(step, state)
            if run.saves_at(step):
                run.save(step, state)
            if run.stops_at(step):
                raise run.stopped(step)
            evaluations.run_due(step, state)
    run.show_results()
    return state


def main(argv: Sequence[str]) -> None:
    """Parses the command line, initialises the devices and trains."""
    command = command_line.parse(
        argv, define_flags, about=__doc__ or "", recorded=recorded_config
    )
    values = command.flags
    if command.config is None:
        given = values["workdir"].value
        there = f"There is no run in {given}. " if given else ""
        raise ValueError(
            f"{there}Which recipe? For example: python -m big_vision_lite.train "
            "--config configs/quickstart.py --workdir runs/first. A run that has begun "
            "needs none: --workdir RUN resumes it."
        )
    config: TrainConfig = command.config
    if values["print_config"].value:
        print(serialize.to_json(config), end="")
        return
    if not values["workdir"].value:
        raise ValueError("Where to? Add --workdir FOLDER, for example runs/first.")
    startup.set_up(
        config.platform,
        deterministic=config.deterministic,
        coordinator=values["coordinator"].value,
        num_processes=values["num_processes"].value,
        process_id=values["process_id"].value,
    )
    workdir = files.absolute(values["workdir"].value)
    if values["dry_run"].value:
        print(dry_run.dry_run(config, workdir))
        return
    with processes.named_losses():
        train(config, workdir, command=resume_command(workdir, values))


def resume_command(workdir: epath.Path, values: flags.FlagValues) -> str:
    """Returns the shortest command that resumes the run; its folder has the recipe."""
    kept = [
        f"--{name}={values[name].value}"
        for name in ("coordinator", "num_processes", "process_id")
        if values[name].present
    ]
    modules: Any = values["allow_module"].value
    kept += [f"--allow_module={module}" for module in modules]
    words = ["-m", "big_vision_lite.train", "--workdir", str(workdir), *kept]
    return f"{suggestions.python(modules)} {shlex.join(words)}"


def recorded_config(workdir: str, allowed_modules: Sequence[str]) -> TrainConfig | None:
    """Returns the configuration recorded in `workdir`, None if it holds no run.

    A run can thus resume after its recipe file, or files that it reads, are gone.

    Raises:
        ValueError: `workdir` is a step folder, which cannot be trained in.
    """
    folder = files.absolute(workdir)
    if (folder / integrity.MANIFEST).exists():
        raise ValueError(
            f"{folder} is one saved step. To resume its run give the run's folder; to "
            f"start from the step: --config FILE --config.init.path={folder} with a "
            "new --workdir."
        )
    if not (folder / step_folder.CONFIG).exists():
        return None
    return read_config(folder, allowed_modules)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of train."""
    string, boolean, integer = (
        functools.partial(define, flag_values=values)
        for define in (flags.DEFINE_string, flags.DEFINE_bool, flags.DEFINE_integer)
    )
    string("workdir", None, "Run folder; the same folder resumes the run.")
    boolean("dry_run", False, "Print shapes, sizes and memory; train nothing.")
    boolean("print_config", False, "Print the resolved configuration as JSON.")
    string("coordinator", None, "host:port of process 0, for several processes.")
    integer("num_processes", None, "Number of processes.")
    integer("process_id", None, "This process, from 0.")


if __name__ == "__main__":
    run = functools.partial(command_line.run, main, sys.argv, trace_flag="workdir")
    sys.exit(processes.run(run))
