"""The loop as a whole: what it refuses, how it compiles, stops and goes on."""

import dataclasses
import os
import re
import shlex
import signal
import sys
from typing import ClassVar

import jax
import pytest
from etils import epath
from tiny_runs import Net

from big_vision_lite import train
from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import Decode
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits, ImageFolder
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.evaluators.fewshot import FewShot, FewShotSet
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.recipes import command_line
from big_vision_lite.runs import dry_run, session, step_folder, suggestions
from big_vision_lite.runs.records import read_history
from big_vision_lite.runs.suggestions import next_commands
from big_vision_lite.runtime.cpu import SteadyStep
from big_vision_lite.runtime.processes import Stopped, StopSignal
from big_vision_lite.schedules import Average, Constant
from big_vision_lite.training.optimizers import AdamW

CLOCK = ("images_per_second", "data_wait", "eta_seconds")


def on_digits(**changes) -> Classification:
    fields = dict(source=Digits(split="test"), batch_size=128, every_steps=4)
    return Classification(**fields | changes)


def recipe(**changes) -> TrainConfig:
    fields = dict(
        num_steps=8,
        model=Net(),
        objective=SoftmaxClassification(),
        data=Stream(source=Digits(), ops=(Decode(channels=1),), batch_size=64),
        preprocess=(Decode(channels=1),),
        optimizer=AdamW(schedule=Constant(peak=0.01)),
        evaluators={"test": on_digits()},
        checkpoints=Checkpoints(every_steps=4, keep_latest=9),
        log_every_steps=1,
    )
    return TrainConfig(**fields | changes)


def run(folder, config, **options):
    return train.train(config, epath.Path(folder), **options)


def records(folder) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for record in read_history(epath.Path(folder)):
        kept = {name: x for name, x in record.items() if name not in CLOCK}
        found[record["step"]] = found.get(record["step"], {}) | kept
    return found


@pytest.fixture
def built(monkeypatch):
    """The programs that runs build, in order."""
    programs = []
    build = train.build

    def kept(*args, **options):
        programs.append(build(*args, **options))
        return programs[-1]

    monkeypatch.setattr(train, "build", kept)
    return programs


@dataclasses.dataclass(kw_only=True)
class Stopping:
    """As a training inside an evaluator: told to stop, it saves itself and leaves."""

    every_steps: int = 3

    def prepare(self, context):
        def runner(state):
            if not (context.workdir / "again").exists():
                (context.workdir / "again").touch()
                os.kill(os.getpid(), signal.SIGTERM)
                with StopSignal() as stop:
                    raise Stopped(stop.requested(), 1, context.workdir / "inner")
            return {"score": float(state.step)}

        return runner


@pytest.fixture
def interrupted(tmp_path):
    """A run that was stopped in an evaluation after step 3, which is no save's."""
    config = recipe(evaluators={"inner": Stopping(), "test": on_digits()})
    with pytest.raises(Stopped) as caught:
        run(tmp_path / "run", config)
    return tmp_path / "run", config, str(caught.value)


def test_a_stop_inside_an_evaluation_saves_the_outer_step_and_says_so(interrupted):
    folder, _, message = interrupted
    assert message.startswith(f"SIGTERM: saved step 3 in {folder}. The same command")
    assert step_folder.complete_steps(epath.Path(folder / "checkpoints")) == [3]
    assert list(records(folder)) == [1, 2, 3]


def test_it_continues_with_that_evaluation_as_if_it_had_not_been_stopped(
    interrupted, tmp_path
):
    folder, config, _ = interrupted
    run(folder, config)
    (tmp_path / "straight").mkdir()
    (tmp_path / "straight" / "again").touch()
    run(tmp_path / "straight", config)
    assert records(folder) == records(tmp_path / "straight")
    scores = {s: r["inner/score"] for s, r in records(folder).items() if s % 3 == 0}
    assert scores == {3: 3.0, 6: 6.0}


def test_a_stop_in_the_evaluation_that_is_made_up_for_names_the_outer_step(
    interrupted,
):
    folder, config, _ = interrupted
    (folder / "again").unlink()
    with pytest.raises(Stopped, match=f"SIGTERM: saved step 3 in {folder}. The"):
        run(folder, config)


