"""Trains a recipe; the same command, or --workdir alone, resumes a run.

python -m big_vision_lite.train --config configs/quickstart.py --workdir runs/first
python -m big_vision_lite.train --workdir runs/first
"""

import contextlib
import functools
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from big_vision_lite.config import TrainConfig
from big_vision_lite.console.progress import Progress
from big_vision_lite.data import pipeline
from big_vision_lite.recipes import command_line, serialize
from big_vision_lite.runs import checkpoint, dry_run, integrity, step_folder
from big_vision_lite.runs import evaluations as evaluation
from big_vision_lite.runs import folder as run_folder
from big_vision_lite.runs import init as adapt
from big_vision_lite.runs.health import Monitor, Profiler
from big_vision_lite.runs.records import Writer
from big_vision_lite.runtime import files, layout, processes, sharding, startup
from big_vision_lite.runtime.processes import Stopped, StopSignal
from big_vision_lite.training import program
from big_vision_lite.training import state as state_lib
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

    `first_params` {name: array, statistics as "batch_stats/..."} start the run in place
    of `config.init`'s checkpoint.
    `command` resumes the run: it is named in what to type next.

    Raises:
        ValueError, OSError: a mistake in the recipe, the data or the folder; the
            message says what came, what is allowed and what to type.
        FloatingPointError: the loss is not finite; says where it began.
        Stopped: a signal came; the state is saved.
    """
    mesh = sharding.make_mesh(config.mesh)
    layout.check_batch_size(config.data.batch_size, mesh, config.micro_batches)
    num_steps = config.resolve_steps(len(config.data.source))
    with (
        jax.set_mesh(mesh),
        StopSignal() as stop,
        Progress(num_steps, config.data.batch_size, quiet=quiet) as progress,
        run_folder.RunFolder(workdir, config, log=progress.message) as folder,
        pipeline.open_batches(
            config.data, config.seed, mesh, workdir / "bad_files.txt"
        ) as batches,
        checkpoint.Checkpointer(
            workdir,
            config.checkpoints,
            config_text=folder.config_text(),
            metadata=describe(config, num_steps, batches.spec()),
            log=progress.message,
        ) as checkpointer,
        Writer(workdir) as writer,
        Profiler(config.profile_steps, workdir / "profile") as profiler,
        contextlib.ExitStack() as later,
    ):
        if note := config.length_note():
            progress.message(note)
        built = later.enter_context(
            program.build(config, mesh, batches.spec(), saving=checkpointer.saving)
        )
        for note in built.notes:
            progress.message(note)
        checkpointer.prepare(built.abstract)
        evaluations = evaluation.Evaluations(
            config,
            functools.partial(
                evaluation.make_context,
                config=config,
                mesh=mesh,
                workdir=workdir,
                abstract_state=built.abstract,
                untrained_state=built.fresh,
                log=progress.message,
            ),
            writer,
            num_steps,
            before=built.make_room,
            show=progress.scores,
        )
        state = checkpointer.restore_latest(built.abstract)
        if state is None:
            state = adapt.first_state(
                config,
                built.fresh(),
                first_params,
                progress.message,
                note_origin=checkpointer.note_origin,
            )
        # Anything else would compile the step a second time.
        state_lib.check_same(built.abstract, state)
        first_step = int(state.step) + 1
        if first_step > 1:
            progress.message(f"resuming from step {first_step - 1} of {num_steps}")
        writer.resume_at(first_step - 1)
        monitor = Monitor(
            config, num_steps, workdir, lambda step: next(batches.starting_at(step))
        )
        # A run killed between a save and its evaluations makes up for them.
        try:
            evaluations.run_due(first_step - 1, state)
        except Stopped:
            raise Stopped(stop.requested(), first_step - 1, workdir) from None
        folder.begin()
        progress.begin(first_step - 1, built.flops_per_step)
        for step, batch in progress.watch(batches.starting_at(first_step), num_steps):
            profiler.before(step)
            state, metrics = built.train_step(state, batch)
            profiler.after(step, metrics)
            progress.pace(metrics)
            monitor.add(step, metrics)
            last = step == num_steps
            leaving = stop.agreed(step)
            logging = last or step % config.log_every_steps == 0
            saving = last or leaving or checkpointer.due(step)
            # The order matters: the record of a step, then its checkpoint, then its
            # evaluations, so that a score can be traced to a file.
            if logging or saving:
                record = monitor.look(state)
            if logging:
                checkpointer.check()
                record |= progress.rates(step)
                writer.write(step, record)
                progress.show(step, record, batches)
            with progress.paused():
                if saving:
                    checkpointer.save(step, state)
                try:
                    if (last or not leaving) and evaluations.due(step):
                        evaluations.run_due(step, state)
                except Stopped:
                    # A training inside an evaluator was told to stop, and saved itself.
                    # Resumed, this run makes up for the evaluation.
                    monitor.look(state)
                    checkpointer.save(step, state)
                    leaving, last = True, False
            if leaving and not last:
                checkpointer.wait()
                raise Stopped(stop.requested(), step, workdir)
        if skipped := batches.unreadable.message():
            progress.message(skipped)
    progress.summary(writer.latest(), next_commands(workdir, command))
    return state


def describe(
    config: TrainConfig, num_steps: int, spec: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what every manifest says of the run beside its leaves and files."""
    return {
        "num_steps": num_steps,
        "input": {
            name: {"shape": list(leaf.shape[1:]), "dtype": str(leaf.dtype)}
            for name, leaf in spec.items()
        },
        "class_names": list(config.data.source.class_names),
        "source": config.data.source.fingerprint,
        "versions": startup.versions(),
    }


def next_commands(workdir: epath.Path, command: str | None) -> list[str]:
    """Lists what one may type after a run, with the Python that is running."""
    package = f"{shlex.quote(sys.orig_argv[0])} -m big_vision_lite"
    run, tuned = (shlex.quote(f"{workdir}{end}") for end in ("", "_finetuned"))
    recipe = shlex.quote(f"configs/finetune.py:init={workdir},data=FOLDER")
    return [
        f"{package}.predict --workdir {run} --images FOLDER --out preds.csv",
        f"{package}.evaluate --workdir {run}",
        f"{package}.train --config {recipe} --workdir {tuned}",
        *([] if command is None else [f"{command}  # resumes"]),
        f"tensorboard --logdir {run}",
    ]


def main(argv: Sequence[str]) -> None:
    """Parses the command line, sets the devices up and trains."""
    command = command_line.parse(
        argv, define_flags, about=__doc__ or "", recorded=recorded_config
    )
    values = command.flags
    if command.config is None:
        raise ValueError(
            "Which recipe? For example: python -m big_vision_lite.train "
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
    """Returns the shortest command that resumes a run: its folder holds its recipe."""
    kept = [
        f"--{name}={values[name].value}"
        for name in ("coordinator", "num_processes", "process_id")
        if values[name].present
    ]
    modules: Any = values["allow_module"].value
    kept += [f"--allow_module={module}" for module in modules]
    words = [sys.orig_argv[0], "-m", "big_vision_lite.train", "--workdir", str(workdir)]
    return shlex.join([*words, *kept])


def recorded_config(workdir: str, allowed_modules: Sequence[str]) -> TrainConfig | None:
    """Returns the configuration of the run that `workdir` holds, or None if none.

    With it a run resumes wherever its recipe, or what that reads, has gone.

    Raises:
        ValueError: it is the folder of a step, in which nobody trains.
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
    return run_folder.read_config(folder, allowed_modules)


def define_flags(values: flags.FlagValues) -> None:
    """Adds the flags of this program."""
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
