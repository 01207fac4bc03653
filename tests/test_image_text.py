"""Objectives on images and texts: trained, stopped, resumed, handed over."""

import dataclasses
import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
import shapes_run
from etils import epath
from outside.pictures import Pictures

from big_vision_lite import evaluate, predict, train, trees
from big_vision_lite.config import Checkpoints, Init, TrainConfig
from big_vision_lite.data.ops import Decode, Resize, Tokenize
from big_vision_lite.data.ops.geometry import RandomResizedCrop
from big_vision_lite.data.ops.text import Empty
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import ImageFolder
from big_vision_lite.evaluators.loss import Loss
from big_vision_lite.evaluators.retrieval import Retrieval
from big_vision_lite.evaluators.zero_shot import ZeroShot
from big_vision_lite.models.captioner import Captioner
from big_vision_lite.models.text_transformer import TextPooling, TextTransformer
from big_vision_lite.models.two_tower import TwoTower
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.captioning import Captioning
from big_vision_lite.objectives.image_text import CLIP, SigLIP
from big_vision_lite.recipes import command_line
from big_vision_lite.runs.records import read_history
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tools"))
import convert_checkpoint  # noqa: E402

SIZE, STEPS, LENGTH = 16, 4, 20
ALLOWED = "--allow_module=outside.pictures"


def vit(**fields) -> ViT:
    small = dict(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=4)
    return ViT(**small | fields)


def towers(**fields) -> TwoTower:
    text = TextTransformer(
        vocabulary=257,
        width=16,
        depth=1,
        mlp_dim=32,
        num_heads=2,
        length=LENGTH,
        pooling=TextPooling.AVERAGE,
    )
    return TwoTower(image_tower=vit(), text_tower=text, features=8, **fields)


TOKENIZE = Tokenize(length=LENGTH)
# Model, objective, further fields.
KINDS = {
    "SigLIP": (towers(), SigLIP(equal_captions=True), {}),
    "CLIP": (towers(temperature=14.0, bias=None), CLIP(), {}),
    "LiT": (towers(), SigLIP(), {"freeze": ("image_tower/.*",)}),
    "CapPa": (
        Captioner(encoder=vit(), vocabulary=257, length=LENGTH, decoder_depth=1),
        Captioning(),
        {},
    ),
}


def recipe(kind: str, **changes) -> TrainConfig:
    model, objective, more = KINDS[kind]
    crop = RandomResizedCrop(size_px=SIZE, area_min=0.4)
    preprocess = (Decode(), Resize(size_px=SIZE))
    held_out = Pictures(count=19, seed=1, keys=("caption",))
    evaluators = {
        "loss": Loss(
            source=held_out, ops=(*preprocess, TOKENIZE), batch_size=8, every_steps=4
        )
    }
    if kind != "CapPa":
        evaluators["zero_shot"] = ZeroShot(
            source=ImageFolder(path=str(shapes_run.shared()[0]), split="val"),
            tokenize=TOKENIZE,
            templates=("a {} on noise", "{}"),
            batch_size=8,
            every_steps=STEPS,
        )
        evaluators["retrieval"] = Retrieval(
            source=held_out, tokenize=TOKENIZE, batch_size=8, every_steps=STEPS
        )
    fields = dict(
        num_steps=STEPS,
        model=model,
        objective=objective,
        data=Stream(
            source=Pictures(keys=("caption",)),
            ops=(Decode(), crop, TOKENIZE),
            batch_size=16,
            threads=2,
        ),
        preprocess=preprocess,
        optimizer=AdamW(schedule=WarmupCosine(peak=1e-2)),
        evaluators=evaluators,
        checkpoints=Checkpoints(every_steps=2, keep_latest=9),
        log_every_steps=1,
    )
    return TrainConfig(**fields | more | changes)


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory):
    """(kind, folder of a run that was stopped in the middle and resumed)."""
    kind = request.param
    workdir = tmp_path_factory.mktemp("run") / "run"
    config = recipe(kind)
    straight = jax.device_get(train.train(config, epath.Path(workdir), quiet=True))
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    resumed = jax.device_get(train.train(config, epath.Path(workdir), quiet=True))
    return kind, workdir, straight, resumed


@pytest.mark.slow
def test_a_resumed_run_is_the_straight_one_bit_for_bit(trained):
    _, _, straight, resumed = trained
    names = trees.flatten(straight)
    for (name, a), b in zip(names.items(), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.slow
def test_scores_and_health_are_recorded_and_found_again(trained):
    kind, workdir, _, _ = trained
    records = read_history(epath.Path(workdir))
    lines = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in lines] == [1, 2, 3, 4]
    own = ("id_accuracy", "parallel") if kind == "CapPa" else ("retrieved",)
    for record in lines:
        wanted = ("feature_sd", "effective_rank", *own)
        assert {f"train/{name}" for name in wanted} <= record.keys()
    inside = {name: x for record in records for name, x in record.items()}
    assert inside["loss/examples"] == 19
    command = ["evaluate", f"--workdir={workdir}", ALLOWED]
    assert command_line.run(evaluate.main, command) == 0
    text = (workdir / f"evaluation_{STEPS}.json").read_text()
    alone = json.loads(text)["scores"]
    assert alone == {name: inside[name] for name in alone}
    if kind != "CapPa":
        assert inside["zero_shot/control_chance"] == 1 / 3
        assert 0 <= alone["zero_shot/accuracy"] <= 1
        assert inside["retrieval/text_to_image/at_1/control_chance"] == 1 / 19


