"""What is typed and what is answered: help, wrong recipes, where a trace goes."""

import logging
import pathlib
import subprocess
import sys

import pytest

from big_vision_lite import evaluate, train
from big_vision_lite.recipes import command_line
from big_vision_lite.runtime import startup

ROOT = pathlib.Path(__file__).parents[2]
QUICKSTART = f"{ROOT}/configs/quickstart.py"


def error_of(*words):
    with pytest.raises(Exception) as caught:
        command_line.parse(["train", *words], train.define_flags)
    assert isinstance(caught.value, command_line.USER_ERRORS)
    return str(caught.value)


@pytest.mark.parametrize("program", [train, evaluate])
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_shows_every_flag_and_two_examples(program, word, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.run(program.main, ["x", word])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    values = command_line.flags.FlagValues()
    program.define_flags(values)
    for name in (*(n for n in values if values[n].help), "config", "allow_module"):
        assert f"--{name}" in shown
    assert shown.count("python -m big_vision_lite.") >= 2


def test_a_recipe_is_a_python_file_with_get_config(tmp_path):
    other = tmp_path / "README.md"
    other.write_text("± 1")
    for more in ([], ["--config.num_steps=3"]):
        message = error_of(f"--config={other}", *more)
        assert f"{other} is no recipe: that is a Python file" in message
        assert "get_config" in message
    without = tmp_path / "without.py"
    without.write_text("x = 1\n")
    for more in ([], ["--config.num_steps=3"]):
        message = error_of(f"--config={without}", *more)
        assert f"{without} has no function get_config(arg)" in message


def test_a_recipe_that_is_no_python_names_its_line(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\ny = = 2\n")
    for more in ([], ["--config.num_steps=3"]):
        message = error_of(f"--config={broken}", *more)
        assert message == f"{broken}:2: invalid syntax"


def test_a_value_for_a_whole_component_is_told_its_part():
    message = error_of(f"--config={QUICKSTART}", "--config.init=runs/three")
    assert "--config.init.path=runs/three" in message
    assert "init is a component" in message


def test_a_module_that_cannot_be_imported_is_said_with_where(tmp_path, monkeypatch):
    message = error_of(f"--config={QUICKSTART}", "--allow_module=mymodd")
    assert 'there is no module "mymodd"' in message
    assert str(pathlib.Path.cwd()) in message and "PYTHONPATH" in message
    # A module that is there and needs another one is not called missing.
    (tmp_path / "needs_more.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = error_of(f"--config={QUICKSTART}", "--allow_module=needs_more")
    assert message == "No module named 'not_installed_at_all'"


def test_a_recorded_run_takes_overrides_and_names_what_is_wrong_with_them():
    known = command_line.parse(
        ["train", f"--config={QUICKSTART}"], train.define_flags
    ).config

    def parse(*words):
        return command_line.parse(
            ["train", "--workdir=runs/x", *words],
            train.define_flags,
            recorded=lambda workdir, modules: known if workdir == "runs/x" else None,
        ).config

    assert parse() == known
    assert parse("--config.log_every_steps=3").log_every_steps == 3
    with pytest.raises(ValueError, match="Did you mean optimizer.weight_decay.? "):
        parse("--config.optimizer.weigth_decay=3")
    with pytest.raises(ValueError, match="log_every_steps=abc is not an int"):
        parse("--config.log_every_steps=abc")
    with pytest.raises(ValueError, match="init is a component"):
        parse("--config.init=elsewhere")


def test_a_step_folder_is_not_trained_in(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="is one saved step. To resume its run give"):
        train.recorded_config(str(tmp_path), [])
    assert train.recorded_config(str(tmp_path / "nothing"), []) is None


def test_only_a_program_that_writes_a_folder_leaves_its_trace_in_it(tmp_path, capsys):
    def main(argv):
        raise ValueError("wrong")

    words = ["x", f"--workdir={tmp_path}"]
    assert command_line.run(main, words) == 1
    shown = capsys.readouterr().err
    trace = pathlib.Path(shown.split("the trace is in ")[1].split(")")[0])
    assert not list(tmp_path.iterdir()) and "ValueError" in trace.read_text()
    trace.unlink()
    assert command_line.run(main, words, trace_flag="workdir") == 1
    assert f"the trace is in {tmp_path}/error.txt" in capsys.readouterr().err
    assert "ValueError: wrong" in (tmp_path / "error.txt").read_text()


def test_train_writes_its_trace_into_its_folder_and_evaluate_does_not(tmp_path):
    for program, expected in (("train", ["error.txt"]), ("evaluate", [])):
        folder = tmp_path / program
        folder.mkdir()
        ended = subprocess.run(
            [sys.executable, "-m", f"big_vision_lite.{program}"]
            + [f"--workdir={folder}", "--flag_that_is_not"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 1 and "There is no flag" in ended.stderr
        assert [path.name for path in folder.iterdir()] == expected


def test_a_warning_of_the_program_is_one_plain_line(capsys):
    startup.quiet()
    startup.quiet()  # twice is not two lines
    logging.getLogger("big_vision_lite.data.x").warning("val has %d classes", 3)
    logging.getLogger("somebody_else").error("chatter")
    shown = capsys.readouterr()
    assert shown.err == "warning: val has 3 classes\n" and shown.out == ""


def test_a_dry_run_says_at_once_that_its_folder_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    workdir = tmp_path / "file" / "run"
    words = ["train", f"--config={QUICKSTART}", f"--workdir={workdir}", "--dry_run"]
    assert command_line.run(train.main, words) == 1
    shown = capsys.readouterr().err
    assert f"Cannot write {workdir}: Not a directory. Use another" in shown
