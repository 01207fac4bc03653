"""A run goes to another library and back: the same bits, the same answers."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from big_vision_lite import loaded_weights, step_folder
from big_vision_lite.conversion import export, foreign
from big_vision_lite.conversion.formats import Library

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = ROOT / "tests" / "recipes" / "digits_vit.py"


def command(module, *arguments, check=True, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *module, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=check,
        cwd=cwd,
    )


def convert(*arguments, check=True):
    return command(["tools/convert_checkpoint.py"], *arguments, check=check)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A ViT with a class token, trained a little on the digits."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    train = ["-m", "big_vision_lite.train"]
    command(train, "--config", RECIPE, "--workdir", folder)
    return folder


def variables_of(run):
    return loaded_weights.load_variables(step_folder.find(run))[0]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("library", ["safetensors", "npz", "timm", "huggingface"])
def test_there_and_back_again_gives_the_same_bits(library, run, tmp_path):
    if library in ("timm", "huggingface"):
        pytest.importorskip("timm" if library == "timm" else "transformers")
    out = tmp_path / "with spaces"
    shown = convert(run, "--to", library, "--out", out).stdout
    assert "arrays of" in shown and "To use it:" in shown
    assert_same(foreign.load(str(out)).variables, variables_of(run))
    # And as a run again, from which the same bits are read.
    convert(out, "--to", "orbax", "--out", tmp_path / "again")
    assert_same(variables_of(tmp_path / "again"), variables_of(run))
    _, manifest = loaded_weights.load_variables(step_folder.find(tmp_path / "again"))
    assert manifest["origin"]["path"] == str(out)
    assert manifest["class_names"] == list("0123456789")


@pytest.mark.parametrize("library", ["timm", "huggingface"])
def test_the_other_library_gives_every_digit_the_same_class(library, run, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm" if library == "timm" else "transformers")
    out = tmp_path / library
    convert(run, "--to", library, "--out", out)
    report = (out / "parity.txt").read_text()
    assert "FAILED" not in report and "encoder/block_01" in report

    images = digits(tmp_path / "images")
    predict = ["-m", "big_vision_lite.predict"]
    rows = {}
    for name, place in (("ours", run), ("theirs", out)):
        path = tmp_path / f"{name}.csv"
        command(predict, "--workdir", place, "--images", images[0], "--out", path)
        rows[name] = [x.split(",")[1] for x in path.read_text().splitlines()[1:]]
    assert rows["ours"] == rows["theirs"] and len(rows["ours"]) == len(images[1])

    model = use(library, out)
    pixels = torch.from_numpy((images[1] / 127.5 - 1)[:, None].astype(np.float32))
    with torch.no_grad():
        logits = model(pixels)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    names = [str(label) for label in logits.argmax(-1).tolist()]
    assert names == rows["ours"]


def digits(folder):
    """Writes the test digits as PNG; returns the folder and the images."""
    import cv2

    from big_vision_lite.data.sources import Digits

    folder.mkdir()
    source = Digits(split="test")
    images = np.stack([source[i]["image"][..., 0] for i in range(len(source))])
    for index, image in enumerate(images):
        cv2.imwrite(str(folder / f"{index:04d}.png"), image)
    return folder, images


def use(library, folder):
    if library == "timm":
        import timm

        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    import transformers

    kind = transformers.AutoModelForImageClassification
    return kind.from_pretrained(folder).eval()


def test_a_wrong_number_is_found_by_its_layer_and_fails(run, tmp_path, monkeypatch):
    pytest.importorskip("timm")
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tools")!r})
import convert_checkpoint
from big_vision_lite.conversion import export
write = export.write
def damaged(exported, folder):
    name = "blocks.1.mlp.fc1.bias"
    exported.arrays[name] = exported.arrays[name] + 0.5
    write(exported, folder)
export.write = damaged
convert_checkpoint.main(["", {str(run)!r}, "--to", "timm", "--out", sys.argv[1]])
"""
    done = command(["-c", script], tmp_path / "out", check=False)
    assert done.returncode == 1
    assert "FAILED: the first that differs is encoder/block_01/mlp" in done.stdout


def test_what_has_no_counterpart_is_refused_before_anything_is_written(tmp_path, run):
    done = convert(run, "--to", "torchvision", "--out", tmp_path / "x", check=False)
    assert done.returncode != 0 and not (tmp_path / "x").exists()
    assert "torchvision has no counterpart of ViT; it can go to: huggingface" in (
        done.stdout + done.stderr
    )


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = convert(run, "--to", "safetensors", "--out", tmp_path, check=False)
    assert done.returncode != 0 and "is not empty" in done.stdout + done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_fine_tuning_from_either_gives_the_same_losses(run, tmp_path):
    pytest.importorskip("timm")
    convert(run, "--to", "timm", "--out", tmp_path / "timm")
    losses = []
    for name, start in (("own", run), ("timm", tmp_path / "timm")):
        train = ["-m", "big_vision_lite.train", "--config", RECIPE]
        init = ["--config.init=build", f"--config.init.path={start}"]
        more = ["--config.init.drop=head/.*", "--config.num_steps=5"]
        command(train, *init, *more, "--workdir", tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(x).get("train/loss") for x in lines])
    assert losses[0] == losses[1] and any(losses[0])


def damaged(case, arrays):
    name = "blocks.0.attn.qkv.weight"
    match case:
        case "missing":
            del arrays[name]
        case "extra":
            arrays["blocks.0.attn.extra"] = np.ones(3, np.float32)
        case "shape":
            arrays["blocks.0.mlp.fc1.bias"] = np.ones(7, np.float32)
        case "nan":
            arrays[name] = arrays[name].copy()
            arrays[name][0, 0] = np.nan
    return arrays


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("missing", r"\+ blocks.0.attn.qkv.weight  only in the model"),
        ("extra", r"- blocks.0.attn.extra \(3,\) float32  only in the file"),
        ("shape", r"- blocks.0.mlp.fc1.bias  gives encoder/block_00/mlp/hidden/bias"),
        ("nan", r"- blocks.0.attn.qkv.weight  holds NaN or infinity"),
    ],
)
def test_damaged_weights_are_refused_with_their_names(case, line, run, tmp_path):
    found = foreign.load(str(step_folder_as(run, tmp_path / "x")))
    assert found.format.startswith("timm")
    arrays = safetensors.numpy.load_file(tmp_path / "x" / "model.safetensors")
    safetensors.numpy.save_file(
        damaged(case, dict(arrays)), tmp_path / "x" / "model.safetensors"
    )
    with pytest.raises(ValueError, match=line):
        foreign.load(str(tmp_path / "x"))


def step_folder_as(run, out):
    """Exports a run to timm's names without timm."""
    from big_vision_lite import run_folder
    from big_vision_lite.conversion.preprocessing import Preprocessing

    config = run_folder.read_config(step_folder.find(run))
    road = Preprocessing(
        ops=config.preprocess, mean=(127.5,), std=(127.5,), image_size=(8, 8)
    )
    exported = export.export(
        config.model, variables_of(run), road, 1, (), Library.TIMM, str(out)
    )
    export.write(exported, out)
    return out
