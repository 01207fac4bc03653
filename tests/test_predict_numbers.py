"""A regression answers in the units of its targets, whoever asks."""

import csv
import dataclasses
import json

import convert_checkpoint
import jax
import numpy as np
import pytest
import shapes_run
from tables import SIDE, table, write_table
from tiny_runs import tiny_vit, written_weights

import big_vision_lite as bvl
from big_vision_lite import predict, trees
from big_vision_lite.conversion.formats import Library
from big_vision_lite.data.ops import Decode, Resize
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.evaluators.regression import Regression as Scores
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.objectives.regression import Regression
from big_vision_lite.recipes import command_line
from big_vision_lite.runs import inference, load, step_folder

UNITS = Regression(names=("grey", "tilt"), mean=(90.0, 0.25), std=(30.0, 0.5))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    source = table(write_table(folder / "images"), "grey", "tilt", kind="numbers")
    ops = (Decode(), Resize(size_px=SIDE))
    config = shapes_run.recipe(
        folder / "images",
        num_steps=5,
        model=shapes_run.small_model(num_classes=2),
        objective=Regression.fitted(source.targets, source.class_names),
        data=Stream(source=source, ops=ops, batch_size=8, threads=2),
        preprocess=ops,
        evaluators={"val": Scores(source=source, batch_size=8)},
    )
    return shapes_run.run(folder / "run", config)


def test_predict_writes_a_column_of_numbers_for_each_target(run, tmp_path):
    images, out = run.parent / "images", tmp_path / "numbers.csv"
    words = ["predict", "--workdir", run, "--images", images, "--out", out]
    words += ["--allow_module", shapes_run.MODULE]
    assert command_line.run(predict.main, [str(word) for word in words]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert list(rows[0]) == ["file", "grey", "tilt", "error"]
    found = np.float32([[row["grey"], row["tilt"]] for row in rows])
    loaded = bvl.load(run, allowed_modules=[shapes_run.MODULE])
    files = [(images / row["file"]).read_bytes() for row in rows]
    np.testing.assert_array_equal(loaded.predict(files), found)
    assert loaded.class_names == ("grey", "tilt")
    # By hand: the model, then deviation and mean of the training targets.
    decoded = [Decode()({"image": f}, np.random.default_rng()) for f in files]
    pixels = np.stack([example["image"] for example in decoded])
    params, _ = load.load_variables(step_folder.find(str(run)))
    outputs = shapes_run.small_model(2).apply(
        {"params": trees.unflatten(params)}, pixels
    )
    targets = np.float64(loaded.run.config.data.source.targets)
    by_hand = np.asarray(outputs["logits"]) * targets.std(axis=0) + targets.mean(axis=0)
    np.testing.assert_allclose(found, by_hand, rtol=1e-4)
    # These are the numbers that the evaluation of the training scored.
    records = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    scored = [r["val/mae/grey"] for r in records if "val/mae/grey" in r][-1]
    assert np.abs(found[:, 0] - targets[:, 0]).mean() == pytest.approx(scored, rel=1e-4)


@pytest.fixture(scope="module")
def of_vit(tmp_path_factory):
    """A regression by a ViT with two outputs of a head that is not zero."""
    folder = tmp_path_factory.mktemp("vit") / "weights"
    model = tiny_vit(head=Classifier(num_classes=2, bias_init=0.5))
    written_weights(model, Library.SAFETENSORS, folder)
    found = load.load(str(folder), devices=jax.devices()[:1])
    kernel = np.random.default_rng(0).normal(0, 1, (16, 2)).astype(np.float32)
    params = {**found.state.params, "head": {**found.state.params["head"]}}
    params["head"]["kernel"] = jax.device_put(kernel)
    return dataclasses.replace(
        found,
        config=dataclasses.replace(found.config, objective=UNITS),
        manifest={**found.manifest, "class_names": ["grey", "tilt"]},
        state=found.state.replace(params=params),
    )


IMAGES = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    "library",
    [
        Library.SAFETENSORS,
        pytest.param(Library.HUGGINGFACE, marks=pytest.mark.parity),
        pytest.param(Library.TIMM, marks=pytest.mark.parity),
    ],
)
def test_exports_answer_in_units_and_say_that_they_are_a_regression(
    library, of_vit, tmp_path
):
    convert_checkpoint.to_library(of_vit, library, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    expected = inference.LoadedModel(of_vit).predict(IMAGES)
    assert np.ptp(expected[:, 0]) > 10 * np.ptp(expected[:, 1]) > 0
    read = bvl.load(tmp_path / "out")
    assert read.class_names == ("grey", "tilt")
    # float32: mean and deviation are in the head there, after it here.
    np.testing.assert_allclose(read.predict(IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_the_original_is_left_as_it_was(of_vit, tmp_path):
    before = inference.LoadedModel(of_vit).predict(IMAGES)
    convert_checkpoint.to_library(of_vit, Library.SAFETENSORS, tmp_path / "out")
    np.testing.assert_array_equal(inference.LoadedModel(of_vit).predict(IMAGES), before)


def test_mean_and_deviation_go_into_every_head():
    rng = np.random.default_rng(0)
    names = ("head/kernel", "head/bias", "distillation_head/kernel")
    variables = {name: rng.normal(size=(4, 2)).astype(np.float32) for name in names}
    for name in ("head/bias", "distillation_head/bias"):
        variables[name] = np.float32([1, -1])
    variables["norm/scale"] = np.ones(4, np.float32)
    found = UNITS.in_head(variables, ("head", "distillation_head"))
    x = rng.normal(size=(5, 4)).astype(np.float32)
    for head in ("head", "distillation_head"):
        logits = x @ variables[f"{head}/kernel"] + variables[f"{head}/bias"]
        folded = x @ found[f"{head}/kernel"] + found[f"{head}/bias"]
        expected = UNITS.predictions(jax.numpy.asarray(logits))
        np.testing.assert_allclose(folded, expected, rtol=1e-5, atol=1e-5)
    assert found["norm/scale"] is variables["norm/scale"]
