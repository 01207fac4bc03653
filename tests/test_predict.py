"""Predictions from a run folder: the numbers of the model itself, for any folder."""

import csv
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import urllib.parse

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes_run

from big_vision_lite import predict, trees
from big_vision_lite.data.sources.files import ImageFiles
from big_vision_lite.data.sources.tfds import records
from big_vision_lite.objectives.classification import (
    SigmoidClassification,
    SoftmaxClassification,
)
from big_vision_lite.recipes import command_line
from big_vision_lite.runs import load, step_folder
from big_vision_lite.types import Logits, Objective


@pytest.fixture(scope="module")
def images():
    return shapes_run.shared()[0]


@pytest.fixture(scope="module")
def run():
    return shapes_run.shared()[1]


def command(run, images, *flags):
    argv = ["predict", "--workdir", run, "--images", images, *flags]
    argv += ["--allow_module", shapes_run.MODULE]
    return command_line.run(predict.main, [str(word) for word in argv])


def predicted(tmp_path, run, images, *flags):
    out = tmp_path / "preds.csv"
    assert command(run, images, "--out", out, *flags) == 0
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_top_1_agrees_with_the_accuracy_that_training_recorded(tmp_path, run, images):
    rows = predicted(tmp_path, run, images / "val")
    correct = sum(row["file"].split("/")[0] == row["class_1"] for row in rows)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    recorded = [r["val/accuracy"] for r in map(json.loads, lines) if "val/loss" in r]
    assert len(rows) == 27
    assert correct / 27 == recorded[-1]


def test_probabilities_equal_those_of_the_model_applied_by_hand(tmp_path, run, images):
    rows = predicted(tmp_path, run, images / "val", "--batch_size", "10")
    params, manifest = load.load_variables(step_folder.find(str(run)))
    apply = jax.jit(functools.partial(shapes_run.small_model().apply, train=False))
    for row in rows[::5]:
        file = (images / "val" / row["file"]).read_bytes()
        bgr = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
        small = cv2.resize(bgr, (16, 16), interpolation=cv2.INTER_LINEAR)
        outputs = apply({"params": trees.unflatten(params)}, small[None, ..., ::-1])
        by_hand = np.asarray(jax.nn.softmax(outputs["logits"][0]))
        order = np.argsort(-by_hand)
        names = [manifest["class_names"][i] for i in order]
        assert [row[f"class_{k}"] for k in (1, 2, 3)] == names
        found = [float(row[f"probability_{k}"]) for k in (1, 2, 3)]
        # JPEG: simplejpeg's and OpenCV's decoders differ by a unit or two in some
        # pixels; all else is lossless.
        atol = 2e-2 if row["file"].lower().endswith(("jpg", "jpeg")) else 1e-5
        np.testing.assert_allclose(found, by_hand[order], atol=atol)


def test_files_are_sorted_and_found_at_any_depth_in_any_case(tmp_path, run, images):
    folder = tmp_path / "a folder, with ünicode"
    (folder / "b" / "deeper").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    source = images / "val" / "disc"
    for name, target in (
        ("000.jpg", "Z.JPG"),
        ("001.png", "b/deeper/1.PnG"),
        ("003.webp", "b/ö.webp"),
        ("004.bmp", "a,b.bmp"),
        ("001.png", ".hidden/no.png"),
        ("001.png", "._z.png"),
    ):
        shutil.copy(source / name, folder / target)
    (folder / "notes.txt").write_text("no image")
    (folder / "b" / "loop").symlink_to(folder)
    rows = predicted(tmp_path, run, folder)
    assert [row["file"] for row in rows] == [
        "Z.JPG",
        "a,b.bmp",
        "b/deeper/1.PnG",
        "b/ö.webp",
    ]