@pytest.mark.slow
def test_the_backbone_alone_gives_features_and_goes_to_timm(trained, tmp_path):
    _, workdir, _, _ = trained
    images, out = shapes_run.shared()[0] / "val", tmp_path / "features.npz"
    words = [f"--workdir={workdir}", f"--images={images}", f"--embed={out}", ALLOWED]
    assert command_line.run(predict.main, ["predict", *words]) == 0
    features = np.load(out)["features"]
    assert features.shape[1] == 16 and np.ptp(features, axis=0).max() > 0
    words = ["convert", str(workdir), "--to=timm", f"--out={tmp_path / 'timm'}"]
    convert_checkpoint.main([*words, ALLOWED])
    assert (tmp_path / "timm" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["LiT"], indirect=True)
def test_a_locked_tower_does_not_move_and_costs_no_optimizer_state(trained, tmp_path):
    _, _, straight, _ = trained
    one = recipe("LiT", num_steps=1, evaluators={})
    first = train.train(one, epath.Path(tmp_path / "one"), quiet=True)
    locked = trees.flatten(straight.frozen)
    assert locked and all(name.startswith("image_tower/") for name in locked)
    for name, leaf in trees.flatten(first.frozen).items():
        np.testing.assert_array_equal(leaf, locked[name])
    names = trees.flatten(straight.opt_state)
    assert any("text_tower" in name for name in names)
    assert not any("image_tower" in name for name in names)
    # What is learnt moves.
    moved = trees.flatten(straight.params)["text_tower/embedding/tokens"]
    before = trees.flatten(first.params)["text_tower/embedding/tokens"]
    assert np.any(moved != before)


@pytest.mark.slow
def test_an_image_tower_takes_the_weights_of_any_run(tmp_path):
    encoder = train.train(
        recipe("CapPa", num_steps=1, evaluators={}),
        epath.Path(tmp_path / "captioner"),
        quiet=True,
    ).params["encoder"]
    config = recipe("LiT", num_steps=1, evaluators={})
    config.init = (Init(path=str(tmp_path / "captioner")),)
    found = train.train(config, epath.Path(tmp_path / "locked"), quiet=True)
    for name, leaf in trees.flatten(found.frozen["image_tower"]).items():
        np.testing.assert_array_equal(leaf, trees.flatten(encoder)[name])


@dataclasses.dataclass(kw_only=True)
class Silent(Pictures):
    """Pictures of which some have nothing to say."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return found | ({"caption": ""} if index % 8 == 3 else {})


def silent(empty: Empty) -> TrainConfig:
    # Every picture is seen once.
    config = recipe("CapPa", num_steps=3, evaluators={})
    config.data.source = Silent(keys=("caption",))
    tokenize = dataclasses.replace(TOKENIZE, empty=empty)
    config.data.ops = (*config.data.ops[:-1], tokenize)
    return config


@pytest.mark.slow
def test_an_empty_caption_stops_the_run_with_its_name(tmp_path):
    with pytest.raises(ValueError, match="picture .*no id is left.*Empty.SKIP"):
        train.train(silent(Empty.REFUSE), epath.Path(tmp_path / "run"), quiet=True)


@pytest.mark.slow
def test_empty_captions_are_skipped_and_listed_but_not_many(tmp_path):
    with pytest.raises(ValueError, match="3 of 48 .*at most 0.1% are skipped"):
        train.train(silent(Empty.SKIP), epath.Path(tmp_path / "run"), quiet=True)
    listed = (tmp_path / "run" / "bad_files.txt").read_text()
    assert "picture 19" in listed and "no id is left" in listed


def test_losses_over_pairs_refuse_micro_batches(tmp_path):
    config = recipe("SigLIP", evaluators={}, micro_batches=2)
    with pytest.raises(ValueError, match="SigLIP, which compares the examples of the"):
        train.train(config, epath.Path(tmp_path / "run"), quiet=True)


def test_a_batch_without_texts_is_refused(tmp_path):
    config = recipe("SigLIP", evaluators={})
    config.data.source = Pictures()
    config.data.ops = config.data.ops[:-1]
    with pytest.raises(ValueError, match="SigLIP asks for 'text', which the batch"):
        train.train(config, epath.Path(tmp_path / "run"), quiet=True)
