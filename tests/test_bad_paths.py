"""Every program with every kind of bad path: exit code, one message, nothing lost."""

import errno
import os
import pathlib
import sys

import check_dataset
import convert_checkpoint
import cv2
import numpy as np
import pytest

from big_vision_lite import evaluate, predict, train
from big_vision_lite.recipes import command_line

ROOT = pathlib.Path(__file__).parents[1]
LONG = "ä" * 127 + "x"  # 255 bytes, the most that file systems hold
NOT_UTF8 = os.fsdecode(b"caf\xe9")


def missing(place):
    return place / "nowhere"


def link(place):
    (place / "link").symlink_to("nowhere")
    return place / "link"


def loop(place):
    (place / "loop").symlink_to("loop")
    return place / "loop"


def pipe(place):
    os.mkfifo(place / "pipe")
    return place / "pipe"


def device(place):
    return pathlib.Path("/dev/null")


def file(place):
    (place / "file").write_text("a file")
    return place / "file"


def empty_file(place):
    (place / "empty_file").touch()
    return place / "empty_file"


def below_a_file(place):
    return file(place) / "below"


def folder(place):
    (place / "folder").mkdir()
    (place / "folder" / "notes.txt").write_text("x")
    return place / "folder"


def empty(place):
    (place / "empty").mkdir()
    return place / "empty"


def long(place):
    (place / LONG).mkdir()
    return place / LONG


def too_long(place):
    return place / (LONG + "x")


def not_utf8(place):
    (place / NOT_UTF8).mkdir()
    return place / NOT_UTF8


def no_permission(place):
    """Closed for anyone but root, for whom `refused_permission` plays it."""
    (place / "closed").mkdir()
    return place / "closed"


KINDS = (
    *(missing, link, loop, pipe, device, file, empty_file, below_a_file, folder),
    *(empty, long, too_long, not_utf8, no_permission),
)
FOLDER_RECIPE = f"{ROOT}/configs/folder.py:dir={{}},size=16,batch=8"
# The program, and its words with {} for the path.
USES = {
    "train, images": (train, ["--config=" + FOLDER_RECIPE, "--workdir={run}"]),
    "train, recipe": (train, ["--config={}", "--workdir={run}"]),
    "train, run": (
        train,
        [f"--config={ROOT}/tests/recipes/digits_tiny.py", "--workdir={}", "--dry_run"],
    ),
    "train, resumed": (train, ["--workdir={}"]),
    "train, start": (
        train,
        [
            f"--config={ROOT}/tests/recipes/digits_tiny.py",
            *("--workdir={run}", "--config.init.path={}"),
        ],
    ),
    "evaluate, run": (evaluate, ["--workdir={}"]),
    "evaluate, images": (
        evaluate,
        ["--workdir={run}", "--config=" + FOLDER_RECIPE],
    ),
    "predict, run": (
        predict,
        ["--workdir", "{}", "--images", "{images}", "--out", "{out}"],
    ),
    "predict, images": (
        predict,
        ["--workdir", "{run}", "--images", "{}", "--out", "{out}"],
    ),
    "predict, table": (
        predict,
        ["--workdir", "{run}", "--images", "{images}", "--out", "{}"],
    ),
    "check_dataset": (check_dataset, ["{}"]),
    "convert, weights": (
        convert_checkpoint,
        ["{}", "--to", "npz", "--out", "{out}"],
    ),
    "convert, result": (
        convert_checkpoint,
        ["{run}", "--to", "npz", "--out", "{}"],
    ),
}


def refused_permission(monkeypatch, closed: pathlib.Path) -> None:
    """Refuses a folder to this process, as the system does to anyone but root."""
    inside = os.fspath(closed)

    def guard(call):
        def guarded(path=".", *words, **named):
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(
                inside
            ):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return call(path, *words, **named)

        return guarded

    for name in ("scandir", "listdir", "mkdir", "open"):
        monkeypatch.setattr(os, name, guard(getattr(os, name)))
    monkeypatch.setattr("builtins.open", guard(open))
    monkeypatch.setattr("io.open", guard(open))


def snapshot(place: pathlib.Path) -> dict[str, object]:
    """What lies below a folder: kinds, bytes and the targets of links."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = os.lstat(path).st_mode
    return found


# These build their model, or start the devices, before they meet the path.
SLOW = ("train, run", "train, start")
FEW = (link, pipe, not_utf8)
CASES = [
    *(pytest.param(use, FEW if use in SLOW else KINDS, id=use) for use in USES),
    *(
        pytest.param(use, KINDS, id=f"{use}, all", marks=pytest.mark.slow)
        for use in SLOW
    ),
]


@pytest.mark.parametrize(("use", "kinds"), CASES)
def test_every_kind_of_bad_path_is_one_message_and_costs_nothing(
    use, kinds, tmp_path, capfd, monkeypatch
):
    program, words = USES[use]
    images = tmp_path / "images"
    images.mkdir()
    cv2.imwrite(str(images / "a.png"), np.zeros((4, 4, 3), np.uint8))
    monkeypatch.setattr(sys, "argv", ["program"])
    faults = []
    for kind in filter(lambda kind: is_bad(use, kind.__name__), kinds):
        place = tmp_path / kind.__name__
        place.mkdir()
        bad = kind(place)
        before = snapshot(place)
        given = {"run": place / "run", "images": images, "out": place / "out"}
        typed = [word.format(bad, **given) for word in words]
        with monkeypatch.context() as patch:
            if kind is no_permission:
                refused_permission(patch, bad)
            code, said = ended(program, typed, capfd)
        messages = sum(map(said.count, ("error: ", "PROBLEM: ", "Cannot open the set")))
        left = {n: x for n, x in snapshot(place).items() if not n.startswith("run")}
        named = "caf" if kind is not_utf8 else bad.name[:99]
        messages *= named in said
        unclear = [w for w in ("Traceback", "codec", "[Errno") if w in said]
        expected = 2 if program is check_dataset else 1
        if (code, messages, unclear, left) != (expected, 1, [], before):
            lost = before.items() ^ left.items()
            faults.append((kind.__name__, code, messages, unclear, lost, said[-300:]))
    assert not faults, "\n\n".join(map(str, faults))


def is_bad(use: str, kind: str) -> bool:
    if use == "train, run":  # any new folder will do, and files stay beside ours
        return kind not in ("missing", "link", "empty", "long", "folder")
    if use in ("predict, table", "convert, result"):
        good = ("missing", "link", "file", "empty_file", "long", "empty")
        result = ("missing", "empty")
        return kind not in (good if use == "predict, table" else result)
    return True


def ended(program, typed, capfd) -> tuple[int, str]:
    capfd.readouterr()
    if program is check_dataset:
        code = program.main(typed)
    else:
        code = command_line.run(program.main, ["program", *typed])
    shown = capfd.readouterr()
    return code, shown.out + shown.err
