"""Rubbish in, one clear message out: the whole program, as a user meets it.

Every case runs the real command line and must end with exit code 1, a message that
names what came and what to do, no trace on the screen, and the trace in a file. What
is only odd is trained on. NaN and infinity come only in arrays, which no recipe can
hold: see test_sources.py.
"""

import json
import pathlib
import re
import resource
import shutil
import struct
import zlib

import cv2
import numpy as np
import pytest
import shapes_run
import simplejpeg
from etils import epath
from png_files import png
from prepared import prepare

from big_vision_lite import train
from big_vision_lite.recipes import command_line
from big_vision_lite.runs.folder import RunFolder
from big_vision_lite.runs.records import read_history

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
        (*SMALL, "--config.init.path=/no/such/run"),
        "No complete checkpoint in /no/such/run",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_with_one_message(case, tmp_path, capsys, monkeypatch):
    make, flags, expected = CASES[case]
    folder = make(tmp_path / "my images")
    workdir = tmp_path / "run"
    recipe = f"{ROOT}/configs/folder.py:dir={folder},size=16"
    command = [f"--config={recipe}", f"--workdir={workdir}", *flags]
    message = refusal(command, capsys)
    assert expected in message, message


def refusal(command: list[str], capsys) -> str:
    """Returns the one message that a command of train ends with."""
    assert command_line.run(train.main, ["train", *command]) == 1
    shown = capsys.readouterr()
    assert "error: " in shown.err and "Traceback" not in shown.err + shown.out
    trace = pathlib.Path(shown.err.split("the trace is in ")[1].split(")")[0])
    assert "Traceback" in trace.read_text()
    return shown.err


# Images like those of configs/folder.py, of a network that compiles in no time.
SHAPES = """
from big_vision_lite.data.ops import (
    CentralCrop, Decode, DecodeInceptionCrop, FlipLeftRight, ResizeSmall
)
import shapes_run

def get_config(folder):
    config = shapes_run.recipe(folder)
    config.data.ops = (DecodeInceptionCrop(size_px=16), FlipLeftRight())
    config.preprocess = (Decode(), ResizeSmall(size_px=18), CentralCrop(size_px=16))
    return config
"""


def shapes_command(place: pathlib.Path, images: pathlib.Path, *flags: str) -> list[str]:
    """Returns a command of train with a recipe written to `place`."""
    recipe = place / "shapes.py"
    recipe.write_text(SHAPES)
    return [f"--config={recipe}:{images}", "--allow_module=shapes_run", *flags]


