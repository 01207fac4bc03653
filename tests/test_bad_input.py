"""Rubbish in, one clear message out: the whole program, as a user meets it.

Every case runs the real command line and must end with exit code 1, a message that
names what came and what to do, no trace on the screen, and the trace in a file.
"""

import pathlib
import struct
import zlib

import cv2
import numpy as np
import pytest

from big_vision_lite import command_line, train

ROOT = pathlib.Path(__file__).parents[1]


def write_images(folder: pathlib.Path, classes: dict[str, int], side: int = 20) -> None:
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
            cv2.imwrite(str(folder / name / f"{index}.jpg"), pixels)


def two_classes(folder: pathlib.Path) -> pathlib.Path:
    write_images(folder, {"cat": 20, "dög s": 20})
    return folder


def empty(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir()
    return folder


def one_class(folder: pathlib.Path) -> pathlib.Path:
    write_images(folder, {"cat": 20})
    return folder


def no_folder(folder: pathlib.Path) -> pathlib.Path:
    return folder


def with_text(folder: pathlib.Path) -> pathlib.Path:
    two_classes(folder)
    (folder / "cat" / "not_an_image.jpg").write_text("hello")
    return folder


def with_nothing(folder: pathlib.Path) -> pathlib.Path:
    two_classes(folder)
    (folder / "cat" / "zero_bytes.png").write_bytes(b"")
    return folder


def truncated(folder: pathlib.Path) -> pathlib.Path:
    two_classes(folder)
    whole = (folder / "cat" / "0.jpg").read_bytes()
    (folder / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def huge(folder: pathlib.Path) -> pathlib.Path:
    two_classes(folder)
    whole = cv2.imencode(".png", np.zeros((1, 1), np.uint8))[1].tobytes()
    # Width and height stand in the first chunk, before its checksum.
    chunk = b"IHDR" + struct.pack(">II", 30_000, 30_000) + whole[24:29]
    crc = struct.pack(">I", zlib.crc32(chunk))
    (folder / "cat" / "huge.png").write_bytes(whole[:12] + chunk + crc + whole[33:])
    return folder


SMALL = ("--config.data.batch_size=8", "--config.num_steps=30")
CASES = {
    "no such folder": (no_folder, SMALL, "images"),
    "an empty folder": (empty, SMALL, "images"),
    "a folder with one class": (one_class, SMALL, "class"),
    "a file that is no image": (with_text, SMALL, "not_an_image.jpg"),
    "a file of no bytes": (with_nothing, SMALL, "zero_bytes.png"),
    "a truncated image": (truncated, SMALL, "cut.jpg"),
    "an image of 30,000 px a side": (huge, SMALL, "huge.png"),
    "a batch larger than the data": (
        two_classes,
        ("--config.data.batch_size=64",),
        "larger than the data set",
    ),
    "a batch that does not divide": (
        two_classes,
        ("--config.data.batch_size=12",),
        "use --config.data.batch_size=8 or 16",
    ),
    "no steps": (two_classes, ("--config.num_steps=0",), "num_steps=0"),
    "no epochs": (
        two_classes,
        ("--config.num_epochs=none", "--config.num_steps=none"),
        "set one",
    ),
    "a mesh of too many devices": (
        two_classes,
        (*SMALL, "--config.mesh.fsdp=3"),
        "--config.mesh.fsdp one of 1, 2, 4, 8",
    ),
    "a rule that freezes nothing": (
        two_classes,
        (*SMALL, "--config.freeze=('haed/.*',)"),
        "matches no name",
    ),
    "a start from nowhere": (
        two_classes,
        (*SMALL, "--config.init=build", "--config.init.path=/no/such/run"),
        "No complete checkpoint in /no/such/run",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_with_one_message(case, tmp_path, capsys, monkeypatch):
    make, flags, expected = CASES[case]
    folder = make(tmp_path / "my images")
    workdir = tmp_path / "run"
    recipe = f"{ROOT}/configs/folder.py:dir={folder},size=16"
    command = ["train", f"--config={recipe}", f"--workdir={workdir}", *flags]
    assert command_line.run(train.main, command) == 1
    shown = capsys.readouterr()
    assert expected in shown.err, shown.err
    assert "error: " in shown.err and "Traceback" not in shown.err + shown.out
    trace = pathlib.Path(shown.err.split("the trace is in ")[1].split(")")[0])
    assert "Traceback" in trace.read_text()


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_a_place_that_cannot_be_written_is_said_before_training(
    place, tmp_path, capsys
):
    (tmp_path / "file").write_text("in the way")
    workdir = place if place.startswith("/") else tmp_path / place
    recipe = f"{ROOT}/tests/recipes/digits_tiny.py"
    command = ["train", f"--config={recipe}", f"--workdir={workdir}"]
    assert command_line.run(train.main, command) == 1
    shown = capsys.readouterr().err
    assert f"Cannot write {workdir}" in shown
    assert "nothing was trained" in shown


def test_a_dry_run_shows_what_a_run_would_be_and_trains_nothing(tmp_path, capsys):
    recipe = f"{ROOT}/configs/quickstart.py"
    small = ("--config.model.width=8", "--config.data.batch_size=16")
    command = ["train", f"--config={recipe}", f"--workdir={tmp_path}", "--dry_run"]
    assert command_line.run(train.main, [*command, *small]) == 0
    shown = capsys.readouterr().out
    for word in ("(32, 10) float32", "parameters", "400 of 16", "memory"):
        assert word in shown
    assert [path.name for path in tmp_path.iterdir()] == ["first_batch.png"]
    grid = cv2.imread(str(tmp_path / "first_batch.png"))
    assert grid.shape == (20, 80, 3) and grid.max() > 200
