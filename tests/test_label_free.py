"""Objectives without labels, of the package: trained, stopped, resumed, handed over."""

import dataclasses
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
import shapes_run
from etils import epath

from big_vision_lite import predict, train, trees
from big_vision_lite.config import Checkpoints, Init, TrainConfig
from big_vision_lite.data.ops import Decode, FlipLeftRight, Resize
from big_vision_lite.data.ops.geometry import RandomResizedCrop
from big_vision_lite.data.ops.views import View, Views
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import ImageFolder
from big_vision_lite.evaluators.loss import Loss
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.distilled import Distilled
from big_vision_lite.models.embedder import Embedder, Projector
from big_vision_lite.models.masked_autoencoder import MaskedAutoencoder
from big_vision_lite.models.masked_clusters import MaskedClusters
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.objectives.clusters import ClusterPrediction
from big_vision_lite.objectives.contrastive import NTXent
from big_vision_lite.objectives.distillation import (
    Distance,
    FeatureDistillation,
    LogitDistillation,
    QueueDistillation,
)
from big_vision_lite.objectives.masked_patches import MaskedPatches
from big_vision_lite.objectives.reconstruction import MaskedReconstruction
from big_vision_lite.objectives.regularised import LeJEPA, VICReg
from big_vision_lite.objectives.self_distillation import Balance, SelfDistillation
from big_vision_lite.recipes import command_line
from big_vision_lite.runs.records import read_history
from big_vision_lite.schedules import Average, WarmupCosine
from big_vision_lite.training.optimizers import AdamW

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tools"))
import convert_checkpoint  # noqa: E402

# tests/outside has their like among the default tests.
pytestmark = pytest.mark.slow

SIZE, STEPS = 16, 4


def vit(**fields) -> ViT:
    small = dict(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=4)
    return ViT(**small | fields)


def crops(name: str, size_px: int, count: int) -> View:
    crop = RandomResizedCrop(size_px=size_px, area_min=0.4)
    return View(name=name, ops=(crop, FlipLeftRight()), count=count)


PROJECTOR = Projector(hidden=(16,), features=8)
TWO = (Decode(), Views(views=(crops("views", SIZE, 2),)))
MULTI = (Decode(), Views(views=(crops("views", SIZE, 2), crops("local", 8, 3))))
ONE = (Decode(), RandomResizedCrop(size_px=SIZE), FlipLeftRight())
# Model, objective, ops, further fields.
KINDS = {
    "masked autoencoder": (
        MaskedAutoencoder(
            encoder=vit(pooling=Pooling.CLASS_TOKEN),
            decoder_width=8,
            decoder_depth=1,
            decoder_heads=2,
        ),
        MaskedReconstruction(),
        ONE,
        {},
    ),
    "self-distillation": (
        Embedder(encoder=vit(), projector=PROJECTOR, prototypes=6, centre_momentum=0.9),
        SelfDistillation(
            balance=Balance.CENTRE,
            teacher_temperature_start=0.02,
            koleo_weight=0.1,
            local_views="local",
        ),
        MULTI,
        {"ema": Average(start=0.9, end=1.0, recalibrate_statistics=2)},
    ),
    "sinkhorn": (
        Embedder(encoder=vit(), projector=PROJECTOR, prototypes=6),
        SelfDistillation(),
        TWO,
        {"ema": Average(start=0.9, recalibrate_statistics=0)},
    ),
    "iBOT": (
        Embedder(
            encoder=vit(mask_token=True, registers=2),
            projector=PROJECTOR,
            prototypes=6,
            patch_projector=Projector(hidden=(16,), features=8, batch_norm=False),
            patch_prototypes=5,
            centre_momentum=0.9,
        ),
        SelfDistillation(
            balance=Balance.CENTRE,
            local_views="local",
            patches=MaskedPatches(visible_weight=0.5, progress_end=0.5),
        ),
        MULTI,
        {"ema": Average(start=0.9, recalibrate_statistics=2)},
    ),
    "clusters": (
        MaskedClusters(
            encoder=vit(registers=1),
            decoder_width=8,
            decoder_depth=1,
            decoder_heads=2,
            clusters=6,
        ),
        ClusterPrediction(),
        ONE,
        {"ema": Average(start=0.9)},
    ),
    "NT-Xent": (Embedder(encoder=vit(), projector=PROJECTOR), NTXent(), TWO, {}),
    "VICReg": (Embedder(encoder=vit(), projector=PROJECTOR), VICReg(), TWO, {}),
    "LeJEPA": (
        Embedder(encoder=vit(), projector=PROJECTOR),
        LeJEPA(views=("views", "local")),
        MULTI,
        {},
    ),
    "features": (
        Distilled(
            student=vit(),
            teachers=(vit(width=24), vit(patch_size=8)),
            teacher_size_px=(SIZE, 2 * SIZE),
            adaptors=True,
            adaptor_width=16,
        ),
        FeatureDistillation(),
        ONE,
        {"freeze": ("teachers_.*",)},
    ),
    "phi-s": (
        Distilled(
            student=vit(),
            teachers=(vit(width=24), vit(width=32)),
            adaptors=True,
            adaptor_width=16,
            standardise_steps=3,
        ),
        FeatureDistillation(distance=Distance.PHI_S),
        ONE,
        {"freeze": ("teachers_.*",)},
    ),
    "queue": (
        Distilled(
            student=vit(),
            teachers=(vit(width=24),),
            adaptors=True,
            adaptor_width=16,
            queue_length=40,
        ),
        QueueDistillation(),
        ONE,
        {"freeze": ("teachers_.*",)},
    ),
    "logits": (
        Distilled(
            student=vit(head=Classifier(num_classes=3)),
            teachers=(vit(width=24, head=Classifier(num_classes=3)),),
        ),
        LogitDistillation(),
        ONE,
        {"freeze": ("teachers_.*",)},
    ),
}


