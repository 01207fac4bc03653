"""A folder without split folders: which tenth is held out, and who follows."""

import pathlib

import pytest
import shapes_run

from big_vision_lite import train
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
