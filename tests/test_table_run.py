"""Runs on a table of generated images: trained, scored, resumed, predicted from."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import shapes_run
from etils import epath
from tables import table, write_table

from big_vision_lite import train
from big_vision_lite.data import unopened
from big_vision_lite.data.sources import vocabulary
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.evaluators.regression import Regression as RegressionScores
from big_vision_lite.objectives.classification import (
    SigmoidClassification,
    SoftmaxClassification,
)
from big_vision_lite.objectives.regression import Regression, RegressionLoss
from big_vision_lite.recipes import command_line, serialize
from big_vision_lite.runs import image_folders
from big_vision_lite.runs.records import read_history

ROOT = pathlib.Path(__file__).parents[1]
SMALL = (
    "--config.num_epochs=none",
    "--config.num_steps=4",
    "--config.optimizer.schedule.warmup_steps=0",
    "--config.data.batch_size=8",
    "--config.checkpoints.every_steps=2",
    "--config.evaluators.val.batch_size=8",
)


def parse(path, arg, *flags):
    recipe = f"{ROOT}/configs/table.py:table={path},image=file,{arg}"
    words = ["train", f"--config={recipe}", *flags]
    return command_line.parse(words, train.define_flags).config


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"), count=32)


KINDS = {
    "label=class": (SoftmaxClassification, Classification, ("dark", "light")),
    "label=tags,kind=classes": (SigmoidClassification, Classification, ("left", "top")),
    "label=left,top,kind=flags": (
        SigmoidClassification,
        Classification,
        ("left", "top"),
    ),
    "label=grey,tilt,kind=numbers,loss=huber": (
        Regression,
        RegressionScores,
        ("grey", "tilt"),
    ),
}


@pytest.mark.parametrize("arg", KINDS)
def test_the_recipe_fits_the_kind_of_labels(path, arg):
    objective, evaluator, names = KINDS[arg]
    config = parse(path, f"{arg},size=16,split=part")
    assert type(config.objective) is objective
    assert {n: type(e) for n, e in config.evaluators.items()} == {"val": evaluator}
    source, val = config.data.source, config.evaluators["val"].source
    assert source.class_names == val.class_names == names
    assert len(source) + len(val) == 32
    assert config.model.head.num_classes == len(names)
    mixed = bool(config.data.device_ops)
    assert mixed == (objective is not Regression)
    if objective is Regression:
        assert config.objective.loss == RegressionLoss.HUBER
        assert config.objective.mean == pytest.approx(source.targets.mean(axis=0))
    # A plan knows what an example holds without opening the table.
    keys = {k: np.shape(v) for k, v in source[0].items()}
    found = unopened.example(source, b"")
    assert {k: np.shape(v) for k, v in found.items()} == keys


@pytest.mark.parametrize("arg", ["label=class", "label=left,top,kind=flags"])
def test_balanced_weights_of_the_training_images_go_into_the_objective(path, arg):
    config = parse(path, f"{arg},size=16,split=part,class_weights=balanced")
    source = config.data.source
    counts, weights = source.class_counts(), np.array(config.objective.class_weights)
    if arg == "label=class":
        np.testing.assert_allclose(weights * counts, len(source) / len(counts))
    else:
        np.testing.assert_allclose(weights * counts, len(source) - counts)


def test_wrong_arguments_say_what_is_allowed(path):
    for arg, words in (
        ("label=clas", 'Did you mean "class"'),
        ("label=grey,kind=number", "one of class, classes, tags, flags, numbers"),
        ("label=class,loss=huber", "loss=huber is for kind=numbers"),
        ("label=class,split=part,held_out=0.2", "choose nothing"),
        ("label=grey,kind=numbers,class_weights=balanced", "kind=numbers has none"),
        ("label=class,class_weights=balance", "one of equal, balanced"),
        ("label=grey,kind=numbers,steps=5", "go with init; use epochs"),
        ("kind=class", "needs label"),
        ("label=tags,kind=tags", "needs a vocabulary: take configs/weak_tags.py"),
    ):
        with pytest.raises(ValueError, match=words):
            parse(path, arg)


def trained(path, workdir, arg, *flags):
    config = parse(path, f"{arg},size=8,split=part", *SMALL, *flags)
    # A network that compiles in no time.
    model = shapes_run.Net(head=config.model.head)
    shapes_run.run(workdir, dataclasses.replace(config, model=model))
    found = {}
    for record in read_history(epath.Path(workdir)):
        found.setdefault(record["step"], {}).update(record)
    return found


@pytest.fixture(scope="module")
def regression(path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "regression"
    return workdir, trained(path, workdir, "label=grey,tilt,kind=numbers")


def test_a_run_on_numbers_is_scored_beside_their_mean(regression):
    workdir, records = regression
    scores = {n.removeprefix("val/"): x for n, x in records[4].items()}
    assert scores["examples"] == 12
    assert {"r2", "spearman", "mae_in_std", "r2/grey", "rmse_of_mean/tilt"} <= set(
        scores
    )
    assert scores["mae/grey"] > 10 * scores["mae/tilt"]  # each in its own unit
    config = json.loads((workdir / "config.json").read_text())["config"]
    assert config["objective"]["names"] == ["grey", "tilt"]


def test_a_resumed_run_ends_with_the_same_numbers(path, regression, tmp_path):
    workdir, records = regression
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(next((tmp_path / "run" / "checkpoints").glob("*4")))
    again = trained(path, tmp_path / "run", "label=grey,tilt,kind=numbers")
    for name in ("val/r2/grey", "val/mae/tilt", "train/loss"):
        assert again[4][name] == records[4][name]


def test_a_run_knows_the_place_and_the_content_of_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = write_table(tmp_path)
    config = parse("labels.csv", "label=class,split=part,root=.")
    manifest = {"folders": image_folders.fingerprints(config)}
    image_folders.check_unchanged(config, manifest)
    document = json.loads(serialize.to_json(config))["config"]
    typed = image_folders.make_absolute(document)
    found = document["evaluators"]["val"]["source"]
    assert (found["path"], found["root"]) == (str(own), str(tmp_path))
    assert typed["data.source.path"] == "labels.csv"
    assert image_folders.paragraph(config)[0] == f"table        {own}"
    own.write_text(own.read_text().replace("light", "bright"))
    again = parse("labels.csv", "label=class,split=part,root=.")
    with pytest.raises(ValueError, match="other images than the table that the run"):
        image_folders.check_unchanged(again, manifest)


def test_tags_are_trained_with_the_sigmoid_and_scored_by_average_precision(
    path, tmp_path
):
    records = trained(path, tmp_path / "run", "label=tags,kind=classes")
    assert 0 < records[4]["val/mean_average_precision"] <= 1


def tags_run(folder, workdir):
    path = write_table(folder, count=32)
    words = table(path, "tags", kind="tags", split_column="part", split="train").words
    if not (folder / "v.json").exists():
        (folder / "v.json").write_text(vocabulary.build(words).text())
    arg = f"table={path},image=file,tags=tags,vocabulary={folder}/v.json,classes=2"
    recipe = f"{ROOT}/configs/weak_tags.py:{arg},noise=0.3,size=8,resample=uniform"
    command = ["train", f"--config={recipe}", *SMALL]
    config = command_line.parse(command, train.define_flags).config
    for source in (config.data.source.source, config.evaluators["val"].source):
        source.source.held_out = 0.3
    model = shapes_run.Net(head=config.model.head)
    state = train.train(
        dataclasses.replace(config, model=model), epath.Path(workdir), quiet=False
    )
    return jax.device_get(state)


def test_a_run_on_tags_is_scored_and_resumes_bit_for_bit(tmp_path, capsys):
    workdir = tmp_path / "run"
    straight = tags_run(tmp_path, workdir)
    told = capsys.readouterr().out
    assert "images have none: they weigh 0" in told and "an epoch is" in told
    assert "30% of the tags replaced by chance" in told
    shutil.rmtree(next((workdir / "checkpoints").glob("*4")))
    resumed = tags_run(tmp_path, workdir)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    scores = {name for record in read_history(epath.Path(workdir)) for name in record}
    assert {"val/accuracy", "val/loss", "train/unlabelled"} <= scores


def test_other_words_of_the_images_stop_a_resumed_run(tmp_path):
    workdir = tmp_path / "run"
    tags_run(tmp_path, workdir)
    shutil.rmtree(next((workdir / "checkpoints").glob("*4")))
    text = (tmp_path / "v.json").read_text()
    # Each word now means the other tag.
    swapped = text.replace("left", "x").replace("top", "left").replace("x", "top")
    (tmp_path / "v.json").write_text(swapped)
    with pytest.raises(ValueError, match="trained on data with the fingerprint"):
        tags_run(tmp_path, workdir)
