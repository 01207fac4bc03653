"""Evaluation of a saved run: the scores of the training itself, and of transfer."""

import csv
import dataclasses
import json
import os
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes_run
import show_model
from etils import epath
from tiny_runs import tiny_vit, written_weights

from big_vision_lite import evaluate
from big_vision_lite.console.progress import Progress
from big_vision_lite.conversion.formats import Library
from big_vision_lite.data.sources import ImageFolder
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.recipes import command_line
from big_vision_lite.runs import saved_run
from big_vision_lite.runs.records import read_history
from big_vision_lite.runs.session import Run
from big_vision_lite.runtime import startup

RECIPE = """
from big_vision_lite.data.ops import Decode
from big_vision_lite.data.sources import ImageFolder
import shapes_run

def get_config(folder):
    config = shapes_run.recipe(folder)
    config.evaluators["val"].source.path = folder
    return config
"""


@pytest.fixture(scope="module")
def images():
    return shapes_run.shared()[0]


@pytest.fixture
def run(tmp_path):
    """A copy, as evaluations write into the folder."""
    return shutil.copytree(shapes_run.shared()[1], tmp_path / "run")


def command(workdir, *flags):
    argv = ["evaluate", f"--workdir={workdir}", "--allow_module=shapes_run", *flags]
    return command_line.run(evaluate.main, argv)


def recorded(run, step):
    """All scores that training recorded at a step."""
    found = {}
    for record in read_history(epath.Path(run)):
        if record["step"] == step:
            found |= {n: x for n, x in record.items() if "/" in n}
    return {n: x for n, x in found.items() if not n.startswith("train/")}


def scores_of(loaded, evaluators, workdir):
    with Progress(10, 16, quiet=True) as progress:
        return evaluate.evaluate(
            loaded, evaluators, epath.Path(workdir), progress=progress
        )


def test_training_and_evaluation_list_scores_in_the_order_of_the_recipe(run):
    """Records are in the order of steps: what runs often would come first."""
    loaded = shapes_run.load_run(run)
    loaded.config.evaluators = {name: Constant(scores={}) for name in "zba"}
    training = types.SimpleNamespace(config=loaded.config)
    records = {"train": 0, "a_ema/x": 1, "b/x": 2, "b/w": 3, "gone/x": 4, "z/x": 5}
    found = Run._in_recipes_order(training, records)
    assert [*found] == ["z/x", "b/x", "b/w", "a_ema/x", "train", "gone/x"]
    chosen = evaluate.choose(loaded.config.evaluators, ["a", "z"], "it")
    assert [*chosen] == ["z", "a"]


@dataclasses.dataclass(kw_only=True)
class Constant:
    """Returns what it is told to, as an evaluator of one's own may."""

    scores: dict
    every_steps: int = 1

    def prepare(self, context):
        return lambda state: self.scores


def test_a_score_is_a_number_whatever_its_library_and_else_refused(run, tmp_path):
    loaded = shapes_run.load_run(run)
    numbers = Constant(scores={"count": np.int64(27), "share": jnp.float32(0.5)})
    found = scores_of(loaded, {"mine": numbers}, tmp_path / "e")
    assert json.dumps(found) == '{"mine/count": 27, "mine/share": 0.5}'
    with pytest.raises(ValueError, match='mine: "share" is nan'):
        scores_of(loaded, {"mine": Constant(scores={"share": np.nan})}, tmp_path / "e")


@pytest.mark.parametrize("step", [5, 10])
def test_scores_alone_are_bit_for_bit_those_of_training(run, step):
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert command(run / "checkpoints" / str(step)) == 0
    written = json.loads((run / f"evaluation_{step}.json").read_text())
    assert written["scores"] == recorded(run, step)
    assert written["scores"]["val/examples"] == 27
    assert "fewshot/shapes/1_shot/control_untrained" in written["scores"]
    # What training wrote stays as it was; per-class tables go into a folder.
    assert {n: (run / n).read_bytes() for n in before} == before
    with (run / f"evaluation_{step}" / "val_per_class.csv").open() as file:
        assert [row["count"] for row in csv.DictReader(file)] == ["9", "9", "9"]


def test_controls_computed_anew_are_those_of_training(run, tmp_path):
    """Bit for bit, although the training images are not looked at."""
    loaded = shapes_run.load_run(run)
    loaded.config.data.source.path = "gone"
    name = "fewshot"
    found = scores_of(loaded, {name: loaded.config.evaluators[name]}, tmp_path / "e")
    expected = {n: x for n, x in recorded(run, 10).items() if n.startswith(name)}
    assert found == expected


