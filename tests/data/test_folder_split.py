"""A folder without split folders: which tenth is held out, and who follows."""

import pathlib

import numpy as np
import pytest
import shapes_run

from big_vision_lite import train
from big_vision_lite.data.sources import ImageFolder, Table, folder, table
from big_vision_lite.recipes import command_line

ROOT = pathlib.Path(__file__).parents[2]


def parse(recipe: str):
    flags = [f"--config={ROOT}/configs/{recipe}", "--allow_module=shapes_run"]
    return command_line.parse(["train", *flags], train.define_flags).config


@pytest.mark.parametrize("recipe", ["folder", "finetune"])
def test_the_seed_of_the_split_reaches_training_and_evaluation(recipe):
    images, run = shapes_run.shared()
    flat = images / "train"
    held = []
    for seed in (0, 1, 1):
        arg = f"dir={flat}"
        if recipe == "finetune":
            arg = f"init={run},data={flat},batch=16,allow_module=shapes_run"
        config = parse(f"{recipe}.py:{arg},split_seed={seed}")
        (evaluator,) = config.evaluators.values()
        train_names, val_names = (
            {source.name(index) for index in range(len(source))}
            for source in (config.data.source, evaluator.source)
        )
        assert not train_names & val_names and len(train_names | val_names) == 72
        held.append(val_names)
    assert held[0] != held[1] == held[2]


def test_a_seed_that_chooses_nothing_is_refused():
    images, _ = shapes_run.shared()
    with pytest.raises(ValueError, match="split_seed=1 chooses nothing: .*train, val"):
        parse(f"folder.py:dir={images},split_seed=1")


def test_balanced_weights_of_the_training_images_go_into_the_objective():
    images, _ = shapes_run.shared()
    config = parse(f"folder.py:dir={images},class_weights=balanced")
    counts = config.data.source.class_counts()
    weights = np.array(config.objective.class_weights)
    np.testing.assert_allclose(weights * counts, counts.mean())
    assert parse(f"folder.py:dir={images}").objective.class_weights == ()


@pytest.mark.parametrize("most, unequal", [(20, False), (21, True), (45, True)])
def test_classes_more_unequal_than_20_to_1_are_said(most, unequal):
    lines = folder.unequal(("none", "few", "many"), np.array([0, 1, most]))
    assert bool(lines) == unequal
    if unequal:
        assert f"many has {most} times as many images as few" in lines[0]
        assert "class_weights=balanced" in lines[0]


def test_a_folder_and_a_table_say_that_their_classes_are_unequal(tmp_path):
    rows = ["file,label"]
    for name, count in (("many", 21), ("few", 1)):
        place = tmp_path / "images" / "train" / name
        place.mkdir(parents=True)
        for index in range(count):
            (place / f"{index}.png").write_bytes(b"")
            rows.append(f"images/train/{name}/{index}.png,{name}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    source = ImageFolder(path=str(tmp_path / "images"))
    path = str(tmp_path / "labels.csv")
    listed = Table(path=path, image="file", label="label", split="all")
    for lines in (folder.describe([source]), table.describe([listed])):
        (line,) = [line for line in lines if "unequal" in line]
        assert "many has 21 times as many images as few" in line
