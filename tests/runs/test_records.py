"""Records survive kills: nothing lost, nothing twice, and TensorBoard agrees."""

import importlib
import json
import math
import os
import resource
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from big_vision_lite.runs import records
from big_vision_lite.runs.records import Writer, read_history
from big_vision_lite.runtime import files


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path) / "rün 1"


def run(workdir, steps, *, restored=0):
    with Writer(workdir) as writer:
        writer.resume_at(restored)
        for step in steps:
            writer.write(step, {"train/loss": 1 / (step + 2)})
            if step % 3 == 0:
                writer.write(step, {"test/accuracy": step / 10, "test/loss": 0.1})


def points(workdir, tag):
    accumulator = EventAccumulator(str(workdir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_what_was_written_is_read_back_to_the_last_bit(workdir):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, float(np.float32(0.1)), 3]
    with Writer(workdir) as writer:
        for step, value in enumerate(values):
            writer.write(step, {"train/loss": value})
    assert read_history(workdir) == [
        {"step": step, "train/loss": value} for step, value in enumerate(values)
    ]


def test_scalar_arrays_are_recorded_as_numbers(workdir):
    with Writer(workdir) as writer:
        writer.write(1, {"a": jnp.float32(0.5), "b": np.int64(7), "c": np.bool_(True)})
    assert read_history(workdir) == [{"step": 1, "a": 0.5, "b": 7, "c": 1}]


def test_a_line_cut_anywhere_by_a_kill_is_dropped_and_rewritten_on_resume(workdir):
    run(workdir, range(1, 8))
    path = workdir / records.FILE_NAME
    whole = path.read_bytes()
    straight = read_history(workdir)
    last_line = whole.splitlines(keepends=True)[-1]
    for cut in range(len(last_line)):
        path.write_bytes(whole[: len(whole) - len(last_line) + cut])
        complete = cut == len(last_line) - 1  # only the newline is missing
        kept = straight if complete else straight[:-1]
        assert read_history(workdir) == kept
        run(workdir, [7], restored=6)
        assert path.read_bytes() == whole


def test_a_run_killed_at_any_record_and_resumed_equals_a_straight_one(workdir):
    straight = workdir / "straight"
    run(straight, range(1, 10))
    lines = (straight / records.FILE_NAME).read_bytes().splitlines(keepends=True)
    for kept in range(len(lines) + 1):
        killed = workdir / f"killed_{kept}"
        run(killed, range(1, 10))
        (killed / records.FILE_NAME).write_bytes(b"".join(lines[:kept]) + b'{"st')
        restored = max((json.loads(x)["step"] for x in lines[:kept]), default=0)
        restored = restored // 4 * 4  # a checkpoint every 4 steps
        run(killed, range(restored + 1, 10), restored=restored)
        assert (killed / records.FILE_NAME).read_bytes() == b"".join(lines)
        assert points(killed, "train/loss") == points(straight, "train/loss")
        assert points(killed, "test/accuracy") == points(straight, "test/accuracy")


def test_kill_9_between_two_lines_loses_no_finished_record(workdir):
    program = textwrap.dedent(
        """
        import os, signal, sys
        from etils import epath
        from big_vision_lite.runs.records import Writer
        writer = Writer(epath.Path(sys.argv[1])).__enter__()
        writer.resume_at(0)
        for step in range(1, 50):
            writer.write(step, {"train/loss": 0.5})
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", program, str(workdir)])
    assert done.returncode == -9
    assert [r["step"] for r in read_history(workdir)] == list(range(1, 50))
    assert [step for step, _ in points(workdir, "train/loss")] == list(range(1, 50))


def test_resuming_drops_what_lies_beyond_the_restored_step_and_nothing_else(workdir):
    run(workdir, range(1, 10))
    with Writer(workdir) as writer:
        writer.resume_at(6)
        assert max(r["step"] for r in read_history(workdir)) == 6
        assert writer.recorded(6, "test")
        assert not writer.recorded(9, "test")
        assert not writer.recorded(6, "tes")  # a name's part is no evaluator
        assert not writer.recorded(5, "test")
    assert [s for s, _ in points(workdir, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_a_score_is_never_written_twice(workdir):
    with Writer(workdir) as writer:
        writer.write(1, {"test/loss": 0.5})
        writer.write(1, {"val/loss": 0.5})
        with pytest.raises(AssertionError, match="test/loss of step 1"):
            writer.write(1, {"test/loss": 0.5})
    run(workdir, range(2, 4), restored=1)
    with Writer(workdir) as writer, pytest.raises(AssertionError):
        writer.write(3, {"test/loss": 0.5})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, jnp.float32("nan")])
def test_a_number_that_is_not_finite_is_refused_before_anything_is_written(
    workdir, value
):
    with Writer(workdir) as writer:
        writer.write(1, {"train/loss": 1.0})
        with pytest.raises(ValueError, match="test/loss is .* at step 2"):
            writer.write(2, {"test/accuracy": 0.5, "test/loss": value})
    assert read_history(workdir) == [{"step": 1, "train/loss": 1.0}]


def test_writing_without_resuming_does_not_continue_a_cut_line(workdir):
    run(workdir, range(1, 3))
    with (workdir / records.FILE_NAME).open("ab") as file:
        file.write(b'{"step": 3, "train/lo')
    with Writer(workdir) as writer:
        writer.write(5, {"test/loss": 0.5})
    assert [r["step"] for r in read_history(workdir)] == [1, 2, 5]


@pytest.mark.parametrize("line", [b"hello", b"3", b'{"loss": 1}', b'{"step": "a"}'])
def test_a_damaged_line_in_the_middle_is_named(workdir, line):
    run(workdir, range(1, 3))
    path = workdir / records.FILE_NAME
    path.write_bytes(line + b"\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1, is not a record"):
        read_history(workdir)


def test_the_latest_scores_are_those_of_evaluators(workdir):
    with Writer(workdir) as writer:
        writer.write(2, {"train/loss": 1.0, "images_per_second": 10.0})
        writer.write(2, {"test/accuracy": 0.5, "test/loss": 2.0})
        writer.write(4, {"test/accuracy": 0.75})
        assert writer.latest() == {"test/accuracy": 0.75, "test/loss": 2.0}


@pytest.mark.parametrize("full", ["metrics.jsonl", "events.out.tfevents"])
def test_a_full_disk_is_said_with_the_file_and_loses_nothing_earlier(full, workdir):
    # A record takes more room as JSON, the header of an event file is there first.
    record = {f"train/loss_{i}": 1 / (i + 3) for i in range(40)}
    first = 3 if full == "metrics.jsonl" else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Writer(workdir) as writer:
        writer.resume_at(0)
        for step in range(first):
            writer.write(step, record)
        written = [*workdir.glob("*"), *workdir.glob("tensorboard/*")]
        sizes = [path.stat().length for path in written if path.is_file()]
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) + 9, hard))
        try:
            with pytest.raises(OSError) as caught:
                writer.write(first, record)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert message.startswith(f"Could not write {workdir}/") and full in message
    assert "File too large. Free disk space" in message
    assert "the same command continues from the last checkpoint" in message
    assert [r["step"] for r in read_history(workdir)] == list(range(first))
    with Writer(workdir) as writer:  # with room again
        writer.resume_at(first - 1)
        writer.write(first, record)
    assert [r["step"] for r in read_history(workdir)] == list(range(first + 1))
    steps = [step for step, _ in points(workdir, "train/loss_0")]
    assert steps == list(range(first + 1))


def test_other_processes_write_nothing(workdir, monkeypatch):
    monkeypatch.setattr(records.jax, "process_index", lambda: 1)
    run(workdir, range(1, 4))
    assert not workdir.exists()


def test_a_folder_that_cannot_append_holds_the_same_records(workdir, monkeypatch):
    run(workdir / "local", range(1, 6))
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    run(workdir / "remote", range(1, 4))
    run(workdir / "remote", range(3, 6), restored=2)
    local, remote = workdir / "local", workdir / "remote"
    assert read_history(remote) == read_history(local)
    assert points(remote, "train/loss") == points(local, "train/loss")


def test_wandb_that_was_asked_for_and_is_not_there_stops_the_run(workdir, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "birds")
    monkeypatch.setattr(records.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="WANDB_PROJECT=birds.*pip install wandb"):
        Writer(workdir).__enter__()


@pytest.fixture
def wandb_calls(tmp_path, monkeypatch):
    """A stand-in: the package is an extra and its service is elsewhere."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "wandb.py").write_text(
        textwrap.dedent(
            """
            import types
            util = types.SimpleNamespace(generate_id=lambda: "abc")
            calls = []
            class Run:
                def define_metric(self, *args, **kwargs): calls.append(args)
                def log(self, record): calls.append(record)
                def finish(self): calls.append("finish")
            def init(**kwargs):
                calls.append(kwargs)
                return Run()
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("WANDB_PROJECT", "birds")
    calls = importlib.import_module("wandb").calls
    yield calls
    del sys.modules["wandb"]


def test_wandb_receives_every_record_under_one_lasting_name(workdir, wandb_calls):
    with Writer(workdir) as writer:
        writer.write(1, {"train/loss": 0.5})
    assert {"id": "abc", "resume": "allow"} in wandb_calls
    assert {"step": 1, "train/loss": 0.5} in wandb_calls
    assert wandb_calls[-1] == "finish"
    assert (workdir / "wandb_id.txt").read_text() == "abc"


def test_a_run_inside_a_run_neither_starts_nor_ends_the_outer_one_s_wandb(
    workdir, wandb_calls
):
    with Writer(workdir) as outer:
        outer.write(1, {"train/loss": 0.5})
        for seed in range(2):
            with Writer(workdir / f"seed_{seed}") as inner:
                inner.write(1, {"train/loss": 7.0})
        outer.write(2, {"train/loss": 0.25})
    starts = [call for call in wandb_calls if "resume" in call]
    losses = [call["train/loss"] for call in wandb_calls if "train/loss" in call]
    assert len(starts) == 1 and losses == [0.5, 0.25]
    assert wandb_calls.count("finish") == 1 and wandb_calls[-1] == "finish"
    # The next run of this process is an outer one again.
    with Writer(workdir / "later"):
        pass
    assert wandb_calls.count("finish") == 2


def test_no_tensorflow_is_imported_even_where_it_is_installed(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('imported')")
    program = textwrap.dedent(
        """
        import sys
        from etils import epath
        from big_vision_lite.runs.records import Writer
        with Writer(epath.Path(sys.argv[1])) as writer:
            writer.resume_at(0)
            writer.write(1, {"train/loss": 0.5})
        found = {"tensorflow", "torch", "pandas"} & set(sys.modules)
        assert not found, found
        """
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=True,
    )


def test_a_replaced_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "file.txt"
    files.replace(path, b"old")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            files.replace(path, b"new and longer")
    assert path.read_bytes() == b"old"
    files.replace(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