def test_one_compile_of_the_step_in_a_run_and_one_in_its_resumption(
    tmp_path, built, caplog, monkeypatch
):
    """Two ways: what JAX logs when it compiles, and no call but of what is compiled."""
    add = session.Monitor.add

    def broken(self, step, metrics):
        if step == 6:
            raise KeyboardInterrupt
        add(self, step, metrics)

    with jax.log_compiles(), caplog.at_level("WARNING"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(session.Monitor, "add", broken)
            run(tmp_path / "run", recipe(ema=Average(start=0.9)))
        run(tmp_path / "run", recipe(ema=Average(start=0.9)))
    # Evaluated at 4 and 8, saved at 4 and 8, resumed from 4.
    steps = [s for s, r in records(tmp_path / "run").items() if "test_ema/loss" in r]
    assert steps == [4, 8]
    assert [program.steady._jitted._cache_size() for program in built] == [0, 0]
    assert len(re.findall(r"Compiling jit\(train_step\)", caplog.text)) == 2


def test_the_memory_of_the_step_goes_back_during_saves_and_evaluations(
    tmp_path, monkeypatch
):
    """A save lasts from step 2 to 3 here, an evaluation follows step 4."""
    seen = []

    def noted(owner, method, name):
        original = getattr(owner, method)

        def call(self, *arguments):
            seen.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(owner, method, call)

    step = SteadyStep
    noted(step, "__call__", "step")
    noted(step, "give_back", "back")
    noted(train.Evaluations, "_evaluate", "evaluate")
    monkeypatch.setattr(
        session.Checkpointer,
        "saving",
        lambda self: seen.count("step") == 2,
    )
    config = recipe(
        num_steps=4,
        evaluators={"test": on_digits()},
        checkpoints=Checkpoints(every_steps=2),
    )
    run(tmp_path / "run", config)
    assert seen == [
        *["step", "step", "back", "step", "step", "evaluate", "back"],
        "back",  # the end
    ]


@dataclasses.dataclass(kw_only=True)
class Counting:
    """The test digits, and which of them were read, by anybody."""

    class_names: ClassVar = Digits(split="test").class_names
    fingerprint: ClassVar = "counted"
    reads: ClassVar[list[int]] = []

    def __len__(self):
        return len(Digits(split="test"))

    def __getitem__(self, index):
        self.reads.append(index)
        return Digits(split="test")[index]

    def name(self, index):
        return f"digit {index}"


class Empty(Counting):
    def __len__(self):
        return 0


def few_shot(source, **changes) -> FewShot:
    sets = (FewShotSet(name="digits", train=Digits(split="train"), test=source),)
    return FewShot(**dict(sets=sets, batch_size=64, controls=False) | changes)


NOWHERE = ImageFolder(path="/no/such/folder", split="val")


@pytest.mark.parametrize(
    ("evaluator", "words"),
    [
        (on_digits(source=NOWHERE), "/no/such/folder"),
        (on_digits(source=Empty()), "late: its set has no images; give a split"),
        (
            on_digits(batch_size=100),
            "evaluators.late.batch_size=100 does not divide over 8 devices; use "
            "--config.evaluators.late.batch_size=96 or 104.",
        ),
        (few_shot(NOWHERE), "/no/such/folder"),
        (few_shot(Empty()), "late: digits test has no images; give a split"),
        (few_shot(Digits(), batch_size=9), "evaluators.late.batch_size=9 does not div"),
    ],
    ids=["path", "empty", "batch", "fewshot path", "fewshot empty", "fewshot batch"],
)
def test_an_evaluator_that_could_not_run_is_refused_before_any_step(
    evaluator, words, tmp_path
):
    config = recipe(evaluators={"late": evaluator})
    with pytest.raises((ValueError, OSError)) as caught:
        run(tmp_path, config)
    assert words in str(caught.value)
    assert records(tmp_path) == {}
    assert step_folder.complete_steps(epath.Path(tmp_path / "checkpoints")) == []


def test_evaluators_that_are_switched_off_are_in_nobodys_way(tmp_path):
    absent = {
        "late": few_shot(NOWHERE, every_steps=0),
        "later": on_digits(source=Empty(), every_steps=0),
    }
    run(tmp_path, recipe(evaluators=absent))
    assert list(records(tmp_path)) == list(range(1, 9))


def test_evaluators_are_prepared_once_and_read_one_image_before_their_time(
    tmp_path, monkeypatch
):
    Counting.reads.clear()
    seen = []
    prepare, add = Classification.prepare, session.Monitor.add

    def noted(self, context):
        seen.append(("prepare", len(Counting.reads)))
        return prepare(self, context)

    def stepped(self, step, metrics):
        seen.append((step, len(Counting.reads)))
        add(self, step, metrics)

    monkeypatch.setattr(Classification, "prepare", noted)
    monkeypatch.setattr(session.Monitor, "add", stepped)
    run(tmp_path, recipe(evaluators={"test": on_digits(source=Counting())}))
    assert seen[:2] == [("prepare", 0), (1, 1)]
    assert [step for step, _ in seen] == ["prepare", *range(1, 9)]
    # The first for its shape, then all of them, twice.
    assert sorted(Counting.reads) == sorted([0, *2 * [*range(len(Counting()))]])


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_of_two_lengths_it_says_which_one_counts(both, dry, tmp_path, capsys):
    config = recipe(num_epochs=50.0 if both else None, evaluators={})
    if dry:
        print(dry_run.dry_run(config, epath.Path(tmp_path)))
    else:
        run(tmp_path, config)
        assert max(records(tmp_path)) == 8
    said = "num_steps=8 counts, num_epochs=50 does not: both are set. For the epochs "
    shown = " ".join(capsys.readouterr().out.split())
    assert (f"{said}add --config.num_steps=none" in shown) == both
    config.num_steps = None
    assert config.length_note() is None


RECIPE = """
import test_train

def get_config(arg=""):
    return test_train.recipe()
"""
# No evaluate: its only evaluator is off.
NEXT = ("predict", "train")


def test_the_next_commands_can_be_pasted_and_resume_needs_no_recipe(tmp_path, capsys):
    folder = tmp_path / "my rün's"
    (tmp_path / "small.py").write_text(RECIPE)
    typed = [
        f"--config={tmp_path}/small.py",
        "--allow_module=tiny_runs",
        f"--workdir={folder}",
        "--config.num_steps=3",
        "--config.data.ops[0].channels=1",
        "--config.evaluators.test.every_steps=0",
    ]
    assert command_line.run(train.main, ["train", *typed]) == 0
    shown = capsys.readouterr().out.split("Next:\n")[1].splitlines()
    words = [shlex.split(line, comments=True) for line in shown if line]
    resumes = next(w for w, line in zip(words, shown, strict=False) if "# res" in line)
    assert resumes[1:] == [
        *("-m", "big_vision_lite.train", "--workdir", str(folder)),
        "--allow_module=tiny_runs",
    ]
    # It finds the run it belongs to, finished, though the recipe has gone.
    (tmp_path / "small.py").unlink()
    assert command_line.run(train.main, ["train", *resumes[3:]]) == 0
    assert "resuming from step 3 of 3" in capsys.readouterr().out
    for line in words:
        assert str(folder) in " ".join(line) or line is resumes
        # Its model is of a module of its own.
        assert "--allow_module=tiny_runs" in line or line[0] == "tensorboard"
    assert [w[2] for w in words[:2]] == [f"big_vision_lite.{n}" for n in NEXT]


def test_a_run_from_a_program_names_no_command_to_resume_it(tmp_path):
    lines = next_commands(epath.Path("/runs/x"), None, recipe(), ["logits"])
    assert not any("resumes" in line for line in lines) and len(lines) == 4


@pytest.mark.parametrize(
    ("outputs", "evaluators", "offered"),
    [
        (["pooled", "logits"], True, "predict --out, evaluate, train"),
        (["pooled"], True, "predict --embed, evaluate, train"),
        (["pooled"], False, "predict --embed, train"),
        (["pixels"], False, ""),
    ],
)
def test_only_what_the_run_can_do_is_suggested(outputs, evaluators, offered):
    config = recipe() if evaluators else recipe(evaluators={})
    found = []
    for line in next_commands(epath.Path("/runs/x"), None, config, outputs)[:-1]:
        words = shlex.split(line)
        flags = [w for w in words if w in ("--out", "--embed")]
        found.append(" ".join([words[2].rpartition(".")[2], *flags]))
    assert ", ".join(found) == offered


def test_the_suggested_commands_work_from_any_folder(tmp_path, monkeypatch):
    """Recipe and modules are found where they lie, not where the command was typed."""
    (tmp_path / "my_module.py").write_text("")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    for found_by in (None, "."):
        if found_by:
            monkeypatch.setenv("PYTHONPATH", found_by)
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in ("my_module", "my_package", "my_package.inner"):
            command = suggestions.python([name])
            assert command.startswith(f"PYTHONPATH={tmp_path}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert suggestions.python(["my_module", "json"]) == shlex.quote(sys.orig_argv[0])
    lines = next_commands(epath.Path("/runs/x"), None, recipe(), ["logits"])
    (tune,) = (line for line in lines if "finetune.py" in line)
    recipe_file = tune.split("--config ")[1].split(":")[0].strip("'")
    assert os.path.isabs(recipe_file) and os.path.exists(recipe_file)