def test_one_device_counts_every_image_once_and_scores_what_eight_do(run, tmp_path):
    found = {}
    for count in (1, 8):
        loaded = shapes_run.load_run(run, devices=jax.devices()[:count])
        evaluators = {"val": loaded.config.evaluators["val"]}
        found[count] = scores_of(loaded, evaluators, tmp_path / str(count))
    assert found[1]["val/examples"] == found[8]["val/examples"] == 27
    assert found[1]["val/accuracy"] == found[8]["val/accuracy"]
    # Other rows a device, other last bits of float32.
    assert found[1]["val/loss"] == pytest.approx(found[8]["val/loss"], rel=1e-5)


def test_averaged_parameters_are_used_and_the_names_say_so(run, tmp_path):
    loaded = shapes_run.load_run(run)
    evaluators = {"val": loaded.config.evaluators["val"]}
    plain = scores_of(loaded, evaluators, tmp_path / "plain")
    zero = jax.tree.map(lambda x: 0 * x, loaded.state.params)
    loaded.state = loaded.state.replace(params=zero, ema=loaded.state.params)
    averaged = scores_of(loaded, evaluators, tmp_path / "averaged")
    assert averaged == {n.replace("val/", "val_ema/"): x for n, x in plain.items()}


def test_a_mesh_that_does_not_fit_is_replaced_and_said(run):
    document = json.loads((run / "checkpoints" / "10" / "config.json").read_text())
    assert document["config"]["mesh"]["data"] == -1
    messages = []
    mesh = saved_run.sharding.Mesh
    assert saved_run.fitting(mesh(fsdp=4), 8, messages.append) == mesh(fsdp=4)
    assert saved_run.fitting(mesh(data=2, fsdp=4), 8, messages.append).fsdp == 4
    assert not messages
    assert saved_run.fitting(mesh(data=2, fsdp=4), 1, messages.append) == mesh()
    assert saved_run.fitting(mesh(fsdp=8), 2, messages.append) == mesh()
    assert all("does not fit" in message for message in messages)


