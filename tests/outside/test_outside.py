"""Models, objectives, sources and evaluators that the package has not, in its loop."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes_run
from etils import epath
from outside.masked_autoencoder import MaskedAutoencoder, Reconstruction
from outside.pictures import Pictures, Tokenise
from outside.segmentation import (
    IntersectionOverUnion,
    PixelClassification,
    Segmenter,
)
from outside.self_distillation import SelfDistillation, Student
from outside.two_towers import SigmoidContrast, TwoTowers

from big_vision_lite import evaluate, predict, train, trees
from big_vision_lite.config import Checkpoints, Init, TrainConfig
from big_vision_lite.data.ops import Decode, FlipLeftRight, Resize
from big_vision_lite.data.ops.colour import Keep
from big_vision_lite.data.ops.geometry import RandomResizedCrop
from big_vision_lite.data.ops.views import View, Views
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import ImageFolder
from big_vision_lite.data.sources.files import ImageFiles
from big_vision_lite.evaluators.finetune import FineTune
from big_vision_lite.evaluators.loss import Loss
from big_vision_lite.models.vit import ViT
from big_vision_lite.recipes import command_line
from big_vision_lite.runs import load
from big_vision_lite.runs.hyperrule import HyperRule
from big_vision_lite.schedules import Average, WarmupCosine
from big_vision_lite.training.optimizers import AdamW

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tools"))
import convert_checkpoint  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
SIZE, STEPS = 16, 4
MODULES = [
    f"outside.{name}"
    for name in (
        *("masked_autoencoder", "self_distillation", "two_towers", "segmentation"),
        "pictures",
    )
]
ALLOWED = [f"--allow_module={module}" for module in MODULES]


def vit() -> ViT:
    return ViT(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=4)


CROP = RandomResizedCrop(size_px=SIZE, area_min=0.4)
TWO = Views(views=(View(name="views", ops=(CROP, FlipLeftRight()), count=2),))
# Model, objective, keys of the source, ops, deterministic ops, further fields.
KINDS = {
    "masked_autoencoder": (
        MaskedAutoencoder(encoder=vit()),
        Reconstruction(),
        (),
        (Decode(), CROP, FlipLeftRight()),
        (Decode(), Resize(size_px=SIZE)),
        {},
    ),
    "self_distillation": (
        Student(encoder=vit()),
        SelfDistillation(),
        (),
        (Decode(), dataclasses.replace(TWO, keep_image=True), Resize(size_px=SIZE)),
        (Decode(), Resize(size_px=SIZE)),
        {"ema": Average(start=0.9, end=1.0)},
    ),
    "two_towers": (
        TwoTowers(image_tower=vit()),
        SigmoidContrast(),
        ("caption",),
        (Decode(), CROP, Tokenise()),
        (Decode(), Resize(size_px=SIZE)),
        {},
    ),
    "segmentation": (
        Segmenter(encoder=vit()),
        PixelClassification(),
        ("mask",),
        (Decode(), CROP, FlipLeftRight()),
        (Decode(), Resize(size_px=SIZE)),
        {},
    ),
}
# What evaluation makes of an example, where that is not what prediction does.
LOSS_OPS = {
    "self_distillation": (
        *(Decode(), Resize(size_px=SIZE)),
        Views(views=(View(name="views", count=2),), keep_image=True),
    ),
    "two_towers": (Decode(), Resize(size_px=SIZE), Tokenise()),
}


def recipe(kind: str, folder: pathlib.Path | None = None, **changes) -> TrainConfig:
    model, objective, keys, ops, preprocess, more = KINDS[kind]
    test = Pictures(count=19, seed=1, keys=keys)
    evaluators = {
        "loss": Loss(
            source=test, ops=LOSS_OPS.get(kind), batch_size=8, every_steps=STEPS
        )
    }
    if kind == "segmentation":
        evaluators["iou"] = IntersectionOverUnion(source=test)
    if folder is not None:
        train_set, val_set = (
            ImageFolder(path=str(folder), split=split) for split in ("train", "val")
        )
        evaluators["tune"] = FineTune(
            train=train_set,
            test=val_set,
            rule=HyperRule(
                num_steps=5, batch_size=16, ops=preprocess, preprocess=preprocess
            ),
            eval_batch_size=8,
            every_steps=STEPS,
            controls=False,
        )
    fields = dict(
        num_steps=STEPS,
        model=model,
        objective=objective,
        data=Stream(source=Pictures(keys=keys), ops=ops, batch_size=16, threads=2),
        preprocess=preprocess,
        optimizer=AdamW(schedule=WarmupCosine(peak=1e-2), layer_decay=0.9),
        evaluators=evaluators,
        checkpoints=Checkpoints(every_steps=2, keep_latest=9),
        log_every_steps=1,
    )
    return TrainConfig(**fields | more | changes)


@functools.cache
def images() -> pathlib.Path:
    return shapes_run.shared()[0]


# By default those with masks, and with a teacher and state of their own.
QUICK = ("masked_autoencoder", "self_distillation")


@pytest.fixture(
    scope="module",
    params=[
        kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
    ],
)
def trained(request, tmp_path_factory):
    """(kind, folder of a run that was stopped in the middle and resumed)."""
    kind = request.param
    workdir = tmp_path_factory.mktemp(kind) / "run"
    folder = images() if kind == "masked_autoencoder" else None
    config = recipe(kind, folder)
    straight = jax.device_get(train.train(config, epath.Path(workdir), quiet=True))
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    resumed = jax.device_get(train.train(config, epath.Path(workdir), quiet=True))
    return kind, workdir, straight, resumed


def records(workdir: pathlib.Path) -> dict[str, float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        record = json.loads(line)
        if record["step"] == STEPS:
            found |= record
    return found


def test_a_resumed_run_of_any_objective_is_the_straight_one_bit_for_bit(trained):
    kind, workdir, straight, resumed = trained
    names = trees.names(straight)
    assert any("encoder/block_00" in name or "image_tower" in name for name in names)
    for (name, a), b in zip(
        trees.flatten(straight).items(), jax.tree.leaves(resumed), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=name)
    if kind == "self_distillation":
        centre = resumed.collections["centres"]["centre"]
        assert np.any(centre != 0)


def test_the_loss_of_any_objective_is_evaluated_and_again_from_the_folder(trained):
    kind, workdir, _, _ = trained
    inside = records(workdir)
    prefix = "loss_ema" if kind == "self_distillation" else "loss"
    assert inside[f"{prefix}/examples"] == 19 and inside[f"{prefix}/loss"] > 0
    metrics = {
        "masked_autoencoder": "masked",
        "self_distillation": "temperature",
        "two_towers": "retrieved",
        "segmentation": "accuracy",
    }
    assert f"{prefix}/{metrics[kind]}" in inside
    names = "loss,iou" if kind == "segmentation" else "loss"
    flags = (f"--workdir={workdir}", f"--evaluators={names}", *ALLOWED)
    assert command_line.run(evaluate.main, ["evaluate", *flags]) == 0
    text = (workdir / f"evaluation_{STEPS}.json").read_text()
    alone = json.loads(text)["scores"]
    assert alone == {name: inside[name] for name in alone}
    assert f"{prefix}/loss" in alone


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["segmentation"], indirect=True)
def test_a_mask_is_counted_pixel_by_pixel_on_the_device(trained):
    _, workdir, _, _ = trained
    inside = records(workdir)
    assert inside["iou/pixels"] == 19 * SIZE * SIZE
    assert 0 <= inside["iou/mean_iou"] <= 1


def test_the_backbone_alone_gives_the_features(trained, tmp_path):
    kind, workdir, _, _ = trained
    out = tmp_path / "features.npz"
    flags = [f"--workdir={workdir}", f"--images={images() / 'val'}", f"--embed={out}"]
    assert command_line.run(predict.main, ["predict", *flags, *ALLOWED]) == 0
    features = np.load(out)["features"]
    assert features.shape == (27, 16) and np.ptp(features, axis=0).max() > 0
    run = load.load(workdir, allowed_modules=MODULES, log=lambda _: None)
    with jax.set_mesh(run.mesh):
        params = run.state.params if run.state.ema is None else run.state.ema
        part = KINDS[kind][0].backbone
        model = getattr(run.config.model, part)
        one = run.config.preprocess
        file = sorted((images() / "val" / "cross").iterdir())[0]
        example = {"image": file.read_bytes()}
        for op in one:
            example = op(example, np.random.default_rng(0))
        image = jnp.asarray(np.repeat(example["image"][None], 8, axis=0))
        found = model.apply({"params": params[part]}, image)
    np.testing.assert_allclose(found["pooled"][0], features[0], atol=1e-5)


def test_a_model_without_classes_is_told_to_be_fine_tuned(trained, tmp_path, capsys):
    kind, workdir, _, _ = trained
    flags = [f"--workdir={workdir}", f"--images={images() / 'val'}"]
    flags += [f"--out={tmp_path / 'x.csv'}", *ALLOWED]
    assert command_line.run(predict.main, ["predict", *flags]) == 1
    assert "has no head, so it names no classes" in capsys.readouterr().err


def test_the_backbone_is_exported_to_timm(trained, tmp_path, capsys):
    kind, workdir, _, _ = trained
    words = ["convert", str(workdir), "--to=timm", f"--out={tmp_path / 'timm'}"]
    convert_checkpoint.main([*words, *ALLOWED])
    shown = capsys.readouterr().out
    assert (tmp_path / "timm" / "model.safetensors").exists()
    if importlib.util.find_spec("timm") is None:
        assert "Parity was not compared" in shown
    else:
        assert "blocks.0" in shown and "failed" not in shown.lower()


def test_a_backbone_is_fine_tuned_as_evaluator_and_by_the_recipe(trained, tmp_path):
    kind, workdir, _, _ = trained
    if kind == "masked_autoencoder":
        assert 0 <= records(workdir)["tune/accuracy"] <= 1
    argument = f"init={workdir},data={images()},size=keep,batch=16,steps=5"
    flags = [f"--config={ROOT}/configs/finetune.py:{argument}"]
    flags += [f"--workdir={tmp_path / 'tuned'}", "--config.log_every_steps=5"]
    # What is fine-tuned is a ViT: nothing of the rest need be imported.
    flags += ["--config.evaluators.val.batch_size=8"]
    assert command_line.run(train.main, ["train", *flags]) == 0
    tuned, manifest = load.load_variables(epath.Path(tmp_path / "tuned/checkpoints/5"))
    assert manifest["class_names"] == list(shapes_run.CLASSES)
    assert tuned["head/kernel"].shape == (16, 3)
    assert manifest["origin"]["path"] == str(workdir)


@pytest.mark.slow
def test_two_checkpoints_fill_two_parts_and_the_rest_stays_fresh(tmp_path, capsys):
    towers = recipe("two_towers", num_steps=1, evaluators={})
    masked = recipe("masked_autoencoder", num_steps=1, evaluators={})
    saved = {
        name: jax.device_get(
            train.train(config, epath.Path(tmp_path / name), quiet=True).params
        )
        for name, config in (("towers", towers), ("masked", masked))
    }
    text = Init(path=str(tmp_path / "towers"), part="text_tower", into="text_tower")
    config = dataclasses.replace(
        towers,
        seed=3,
        init=(Init(path=str(tmp_path / "masked")), text),
        # Nothing moves: the state after one step is what it began with.
        optimizer=AdamW(schedule=WarmupCosine(peak=1e-2, warmup_steps=1)),
        num_steps=2,
        checkpoints=Checkpoints(every_steps=1, keep_latest=9),
    )
    train.train(config, epath.Path(tmp_path / "both"))
    shown = capsys.readouterr().out.replace("\n", "")
    assert f"init: encoder of {tmp_path / 'masked'} (ViT) -> image_tower: " in shown
    assert f"init: text_tower of {tmp_path / 'towers'}" in shown
    assert "-> text_tower: " in shown
    found, manifest = load.load_variables(epath.Path(tmp_path / "both/checkpoints/1"))
    for part, source in (
        ("image_tower", saved["masked"]["encoder"]),
        ("text_tower", saved["towers"]["text_tower"]),
    ):
        for name, leaf in trees.flatten(source).items():
            np.testing.assert_array_equal(found[f"{part}/{name}"], leaf)
    words = saved["towers"]["words"]["embedding"]
    assert np.any(found["words/embedding"] != words)
    origins = manifest["origin"]["parts"]
    assert [origin["path"] for origin in origins] == [
        str(tmp_path / "masked"),
        str(tmp_path / "towers"),
    ]
    wrong = dataclasses.replace(config, init=(dataclasses.replace(text, into="txt"),))
    with pytest.raises(ValueError, match="init.into=txt names no module.*image_tower"):
        train.train(wrong, epath.Path(tmp_path / "wrong"), quiet=True)


@dataclasses.dataclass(kw_only=True)
class Mean(Reconstruction):
    def __call__(self, forward, batch, rng):
        losses, metrics = super().__call__(forward, batch, rng)
        return losses.mean(), metrics


def test_an_objective_that_returns_one_number_is_refused(tmp_path):
    config = recipe("masked_autoencoder", evaluators={})
    config.objective = Mean()
    with pytest.raises(ValueError, match=r"losses of shape \(\) for a batch of 16"):
        train.train(config, epath.Path(tmp_path / "run"), quiet=True)


def test_text_that_no_op_makes_numbers_of_is_refused(tmp_path):
    config = recipe("two_towers", evaluators={})
    config.data.ops = config.data.ops[:-1]
    with pytest.raises(ValueError, match='"caption".*(Keep|token)'):
        train.train(config, epath.Path(tmp_path / "run"), quiet=True)
    config.data.ops = (*config.data.ops, Keep(keys=("image",)))
    with pytest.raises(ValueError, match="SigmoidContrast asks for .text., which"):
        train.train(config, epath.Path(tmp_path / "run"), quiet=True)


class Demanding(TwoTowers):
    def inputs(self, batch):
        return {"image": batch["image"], "text": batch["text"]}


def test_a_model_that_wants_more_than_an_image_is_refused_by_predict(tmp_path):
    config = recipe("two_towers", num_steps=1, evaluators={})
    config.model = Demanding(image_tower=vit())
    train.train(config, epath.Path(tmp_path / "run"), quiet=True)
    images = ImageFiles(str(shapes_run.shared()[0] / "val"))
    run = load.load(tmp_path / "run", allowed_modules=[*MODULES, __name__])
    with pytest.raises(ValueError, match="Demanding.inputs asks for .text., but pred"):
        predict.predict(run, images)
    found = predict.predict(run, images, top=0, embed=True)
    assert found.features.shape == (27, 16)
