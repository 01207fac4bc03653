"""A run goes to another library and back: the same bits, the same answers."""

import dataclasses
import importlib.util
import json
import math
import pathlib

import convert_checkpoint
import jax
import numpy as np
import parity
import pytest
import safetensors.numpy
import torch_libraries
from etils import epath
from foreign_models import write_gray_resnet

from big_vision_lite import predict, train, trees
from big_vision_lite.conversion import export, foreign
from big_vision_lite.conversion.formats import Library
from big_vision_lite.data.sources.files import ImageFiles
from big_vision_lite.recipes import command_line
from big_vision_lite.runs import load, step_folder

pytestmark = pytest.mark.parity

torch_libraries.import_torchvision()
ROOT = pathlib.Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "recipes" / "digits_vit.py"


def convert(*arguments):
    convert_checkpoint.main(["convert_checkpoint.py", *map(str, arguments)])


def recipe(*overrides):
    flags = ["train", f"--config={RECIPE}", *overrides]
    return command_line.parse(flags, lambda values: None).config


def trained(workdir, *overrides):
    return train.train(recipe(*overrides), epath.Path(workdir), quiet=True)


def test_what_is_rounding_on_both_sides_is_no_failure():
    """BiT at 224 px: either side is more than 1e-5 from itself in float64."""

    def report(difference, *rounding):
        return parity.Report(
            logits={"photographs": difference},
            rounding={"photographs": rounding} if rounding else {},
            layers=[],
            scale=1.0,
            inexact=False,
            pixels=0.0,
            same_top1=8,
            num_images=8,
        )

    assert report(9e-6).passed
    rounded = report(2e-5, 3e-6, 2e-5)
    assert rounded.passed and report(4e-5, 2e-5, 3e-5).passed
    assert (
        "on photographs ours are 3.0e-06 from theirs in float64, theirs in float32 "
        "2.0e-05: rounding"
    ) in rounded.text()
    assert not report(4e-5, 4e-5, 1e-5).passed
    wrong = report(2e-5, 2e-5, 1e-7)
    assert not wrong.passed and "1.0e-07: rounding" not in wrong.text()
    assert "FAILED: the first that differs is the head" in wrong.text()


@pytest.mark.parametrize(
    ("fields", "passed", "said"),
    [
        ({}, True, "most 0 of 255"),
        ({"logits": {"photographs": math.nan}}, False, "FAILED: the first"),
        ({"pixels": 22.0}, False, "FAILED: the preprocessings differ by 22 of 255"),
        ({"pixels": 22.0, "inexact": True}, True, "most 22 of 255"),
        (
            {"pixels": 22.0, "logits": {"photographs": 0.5}},
            False,
            "(bound 8)\nFAILED: the first that differs is the head",
        ),
        ({"scale": 0.0}, False, "FAILED: the first that differs is the head"),
        ({"scale": 0.0, "layers": [1e-6]}, True, "all logits are 0"),
        ({"scale": 0.0, "layers": [0.9]}, False, "differs is norm = theirs"),
    ],
)
def test_what_proves_nothing_or_shows_a_difference_fails(fields, passed, said):
    layers = [
        parity.Layer(ours="norm", theirs="theirs", difference=difference)
        for difference in fields.get("layers", [])
    ]
    whole = dict(logits={"photographs": 0.0}, scale=1.0, pixels=0.0, inexact=False)
    whole |= dict(rounding={"photographs": (math.nan, 1e-7)}, same_top1=8)
    report = parity.Report(**{**whole, **fields, "layers": layers}, num_images=8)
    assert report.passed == passed and said in report.text()
    assert ("FAILED" in report.text()) != passed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A ViT with a class token, trained a little on the digits."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    trained(folder)
    return folder


def variables_of(run):
    return load.load_variables(step_folder.find(str(run)))[0]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("library", ["safetensors", "npz", "timm", "huggingface"])
def test_there_and_back_again_gives_the_same_bits(library, run, tmp_path, capsys):
    if library in ("timm", "huggingface"):
        pytest.importorskip("timm" if library == "timm" else "transformers")
    out = tmp_path / "with spaces"
    convert(run, "--to", library, "--out", out)
    shown = capsys.readouterr().out
    assert "arrays of" in shown and "To use it:" in shown
    ours = library in ("safetensors", "npz")
    assert ours == ("JAX weights. For PyTorch: python tools/convert_che" in shown)
    assert_same(foreign.load(str(out)).variables, variables_of(run))
    # And as a run again, from which the same bits are read.
    convert(out, "--to", "orbax", "--out", tmp_path / "again")
    assert_same(variables_of(tmp_path / "again"), variables_of(run))
    _, manifest = load.load_variables(step_folder.find(str(tmp_path / "again")))
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

    folder, pixels = digits(tmp_path / "images")
    found = {}
    for place in (run, out):
        opened = load.load(str(place), devices=jax.devices()[:1])
        found[place] = predict.predict(opened, ImageFiles(str(folder)), top=1).classes
    np.testing.assert_array_equal(found[run], found[out])

    model = use(library, out)
    pixels = torch.from_numpy((pixels / 127.5 - 1)[:, None].astype(np.float32))
    with torch.no_grad():
        logits = model(pixels)
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    np.testing.assert_array_equal(logits.argmax(-1).numpy(), found[run][:, 0])


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


