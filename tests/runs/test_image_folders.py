"""A run and its folders of images: said, kept apart from, recorded, recognised."""

import json
import os
import shutil
import sys

import check_dataset
import pytest
import shapes_run
from etils import epath

from big_vision_lite import evaluate, train
from big_vision_lite.data.sources import ImageFolder
from big_vision_lite.data.sources.folder import describe, folder_splits
from big_vision_lite.recipes import command_line
from big_vision_lite.runs import dry_run, image_folders
from big_vision_lite.runs.folder import RunFolder, read_config_document

PLACES = ("run", "train/run", "train/disc/run", "", "link/run", "up/../run")


@pytest.fixture
def images(tmp_path):
    return shapes_run.make_folder(tmp_path / "shapes", {"train": 8, "val": 3})


@pytest.mark.parametrize("place", PLACES)
def test_a_run_folder_in_the_data_is_refused_before_anything_is_written(place, images):
    (images / "link").symlink_to(images / "val")
    before = sorted(images.rglob("*"))
    config = shapes_run.recipe(images)
    workdir = epath.Path(images / place)
    for start in (dry_run.dry_run, train.train):
        with pytest.raises(ValueError, match="lies in the folder of images.*such as"):
            start(config, workdir)
    assert sorted(images.rglob("*")) == before


def test_folders_of_evaluators_count_and_neighbours_do_not(images, tmp_path):
    config = shapes_run.recipe(images)
    other = shapes_run.make_folder(tmp_path / "other", {"train": 2, "val": 2})
    config.evaluators["val"].source = ImageFolder(path=str(other), split="val")
    with pytest.raises(ValueError, match=r"evaluators\.val\.source"):
        image_folders.refuse_workdir_inside(config, epath.Path(other / "run"))
    for good in ("shapes_run", "run", "."):
        image_folders.refuse_workdir_inside(config, epath.Path(tmp_path / good))
    config.evaluators["val"].every_steps = 0  # it is not read
    image_folders.refuse_workdir_inside(config, epath.Path(other / "run"))


def test_a_dry_run_refuses_a_split_without_classes(images, tmp_path):
    for path in sorted((images / "val").rglob("*.*")):
        path.rename(images / "val" / f"{path.parent.name}_{path.name}")
    with pytest.raises(FileNotFoundError, match="9 images lie in .*/val itself"):
        dry_run.dry_run(shapes_run.recipe(images), epath.Path(tmp_path / "run"))


def test_a_run_of_a_relative_path_is_found_from_any_folder_and_no_other(
    images, tmp_path, monkeypatch, capsys
):
    """And start, dry run and check_dataset say the same of the folder."""
    (images / "train" / "disc" / "notes.txt").write_text("x")
    (images / "@eaDir").mkdir()
    monkeypatch.chdir(tmp_path)
    config = shapes_run.recipe("shapes", evaluators={}, num_steps=3)
    config.evaluators["val"] = shapes_run.recipe("shapes").evaluators["val"]
    paragraph = describe(list(folder_splits("shapes").values()))
    assert len(paragraph) == 5
    run = epath.Path(tmp_path / "run")
    said = {"dry run": dry_run.dry_run(config, run)}
    capsys.readouterr()
    train.train(config, run)
    said["start"] = capsys.readouterr().out
    assert check_dataset.main(["shapes"]) == 0
    said["check_dataset"] = capsys.readouterr().out
    for program, text in said.items():
        assert "\n".join(paragraph) in text, program

    # Beside what was typed stands where it lies, through a resume by the folder, too.
    for _ in range(2):
        document = read_config_document(run)
        assert document["config"]["data"]["source"]["path"] == str(images)
        val = document["config"]["evaluators"]["val"]["source"]["path"]
        assert val == str(images)
        typed = {"data.source.path": "shapes", "evaluators.val.source.path": "shapes"}
        assert document["typed_paths"] == typed
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
        shapes_run.make_folder(tmp_path / "elsewhere" / "shapes", {"val": 4})
        with RunFolder(run, train.recorded_config(str(run), [shapes_run.MODULE])):
            pass

    monkeypatch.setattr(sys, "argv", ["evaluate"])
    command = ["evaluate", f"--workdir={run}", f"--allow_module={shapes_run.MODULE}"]
    assert command_line.run(evaluate.main, command) == 0
    scores = json.loads((run / "evaluation_3.json").read_text())["scores"]
    assert scores["val/examples"] == 9
    # Another folder of that name.
    shutil.move(images, tmp_path / "moved")
    shutil.move(tmp_path / "elsewhere" / "shapes", images)
    shutil.copytree(tmp_path / "moved" / "train", images / "train")
    capsys.readouterr()
    assert command_line.run(evaluate.main, command) == 1
    error = capsys.readouterr().err
    assert "evaluators.val.source: " in error and "holds other images" in error
    assert f"--config configs/folder.py:dir={os.fspath(images)}" in error


def test_only_folders_and_prepared_sets_get_absolute_paths():
    source = {"class": "x", "source": {"data_dir": "sets", "path": "gs://b/c"}}
    evaluators = {"a": {"sets": [{"train": {"path": "~/p", "name": "n"}}]}}
    config = {"data": {"source": source}, "evaluators": evaluators, "init": ["r"]}
    typed = image_folders.make_absolute(config)
    assert typed == {
        "data.source.source.data_dir": "sets",
        "evaluators.a.sets[0].train.path": "~/p",
    }
    assert source["source"] == {
        "data_dir": os.path.abspath("sets"),
        "path": "gs://b/c",
    }
    assert evaluators["a"]["sets"][0]["train"]["path"] == os.path.expanduser("~/p")