def odd_images() -> dict[str, bytes]:
    """Images that are unusual and right, by file name."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    animation = cv2.Animation()
    animation.frames = [pixels, 255 - pixels]
    animation.durations = np.array([100, 100], np.int32)
    palette = bytes(range(12))
    written = {
        "one pixel.png": pixels[:1, :1, 0],
        "one pixel.jpg": pixels[:1, :1, :3],
        "one row.webp": pixels[:1, :, :3],
        "one column.bmp": pixels[:, :1, :3],
        "16 bit.png": pixels.astype(np.uint16) * 257,
        "gray.jpeg": pixels[..., 0],
        "transparent.PNG": pixels,
    }
    return {
        "animated ü.webp": cv2.imencodeanimation(".webp", animation)[1].tobytes(),
        "cmyk.jpg": simplejpeg.encode_jpeg(pixels.copy(), colorspace="CMYK"),
        "palette.png": png(4, 1, 8, 3, b"\0\0\1\2\3", (b"PLTE", palette)),
    } | {
        name: cv2.imencode(pathlib.Path(name).suffix.lower(), array)[1].tobytes()
        for name, array in written.items()
    }


def test_odd_images_are_trained_on_and_scored_like_all_others(tmp_path, capsys):
    files = odd_images()
    images = tmp_path / "Bilder, ungewöhnliche"
    for split in ("train", "val"):
        for name in shapes_run.CLASSES:
            folder = images / split / name
            folder.mkdir(parents=True)
            for file, data in files.items():
                (folder / file).write_bytes(data)
    # Four steps of 8 take each of the 30 images at least once.
    small = ("--config.data.batch_size=8", "--config.num_steps=4")
    off = "--config.evaluators.fewshot.every_steps=0"
    workdir = tmp_path / "ein Lauf"
    command = shapes_command(tmp_path, images, *small, off, f"--workdir={workdir}")
    command = ["train", *command]
    assert command_line.run(train.main, command) == 0, capsys.readouterr().err
    scores = {k: v for r in read_history(epath.Path(workdir)) for k, v in r.items()}
    assert scores["step"] == 4 and np.isfinite(scores["train/loss"])
    assert scores["val/examples"] == 30 and scores["val/unreadable"] == 0
    assert "Skipped" not in capsys.readouterr().out


def flip_a_byte(run: pathlib.Path) -> str:
    path = largest_file(run)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    return f"{path.name} is not what was saved"


def lose_a_file(run: pathlib.Path) -> str:
    path = largest_file(run)
    path.unlink()
    return f"{path.name} is missing"


def largest_file(run: pathlib.Path) -> pathlib.Path:
    folder = run / "checkpoints" / "10"
    return max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())


def write_a_newer_config(run: pathlib.Path) -> str:
    path = run / "config.json"
    document = json.loads(path.read_text())
    document["version"] = "99.0.0"
    document["config"]["model"]["depth"] = 3
    path.write_text(json.dumps(document))
    return "pip install 'big_vision_lite>=99.0.0'"


@pytest.mark.parametrize("damage", [flip_a_byte, lose_a_file, write_a_newer_config])
def test_a_damaged_or_newer_run_is_not_resumed(damage, tmp_path, capsys):
    images, run = shapes_run.shared()
    workdir = shutil.copytree(run, tmp_path / "run")
    expected = damage(workdir)
    command = shapes_command(tmp_path, images, f"--workdir={workdir}")
    # The recipe that the run was made by.
    (tmp_path / "shapes.py").write_text(
        "import shapes_run\ndef get_config(folder): return shapes_run.recipe(folder)"
    )
    assert expected in refusal(command, capsys)


@pytest.mark.parametrize("damage", [flip_a_byte, lose_a_file])
def test_a_damaged_run_is_not_started_from(damage, tmp_path, capsys):
    images, run = shapes_run.shared()
    other = shutil.copytree(run, tmp_path / "run")
    expected = damage(other)
    flags = (f"--workdir={tmp_path / 'new'}", f"--config.init.path={other}")
    assert expected in refusal(shapes_command(tmp_path, images, *flags), capsys)


def test_a_checkpoint_of_another_architecture_is_refused_with_the_names(
    tmp_path, capsys
):
    images, run = shapes_run.shared()
    wide, new = "--config.model.width=24", f"--workdir={tmp_path / 'new'}"
    start = f"--config.init.path={run}"
    message = refusal(shapes_command(tmp_path, images, wide, new, start), capsys)
    assert "+ encoder/kernel (768, 24)" in message
    assert "- encoder/kernel (768, 16)" in message
    # The same as the folder of the run itself.
    workdir = shutil.copytree(run, tmp_path / "run")
    resumed = shapes_command(tmp_path, images, wide, f"--workdir={workdir}")
    assert "model.width 16 -> 24" in refusal(resumed, capsys)


def test_two_runs_in_one_folder_are_refused(tmp_path, capsys):
    images, run = shapes_run.shared()
    workdir = shutil.copytree(run, tmp_path / "run")
    config = shapes_run.recipe(images)
    with RunFolder(epath.Path(workdir), config):
        command = shapes_command(tmp_path, images, f"--workdir={workdir}")
        assert "is in use by process" in refusal(command, capsys)


def test_a_full_disk_is_said_with_what_is_safe(tmp_path, capsys):
    images, _ = shapes_run.shared()
    command = shapes_command(tmp_path, images, f"--workdir={tmp_path / 'run'}")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel refuses files above a limit just as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        message = refusal(command, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Could not save step 5" in message and "Free disk" in message


def test_a_label_outside_of_the_range_is_refused_with_its_record(tmp_path, capsys):
    shape, splits = (28, 28, 1), {"train": 40, "test": 10}
    prepare(tmp_path, "fashion_mnist", shape=shape, num_classes=10, splits=splits)
    folder = tmp_path / "fashion_mnist" / "1.0.0"
    features = (folder / "features.json").read_text()
    assert '"numClasses": "10"' in features
    # The files hold labels to 9, and say that there are 7 classes.
    features = features.replace('"numClasses": "10"', '"numClasses": "7"')
    (folder / "features.json").write_text(features)
    names = (folder / "label.labels.txt").read_text().splitlines()[:7]
    (folder / "label.labels.txt").write_text("\n".join(names) + "\n")
    recipe = f"--config={ROOT}/configs/fashion_mnist.py:data_dir={tmp_path}"
    small = [
        f"--config.{name}"
        for name in (
            "model.width=16",
            "model.depth=1",
            "model.num_heads=2",
            "model.mlp_dim=16",
            "model.head.num_classes=7",
            "data.batch_size=8",
            "evaluators.test.batch_size=8",
            "num_steps=40",
        )
    ]
    message = refusal([recipe, f"--workdir={tmp_path / 'run'}", *small], capsys)
    assert re.search(r"fashion_mnist: record \d+ of .* has label=\[[789]\]", message)
    assert "expected one class of 0 to 6" in message


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