def test_what_is_left_out_is_counted_by_kind(tmp_path, run, images, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    shutil.copy(images / "val" / "disc" / "000.jpg", folder)
    for name in ("a.heic", "b.HEIC", "c.svg", "no_suffix", ".hidden.gif"):
        (folder / name).write_bytes(b"<svg" if name == "c.svg" else b"")
    assert len(predicted(tmp_path, run, folder)) == 1
    shown = capsys.readouterr().out
    assert "left out: 2 .heic files, such as a.heic: empty\n" in shown
    assert "left out: 1 .svg files, such as c.svg: SVG, which is not read; " in shown
    assert "left out: 1 files without a suffix, such as no_suffix: empty\n" in shown
    assert "left out: 1 hidden files and folders, such as .hidden.gif\n" in shown


def test_help_keeps_its_lines(capsys):
    with pytest.raises(SystemExit):
        predict.parse(["predict", "--help"])
    assert predict.__doc__.strip() in capsys.readouterr().out


def test_unreadable_files_have_a_row_that_says_why(tmp_path, run, images, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    whole = (images / "val" / "disc" / "000.jpg").read_bytes()
    (folder / "1_good.jpg").write_bytes(whole)
    (folder / "2_cut.jpg").write_bytes(whole[:200])
    (folder / "3_empty.png").write_bytes(b"")
    (folder / "4_text.jpg").write_text("no image at all")
    rows = predicted(tmp_path, run, folder, "--embed", str(tmp_path / "f.npz"))
    assert [bool(row["error"]) for row in rows] == [False, True, True, True]
    assert "empty" in rows[2]["error"] and rows[2]["class_1"] == ""
    assert rows[0]["class_1"] in shapes_run.CLASSES
    assert "3 of 4 images cannot be read" in capsys.readouterr().out
    features = np.load(tmp_path / "f.npz", allow_pickle=False)
    assert features["files"].tolist() == ["1_good.jpg"]


ODD_NAMES = (
    b"caf\xe9.png",
    b"caf%E9.png",
    b"100%.png",
    b"a%20b.png",
    b'quote",comma.png',
    b"two\nlines.png",
    b"return\rhere.png",
    b" blank .png",
    b"=SUM(A1).png",
    "ä".encode() * 125 + b"x.png",
)


def test_every_path_has_a_row_whatever_it_is_or_happens(
    tmp_path, run, images, monkeypatch, capsys
):
    folder = tmp_path / "all kinds"
    (folder / "closed").mkdir(parents=True)
    good = (images / "val" / "disc" / "001.png").read_bytes()
    for name in ODD_NAMES:
        (folder / os.fsdecode(name)).write_bytes(good)
    (folder / "link.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "null.jpg").symlink_to("/dev/null")
    # A file that not even root reads.
    (folder / "memory.png").symlink_to("/proc/self/mem")
    os.mkfifo(folder / "pipe.png")
    (folder / "vanishes.png").write_bytes(good)
    scan, listed = os.scandir, ImageFiles.__init__

    def refuse(path):  # as for anyone but root
        if os.fspath(path) == str(folder / "closed"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scan(path)

    def list_then_lose(self, path):
        listed(self, path)
        (folder / "vanishes.png").unlink()

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(ImageFiles, "__init__", list_then_lose)
    monkeypatch.setattr(records, "RETRY_SECONDS", (0.0,))
    rows = predicted(tmp_path, run, folder, "--batch_size", "8")
    found = {urllib.parse.unquote_to_bytes(row["file"]): row for row in rows}
    assert len(found) == len(rows) == len(ODD_NAMES) + 7
    expected = {
        b"link.png": "a link to nowhere.png, which is not there",
        b"loop.png": "a link that leads to itself",
        b"null.jpg": "a device",
        b"memory.png": "Input/output error",
        b"pipe.png": "a named pipe",
        b"vanishes.png": "cannot be opened: No such file",
        b"closed": "the folder cannot be opened: Permission denied",
    }
    assert set(found) == {*ODD_NAMES, *expected}
    for name, reason in expected.items():
        assert reason in found[name]["error"] and not found[name]["class_1"]
    scores = {found[name]["probability_1"] for name in ODD_NAMES}
    assert len(scores) == 1 and "" not in scores
    # Names are as they are where nothing is in the way.
    assert {"100%.png", " blank .png", "caf%E9.png", "caf%25E9.png"} <= {
        row["file"] for row in rows
    }
    said = capsys.readouterr().out
    assert "7 of 17 images cannot be read" in said and "left out" not in said


def test_one_good_image_after_many_bad_ones_has_its_row(tmp_path, run, images):
    folder = tmp_path / "mostly bad"
    folder.mkdir()
    for index in range(150):
        (folder / f"{index:03d}.png").write_bytes(b"no image")
    shutil.copy(images / "val" / "disc" / "001.png", folder / "z.png")
    rows = predicted(tmp_path, run, folder)
    assert [row["file"] for row in rows if row["class_1"]] == ["z.png"]
    assert len(rows) == 151


def test_features_are_the_pooled_output_of_every_file(tmp_path, run, images):
    out = tmp_path / "deep" / "features.npz"
    assert command(run, images / "val", "--embed", out) == 0
    arrays = np.load(out, allow_pickle=False)
    assert arrays["features"].shape == (27, 16)
    assert arrays["features"].dtype == np.float32
    # The head is linear: features times its kernel are the logits behind the table.
    params, manifest = load.load_variables(step_folder.find(str(run)))
    logits = arrays["features"] @ params["head/kernel"] + params["head/bias"]
    rows = predicted(tmp_path, run, images / "val")
    names = [manifest["class_names"][i] for i in logits.argmax(1)]
    assert [row["class_1"] for row in rows] == names
    assert [row["file"] for row in rows] == arrays["files"].tolist()


def test_one_device_predicts_what_eight_do(run, images):
    files = ImageFiles(str(images / "val"))
    found = {
        count: predict.predict(
            shapes_run.load_run(run, devices=jax.devices()[:count]), files, embed=True
        )
        for count in (1, 8)
    }
    np.testing.assert_array_equal(found[1].classes, found[8].classes)
    # float32, two blocks: other row counts a device give other last bits.
    np.testing.assert_allclose(found[1].features, found[8].features, atol=1e-5)


def test_run_checkpoints_and_copied_step_folder_predict_alike(tmp_path, run, images):
    copied = tmp_path / "elsewhere"
    shutil.copytree(run / "checkpoints" / "10", copied)
    tables = [
        predicted(tmp_path, path, images / "val")
        for path in (run, run / "checkpoints", run / "checkpoints" / "10", copied)
    ]
    assert tables[0] == tables[1] == tables[2] == tables[3]


def test_top_limits_the_columns_to_what_is_asked_and_there(tmp_path, run, images):
    two = predicted(tmp_path, run, images / "val", "--top", "2")
    assert list(two[0]) == [
        "file",
        "class_1",
        "probability_1",
        "class_2",
        "probability_2",
        "error",
    ]
    five = predicted(tmp_path, run, images / "val" / "disc" / "000.jpg")
    assert "class_3" in five[0] and "class_4" not in five[0] and len(five) == 1


def test_sigmoid_objectives_give_a_probability_a_class():
    logits = jnp.asarray([[0.0, 2.0, -1.0]])
    softmax = SoftmaxClassification().logits.outputs(logits)
    sigmoid = SigmoidClassification().logits.outputs(logits)
    np.testing.assert_allclose(softmax.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-logits)), rtol=1e-6)


class Unsaid(Objective):
    """An objective of one's own that does not say what its logits mean."""

    def __call__(self, forward, batch, rng):
        raise AssertionError("not called for a prediction")


class Several(Unsaid):
    """A multi-label one, by another name than ours."""

    logits = Logits.SIGMOID


@pytest.mark.parametrize("top", [0, 3])
def test_an_objective_of_ones_own_says_what_its_logits_mean(run, images, top):
    found, said = {}, {}
    for objective in (Several(), Unsaid(), SoftmaxClassification()):
        loaded = shapes_run.load_run(run)
        loaded.config.objective = objective
        name, lines = type(objective).__name__, []
        found[name] = predict.predict(
            loaded,
            ImageFiles(str(images / "val")),
            top=top,
            embed=True,
            log=lines.append,
        )
        said[name] = lines
    assert said["Several"] == said["SoftmaxClassification"] == []
    if not top:
        assert said["Unsaid"] == []
        return
    (line,) = said["Unsaid"]
    assert "Unsaid does not say what its logits mean" in line
    assert "logits: ClassVar = Logits.SIGMOID" in line
    # With the head applied by hand: a sigmoid a class, which need not sum to one.
    params = shapes_run.load_run(run).state.params["head"]
    logits = found["Several"].features @ params["kernel"] + params["bias"]
    expected = -np.sort(-1 / (1 + np.exp(-logits)), axis=1)
    several = found["Several"].probabilities
    np.testing.assert_allclose(several, expected, rtol=1e-4)  # float32, one matmul
    assert np.ptp(several.sum(axis=1)) > 0.01
    for name in ("Unsaid", "SoftmaxClassification"):
        np.testing.assert_allclose(found[name].probabilities.sum(axis=1), 1, rtol=1e-5)


def test_mistakes_are_one_message_and_leave_no_file(tmp_path, run, images, capsys):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "a.jpg").write_text("text")
    two = pathlib.Path(shutil.copytree(broken, tmp_path / "two"))
    (two / "b.jpg").write_text("text")
    out = tmp_path / "preds.csv"
    for workdir, folder, words in (
        (run, tmp_path / "emty", ["there is no folder", "empty"]),
        (run, empty, ["holds no images", "nothing"]),
        (run, broken, [f"{broken}/a.jpg cannot be read: not"]),
        (run, broken / "a.jpg", [f"{broken}/a.jpg cannot be read: not"]),
        (run, two, ["Not one of 2 images", f"the first is {two}/a.jpg: not"]),
        (tmp_path, images, ["No complete checkpoint"]),
    ):
        assert command(workdir, folder, "--out", out) == 1
        error = capsys.readouterr().err
        assert all(word in error for word in words), error
        assert "in a row" not in error
        assert not out.exists()
    assert command(run, images, "--out", empty) == 1
    assert "is a folder" in capsys.readouterr().err
    assert command(run, images, "--out", out, "--embed", out) == 1
    assert "--out and --embed are both" in capsys.readouterr().err
    argv = ["predict", "--workdir", str(run), "--images", str(images)]
    # Without --allow_module a stranger's checkpoint imports nothing.
    assert command_line.run(predict.main, [*argv, "--out", str(out)]) == 1
    assert "--allow_module=shapes_run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        predict.parse(argv)
    assert "--embed" in capsys.readouterr().err


def test_a_model_without_head_embeds_and_says_so_when_asked_for_classes(run, images):
    loaded = shapes_run.load_run(run)
    loaded.config.model = shapes_run.small_model(None)
    del loaded.state.params["head"]
    files = ImageFiles(str(images / "val"))
    found = predict.predict(loaded, files, top=0, embed=True)
    assert found.classes is None and found.features.shape == (27, 16)
    with pytest.raises(ValueError, match="no head.*--embed"):
        predict.predict(loaded, files)


@pytest.mark.slow
@pytest.mark.processes
def test_the_command_runs_alone_and_imports_no_other_framework(tmp_path, run, images):
    code = (
        "import sys; from big_vision_lite import predict;"
        "from big_vision_lite.recipes import command_line;"
        "code = command_line.run(predict.main, sys.argv);"
        "found = {'tensorflow', 'torch', 'pandas'} & set(sys.modules);"
        "sys.exit(code or (str(found) if found else 0))"
    )
    argv = ["--workdir", run, "--images", images, "--out", tmp_path / "p.csv"]
    argv += ["--allow_module", shapes_run.MODULE]
    subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        check=True,
        env=dict(os.environ, PYTHONPATH=os.path.dirname(__file__)),
    )