def test_another_recipe_evaluates_other_images_by_the_names_of_the_classes(
    run, tmp_path, images, capsys
):
    """Two of three classes, in another order of numbers."""
    recipe = tmp_path / "other.py"
    recipe.write_text(RECIPE)
    folder = tmp_path / "two"
    for name in ("disc", "square"):
        for split in ("train", "val"):
            shutil.copytree(images / split / name, folder / split / name)
    # All of it on file already; only what is named must run.
    flags = (f"--config={recipe}:{folder}", "--evaluators=val")
    assert command(run, *flags, "--config.evaluators.val.batch_size=8") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "val has 2 of the 3 train classes (missing: cross)" in output
    (path,) = run.glob("evaluation_10_other_*.json")
    scores = json.loads(path.read_text())["scores"]
    with (run / "val_per_class.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["step"] == "10"]
    correct = sum(int(r["correct"]) for r in rows if r["class"] != "cross")
    assert scores["val/accuracy"] == correct / 18

    (folder / "val" / "disc").rename(folder / "val" / "triangle")
    (folder / "train" / "disc").rename(folder / "train" / "triangle")
    assert command(run, *flags) == 1
    assert "classes unknown to train: triangle" in capsys.readouterr().err


def test_the_file_keeps_the_scores_of_evaluators_that_ran_before(run):
    path = run / "evaluation_10.json"
    loaded = shapes_run.load_run(run, log=lambda _: None)
    evaluate.record(loaded, {"val/accuracy": 0.5}, epath.Path(path), None, {})
    evaluate.record(loaded, {"fewshot/x": 0.25}, epath.Path(path), None, {})
    known = json.loads(path.read_text())
    assert known["scores"] == {"val/accuracy": 0.5, "fewshot/x": 0.25}
    assert known["versions"] == startup.versions() and known["step"] == 10


def test_scores_of_other_arguments_and_other_weights_have_files_of_their_own(
    run, tmp_path, images
):
    recipe = tmp_path / "other.py"
    recipe.write_text(RECIPE)
    folders = [shutil.copytree(images, tmp_path / name) for name in "AB"]
    val = "--evaluators=val"
    for folder in folders:
        assert command(run, f"--config={recipe}:{folder}", val) == 0
    paths = sorted(run.glob("evaluation_10_other_*.json"))
    documents = [json.loads(path.read_text()) for path in paths]
    assert {d["recipe"] for d in documents} == {f"{recipe}:{f}" for f in folders}
    for path, document in zip(paths, documents, strict=True):
        source = document["evaluators"]["val"]["source"]
        assert document["recipe"] == f"{recipe}:{source['path']}"
        assert (run / path.stem / "val_per_class.csv").exists()
    # The same again adds to its own file; an override makes another evaluation.
    before = paths[0].read_text()
    assert command(run, f"--config={documents[0]['recipe']}", val) == 0
    assert sorted(run.glob("evaluation_10_other_*.json")) == paths
    assert json.loads(paths[0].read_text())["scores"] == documents[0]["scores"]
    override = "--config.evaluators.val.source.split=train"
    assert command(run, f"--config={documents[0]['recipe']}", val, override) == 0
    assert len([*run.glob("evaluation_10_other_*.json")]) == 3
    assert paths[0].read_text() == before
    # Step folders that were copied to one place.
    steps = [
        shutil.copytree(run / "checkpoints" / "5", tmp_path / "copied" / name)
        for name in ("mine", "theirs")
    ]
    assert len({evaluate.name_results(epath.Path(s), None, {}) for s in steps}) == 2


def test_run_checkpoints_and_step_folders_are_found_and_named(run, tmp_path, capsys):
    copied = shutil.copytree(run / "checkpoints" / "5", tmp_path / "copied" / "mine")
    for path, step, place in (
        (run, 10, run),
        (run / "checkpoints", 10, run),
        (run / "checkpoints" / "5", 5, run),
        (copied, 5, tmp_path / "copied"),
    ):
        loaded = shapes_run.load_run(path)
        said = capsys.readouterr().out
        assert ("using step 10" in said) == (step == 10)
        assert loaded.step == step and loaded.place_for_results() == epath.Path(place)
        assert loaded.class_names == shapes_run.CLASSES


def test_downloaded_weights_are_scored_into_the_current_folder(
    images, tmp_path, monkeypatch, capsys
):
    """By a client that finds one model; nobody asks the network."""
    model = tiny_vit(pooling=Pooling.CLASS_TOKEN, positions=Positions.LEARNED)
    model = model.clone(head=Classifier(num_classes=3))
    there = tmp_path / "there"
    written_weights(model, Library.SAFETENSORS, there, shapes_run.CLASSES)
    client = types.ModuleType("huggingface_hub")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        return str(there)

    monkeypatch.setattr(client, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recipe = tmp_path / "other.py"
    recipe.write_text(RECIPE)
    assert command("hub:someone/tiny", f"--config={recipe}:{images}") == 0
    assert "written to evaluation_tiny_other_" in capsys.readouterr().out
    (scores,) = (tmp_path / "here").glob("evaluation_tiny_other_*.json")
    document = json.loads(scores.read_text())
    assert document["checkpoint"] == "hub:someone/tiny"
    assert "val/accuracy" in document["scores"]
    show_model.main(["hub:someone/tiny"])
    assert "hub:someone/tiny, one image of 32x32x3" in capsys.readouterr().out
    assert set(asked) == {"someone/tiny"}


def test_mistakes_are_one_message(run, tmp_path, capsys):
    for flags, words in (
        ((run, "--evaluators=vall"), ['no evaluator "vall"', 'Did you mean "val"']),
        ((tmp_path / "nothing",), ["No complete checkpoint", "does not exist"]),
        ((run, "--evaluator=val"), ["Did you mean --evaluators"]),
        ((run, "--config=configs/non.py"), ["no recipe"]),
    ):
        assert command(*flags) == 1
        error = capsys.readouterr().err
        assert all(word in error for word in words), error
    assert command_line.run(evaluate.main, ["evaluate"]) == 1
    assert "--workdir RUN" in capsys.readouterr().err
    off = {"val": Classification(source=ImageFolder(path="x"), every_steps=0)}
    assert evaluate.choose(off, ["val"], "it") == off
    with pytest.raises(ValueError, match="switched on"):
        evaluate.choose(off, [], "it")


def test_a_damaged_checkpoint_is_refused_by_name(run, capsys):
    folder = run / "checkpoints" / "10"
    victim = max(folder.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    assert command(run) == 1
    assert victim.name in capsys.readouterr().err


def test_a_read_only_run_is_evaluated_and_nothing_written(run, monkeypatch, capsys):
    # Root may write anywhere, so the answer of the system is put in its mouth.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert command(run, "--evaluators=val") == 0
    assert "read-only" in capsys.readouterr().out
    assert not list(run.glob("evaluation*"))