def recipe(kind: str, **changes) -> TrainConfig:
    model, objective, ops, more = KINDS[kind]
    images = str(shapes_run.shared()[0])
    unlabelled = ImageFolder(path=images, split="train", labels=False)
    held_out = ImageFolder(path=images, split="val", labels=False)
    fields = dict(
        num_steps=STEPS,
        model=model,
        objective=objective,
        data=Stream(source=unlabelled, ops=ops, batch_size=16, threads=2),
        preprocess=(Decode(), Resize(size_px=SIZE)),
        optimizer=AdamW(schedule=WarmupCosine(peak=1e-2), layer_decay=0.9),
        evaluators={
            "loss": Loss(source=held_out, ops=ops, batch_size=8, every_steps=STEPS)
        },
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


def test_a_resumed_run_is_the_straight_one_bit_for_bit(trained):
    kind, _, straight, resumed = trained
    names = trees.flatten(straight)
    for (name, a), b in zip(names.items(), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    if kind == "self-distillation":
        assert np.any(resumed.collections["centres"]["centre"] != 0)
    if kind == "iBOT":
        assert np.any(resumed.collections["centres"]["patch_centre"] != 0)
    if kind == "phi-s":
        standard = resumed.collections["standards"]["standard_0"]
        assert standard["steps"] == 3 and standard["kernel"].std() > 0.01
    if kind == "queue":
        queue = resumed.collections["queues"]["queue_0"]
        assert queue["filled"] == 40 and np.any(queue["rows"], axis=1).all()


def test_health_stands_on_every_log_line_and_the_loss_is_evaluated(trained):
    kind, workdir, _, _ = trained
    records = read_history(epath.Path(workdir))
    lines = [record for record in records if "train/loss" in record]
    assert [record["step"] for record in lines] == [1, 2, 3, 4]
    expected = {
        "features": ("distance_teacher_0", "distance_teacher_1"),
        "phi-s": ("distance_teacher_0", "distance_teacher_1"),
        "queue": ("distance_teacher_0", "teacher_entropy"),
        "logits": ("agreement", "teacher_entropy"),
    }
    health = expected.get(kind, ("feature_sd", "effective_rank"))
    if kind in ("self-distillation", "sinkhorn", "iBOT"):
        health += ("teacher_entropy", "prototypes_used", "teacher_distance")
    for record in lines:
        assert {f"train/{name}" for name in health} <= record.keys()
    prefix = "loss" if "ema" not in KINDS[kind][3] else "loss_ema"
    scores = {name for record in records for name in record}
    assert {f"{prefix}/loss", f"{prefix}/examples"} <= scores


@pytest.mark.parametrize("trained", ["features", "logits"], indirect=True)
def test_teachers_do_not_move(trained):
    kind, workdir, straight, _ = trained
    first = train.train(
        recipe(kind, num_steps=1, evaluators={}),
        epath.Path(workdir.parent / "one"),
        quiet=True,
    )
    teachers = {n: x for n, x in trees.flatten(first.frozen).items()}
    assert teachers and all(name.startswith("teachers_") for name in teachers)
    for name, leaf in trees.flatten(straight.frozen).items():
        np.testing.assert_array_equal(leaf, teachers[name])


def test_the_backbone_alone_gives_features_and_goes_to_timm(trained, tmp_path, capsys):
    kind, workdir, _, _ = trained
    images = shapes_run.shared()[0] / "val"
    out = tmp_path / "features.npz"
    words = [f"--workdir={workdir}", f"--images={images}", f"--embed={out}"]
    assert command_line.run(predict.main, ["predict", *words]) == 0
    features = np.load(out)["features"]
    assert features.shape[1] == 16 and np.ptp(features, axis=0).max() > 0
    words = ["convert", str(workdir), "--to=timm", f"--out={tmp_path / 'timm'}"]
    convert_checkpoint.main(words)
    assert (tmp_path / "timm" / "model.safetensors").exists()


def test_a_teacher_takes_the_weights_of_a_run(tmp_path, capsys):
    teacher = dataclasses.replace(
        recipe("masked autoencoder", num_steps=1, evaluators={}),
    )
    state = train.train(teacher, epath.Path(tmp_path / "teacher"), quiet=True)
    encoder = jax.device_get(state.params["encoder"])
    model = Distilled(
        student=vit(),
        teachers=(vit(pooling=Pooling.CLASS_TOKEN),),
        adaptors=True,
        adaptor_width=8,
    )
    config = recipe("features", model=model, num_steps=1, evaluators={})
    config.init = (Init(path=str(tmp_path / "teacher"), into="teachers_0"),)
    found = train.train(config, epath.Path(tmp_path / "student"), quiet=True)
    for name, leaf in trees.flatten(found.frozen["teachers_0"]).items():
        np.testing.assert_array_equal(leaf, trees.flatten(encoder)[name])


def distil(method: str, workdir: pathlib.Path) -> list[str]:
    images, run = shapes_run.shared()
    recipe = pathlib.Path(__file__).parents[1] / "configs" / "distil.py"
    argument = f"teacher={run},student=ViT:Ti/8,data={images},allow_module=shapes_run"
    return [
        "train",
        f"--config={recipe}:{argument},batch=8,method={method}",
        "--allow_module=shapes_run",
        f"--workdir={workdir}",
        "--config.num_steps=12",
        "--config.optimizer.schedule.warmup_steps=0",
        "--config.model.student.depth=1",
        "--config.log_every_steps=1",
    ]


@pytest.mark.parametrize("method", ["features", "phi_s", "queue"])
def test_any_backbone_is_distilled_from_a_folder(method, tmp_path, capsys):
    words = distil(method, tmp_path / "run")
    if method == "phi_s":
        words.append("--config.model.standardise_steps=2")
        words.append("--config.model.teacher_size_px=(16,)")
        words.append("--config.data.ops[0].size_px=24")
    assert command_line.run(train.main, words) == 0
    resized = "teachers_0 sees the images of 24 x 24 px as 16 x 16 px"
    assert (resized in capsys.readouterr().out) == (method == "phi_s")
    records = read_history(epath.Path(tmp_path / "run"))
    losses = [r["train/loss"] for r in records if "train/loss" in r]
    assert len(losses) == 12 and np.isfinite(losses).all()
    assert np.mean(losses[8:]) < np.mean(losses[:4])


def test_a_method_of_distillation_that_is_none_is_said(tmp_path, capsys):
    assert command_line.run(train.main, distil("tokens", tmp_path / "run")) == 1
    said = capsys.readouterr().err
    assert "method=tokens is unknown; use one of features, phi_s, queue" in said


def test_a_teacher_keeps_its_head_whatever_the_data_have(tmp_path, capsys):
    labelled = ImageFolder(path=str(shapes_run.shared()[0]), split="train")
    with_head = vit(width=24, head=Classifier(num_classes=3))
    teacher = recipe(
        "logits",
        model=with_head,
        objective=SoftmaxClassification(),
        data=Stream(source=labelled, ops=ONE, batch_size=16),
        freeze=(),
        num_steps=2,
        evaluators={},
    )
    state = train.train(teacher, epath.Path(tmp_path / "teacher"), quiet=True)
    config = recipe("logits", num_steps=1, evaluators={})
    config.init = (Init(path=str(tmp_path / "teacher"), into="teachers_0"),)
    found = train.train(config, epath.Path(tmp_path / "student"))
    kernel = found.frozen["teachers_0"]["head"]["kernel"]
    np.testing.assert_array_equal(kernel, state.params["head"]["kernel"])
    assert np.any(kernel) and "new head" not in capsys.readouterr().out