def test_a_wrong_number_is_found_by_its_layer_and_fails(
    run, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("timm")
    write = export.write

    def damaged(exported, folder):
        name = "blocks.1.mlp.fc1.bias"
        exported.arrays[name] = exported.arrays[name] + 0.5
        write(exported, folder)

    monkeypatch.setattr(export, "write", damaged)
    with pytest.raises(SystemExit) as caught:
        convert(run, "--to", "timm", "--out", tmp_path / "out")
    assert caught.value.code == 1
    shown = capsys.readouterr().out
    assert "FAILED: the first that differs is encoder/block_01/mlp/hidden" in shown


def test_weights_that_are_not_finite_leave_nothing_behind(run, tmp_path, monkeypatch):
    intact = load.load

    def damaged(*arguments, **options):
        found = intact(*arguments, **options)
        params = trees.flatten(found.state.params)
        params["head/bias"] = params["head/bias"] * math.nan
        state = found.state.replace(params=trees.unflatten(params))
        return dataclasses.replace(found, state=state)

    monkeypatch.setattr(load, "load", damaged)
    with pytest.raises(ValueError, match="head/bias holds NaN or infinity. Export an"):
        convert(run, "--to", "npz", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("absent", ["torch", "transformers"])
def test_what_is_not_installed_to_compare_is_named(
    absent, run, tmp_path, monkeypatch, capsys
):
    find = importlib.util.find_spec

    def found(name):
        return None if name == absent else find(name) or object()

    monkeypatch.setattr(importlib.util, "find_spec", found)
    convert(run, "--to", "huggingface", "--out", tmp_path / "out")
    said = f"Parity was not compared: {absent} not installed (pip install"
    assert said in capsys.readouterr().out


def test_what_has_no_counterpart_is_refused_before_anything_is_written(tmp_path, run):
    message = "this model activation=gelu_tanh.*--to timm"
    with pytest.raises(ValueError, match=message):
        convert(run, "--to", "torchvision", "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for target in ("safetensors", "orbax"):
        with pytest.raises(ValueError, match="is not empty"):
            convert(run, "--to", target, "--out", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.tools
def test_fine_tuning_from_either_gives_the_same_losses(run, tmp_path):
    pytest.importorskip("timm")
    convert(run, "--to", "timm", "--out", tmp_path / "timm")
    losses = []
    for name, start in (("own", run), ("timm", tmp_path / "timm")):
        workdir = tmp_path / f"from_{name}"
        trained(
            workdir,
            f"--config.init.path={start}",
            "--config.init.drop=head/.*",
            "--config.num_steps=5",
        )
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(x).get("train/loss") for x in lines])
    assert losses[0] == losses[1] and any(losses[0])


def damaged(case, arrays):
    name = "blocks.0.attn.qkv.weight"
    match case:
        case "missing":
            del arrays["blocks.1.norm1.weight"]
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
        ("missing", r"\+ blocks.1.norm1.weight  only in the model"),
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
    from big_vision_lite.conversion.preprocessing import Preprocessing
    from big_vision_lite.runs import folder as run_folder

    config = run_folder.read_config(step_folder.find(str(run)))
    road = Preprocessing(
        ops=config.preprocess, mean=(127.5,), std=(127.5,), image_size_px=(8, 8)
    )
    exported = export.export(
        config.model, variables_of(run), road, 1, (), None, Library.TIMM, str(out)
    )
    export.write(exported, out)
    return out


def test_what_is_assumed_of_weights_stands_in_parity_and_in_the_run(tmp_path):
    weights = write_gray_resnet(tmp_path / "weights", (0.2, 0.8))
    run, out = tmp_path / "run", tmp_path / "out"
    convert_checkpoint.main(["", str(weights), "--to", "orbax", "--out", str(run)])
    convert_checkpoint.main(["", str(run), "--to", "safetensors", "--out", str(out)])
    text = (out / "parity.txt").read_text()
    assert text.startswith("Read back: ")
    for about in ("meaning of logits: softmax assumed", "classes: no names come"):
        assert f"assumed: {about}" in text
    config = json.loads((out / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification"
