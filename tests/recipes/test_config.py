import ast
import dataclasses
import enum
import functools
import importlib
import json
import os
import pathlib
import pkgutil
import re
import shlex
import subprocess
import sys
import typing

import jax
import model_spec
import pytest

import big_vision_lite
from big_vision_lite import train
from big_vision_lite.config import Checkpoints, Init, PositionResize, TrainConfig
from big_vision_lite.data import ops, sources
from big_vision_lite.data.ops import colour, randaugment
from big_vision_lite.data.ops import device as device_ops
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources.arrays import NoImages
from big_vision_lite.evaluators import regression
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.evaluators.fewshot import FewShot, FewShotSet
from big_vision_lite.evaluators.finetune import FineTune
from big_vision_lite.evaluators.loss import Loss
from big_vision_lite.evaluators.online_probe import OnlineProbe
from big_vision_lite.evaluators.reconstructions import Reconstructions
from big_vision_lite.evaluators.retrieval import Retrieval
from big_vision_lite.evaluators.zero_shot import ZeroShot
from big_vision_lite.models.bit import BiT
from big_vision_lite.models.bit_v1 import Trunk
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import Remat
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.captioner import Captioner
from big_vision_lite.models.distilled import Distilled
from big_vision_lite.models.embedder import Embedder, Projector
from big_vision_lite.models.masked_autoencoder import MaskedAutoencoder
from big_vision_lite.models.masked_clusters import MaskedClusters
from big_vision_lite.models.text_transformer import TextTransformer
from big_vision_lite.models.two_tower import TwoTower
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.captioning import Captioning
from big_vision_lite.objectives.classification import (
    SigmoidClassification,
    SoftmaxClassification,
)
from big_vision_lite.objectives.clusters import ClusterPrediction
from big_vision_lite.objectives.contrastive import NTXent
from big_vision_lite.objectives.distillation import (
    FeatureDistillation,
    LogitDistillation,
    QueueDistillation,
)
from big_vision_lite.objectives.image_text import CLIP, SigLIP
from big_vision_lite.objectives.masked_patches import MaskedPatches
from big_vision_lite.objectives.numbers import Numbers
from big_vision_lite.objectives.reconstruction import MaskedReconstruction
from big_vision_lite.objectives.regression import Regression
from big_vision_lite.objectives.regularised import LeJEPA, VICReg
from big_vision_lite.objectives.self_distillation import SelfDistillation
from big_vision_lite.recipes import command_line, mistakes, serialize
from big_vision_lite.runs.adamw_rule import AdamWRule
from big_vision_lite.runs.hyperrule import HyperRule, Repeated
from big_vision_lite.runtime.sharding import Layout, Mesh, ShardingRule
from big_vision_lite.runtime.startup import Platform
from big_vision_lite.schedules import (
    Average,
    Constant,
    StepDrops,
    WarmupCosine,
    WarmupLinear,
    WarmupRsqrt,
)
from big_vision_lite.training.gradient_point import SAM, ScheduleFreeAdamW
from big_vision_lite.training.layerwise import LAMB, LARS, Muon
from big_vision_lite.training.optimizers import SGD, Adafactor, AdamW, Lion, Rule

DIGITS = sources.Digits
TINY = pathlib.Path(__file__).parents[1] / "recipes" / "digits_tiny.py"


def recipe(**overrides) -> TrainConfig:
    fields = dict(
        num_steps=10,
        model=BiT.of("small", head=Classifier(num_classes=10)),
        objective=SoftmaxClassification(),
        data=Stream(source=DIGITS(), ops=(ops.Decode(channels=1),), batch_size=8),
        preprocess=(ops.Decode(channels=1),),
        optimizer=SGD(schedule=Constant(peak=0.1)),
    )
    return TrainConfig(**{**fields, **overrides})


def everything() -> list[TrainConfig]:
    """Recipes that hold every component of the package at least once."""
    every_op = (
        ops.Decode(),
        ops.InceptionCrop(size_px=8),
        ops.DecodeInceptionCrop(size_px=8, width_px=9),
        ops.RandomResizedCrop(size_px=8),
        ops.Resize(size_px=8, width_px=4),
        ops.ResizeSmall(size_px=8),
        ops.CentralCrop(size_px=8),
        ops.RandomCrop(size_px=8),
        ops.FlipLeftRight(),
        ops.RandomAffine(),
        colour.RandomLowResolution(side_min_px=8),
        ops.ToGray(),
        ops.ToRgb(),
        ops.Invert(),
        ops.Keep(),
        ops.Pad(key="boxes", length=4),
        ops.Describe(names=("a",), text="file", words=("bold",)),
        ops.Tokenize(tokenizer=ops.Bytes()),
        ops.Tokenize(tokenizer=ops.SentencePiece(path="a.model"), end=1),
        ops.Tokenize(tokenizer=ops.HuggingFaceTokenizer(path="tokenizer.json")),
        ops.Views(views=(ops.View(name="global", ops=(ops.Invert(),), count=2),)),
        randaugment.RandAugment(),
        ops.ColorJitter(hue=0.1),
        ops.RandomGray(),
        ops.GaussianBlur(),
        ops.Solarize(),
    )
    vit = ViT.of(
        "Ti/4",
        dropout=0.1,
        head=Classifier(num_classes=3, hidden_dim=4),
        mean=(1.0, 2.0, 3.0),
        positions=Positions.LEARNED,
        remat=Remat.FULL,
    )
    first = recipe(
        model=vit,
        objective=SigmoidClassification(),
        data=Stream(
            source=sources.Tfds(dataset="cifar10", split="train[:99%]"),
            ops=every_op,
            device_ops=(
                device_ops.Mixup(num_classes=3),
                device_ops.CutMix(num_classes=3),
            ),
            batch_size=8,
            threads=2,
        ),
        preprocess=every_op[:2],
        optimizer=AdamW(
            schedule=WarmupCosine(peak=1e-3, warmup_steps=2),
            rules=(
                Rule(pattern="head/.*", learning_rate_multiplier=0.5),
                Rule(pattern=".*"),
            ),
            layer_decay=0.75,
            clip_norm=None,
        ),
        evaluators={
            "test": Classification(source=sources.ImageFolder(path="/a b/ü")),
            "loss": Loss(source=DIGITS(split="test"), ops=every_op[:1]),
            "few": FewShot(
                sets=(FewShotSet(name="d", train=DIGITS(), test=DIGITS(split="test")),)
            ),
            "tune": FineTune(
                train=DIGITS(), test=DIGITS(split="test"), rule=HyperRule()
            ),
        },
        num_epochs=1.5,
        init=(
            Init(path="runs/x", rename=("a=>b",), position_resize=PositionResize.ERROR),
            Init(path="runs/y", into="teacher", part="encoder"),
        ),
        freeze=("encoder/.*",),
        ema=Average(start=0.999),
        micro_batches=2,
        mesh=Mesh(fsdp=4),
        sharding=(
            ShardingRule(pattern="head/.*", layout=Layout.REPLICATE),
            ShardingRule(pattern=".*"),
        ),
        checkpoints=Checkpoints(keep_every_steps=5),
        platform=Platform.CPU,
        deterministic=True,
        profile_steps=(2, 3),
    )
    schedules = (
        WarmupLinear(peak=0.1, warmup_steps=1, end_fraction=0.5),
        WarmupRsqrt(peak=0.1, cooldown_steps=2),
        StepDrops(peak=0.1, drop_fractions=(0.3, 0.6)),
    )
    optimizers = (
        Lion(schedule=schedules[0]),
        LARS(schedule=schedules[0]),
        LAMB(schedule=schedules[0]),
        Muon(schedule=schedules[0], matrices=("block.*/kernel",)),
        SAM(base=SGD(schedule=schedules[0])),
        ScheduleFreeAdamW(schedule=Constant(peak=0.1, warmup_steps=3)),
    )
    head = Classifier(num_classes=10)
    hybrid = ViT.of("S/1", stem=Trunk(stages=(1,), width=32), head=head)
    models = [
        kind.of(kind.published[-1], head=head)
        for kind in model_spec.families().values()
    ]
    of_elsewhere = NoImages(classes=("a", "b"), origin="a.npz")
    ages = sources.Table(
        path="t.csv", image="file", label=("age",), kind=sources.LabelKind.NUMBERS
    )
    tagged = sources.Tags(
        source=dataclasses.replace(ages, label=("tags",), kind=sources.LabelKind.TAGS),
        vocabulary="tags.json",
    )
    repeated = Stream(source=Repeated(source=DIGITS(), times=2), batch_size=8)
    embedder = Embedder(
        encoder=vit, projector=Projector(hidden=(4, 4), features=3), prototypes=5
    )
    words = TextTransformer(vocabulary=9, width=8, depth=1, mlp_dim=8, num_heads=2)
    towers = TwoTower(image_tower=vit, text_tower=words, features=8, bias=None)
    teachers = (hybrid, ViT.of("S/16"))
    distilled = Distilled(student=vit, teachers=teachers, teacher_size_px=(8, 9))
    without_labels = [
        (MaskedAutoencoder(encoder=vit), MaskedReconstruction()),
        (embedder, NTXent()),
        (embedder, VICReg()),
        (embedder, LeJEPA(views=("global", "local"))),
        (embedder, SelfDistillation(teacher_temperature_start=0.01)),
        (embedder, SelfDistillation(patches=MaskedPatches(visible_weight=0.5))),
        (MaskedClusters(encoder=vit, clusters=8), ClusterPrediction()),
        (distilled, LogitDistillation()),
        (distilled, FeatureDistillation()),
        (distilled, QueueDistillation()),
        (towers, SigLIP(equal_captions=True)),
        (towers, CLIP()),
        (Captioner(encoder=vit, vocabulary=9), Captioning()),
    ]
    watched = {
        "probe": OnlineProbe(train=DIGITS(), test=DIGITS(split="test")),
        "pictures": Reconstructions(source=DIGITS(split="test")),
        "zero_shot": ZeroShot(source=DIGITS(split="test"), tokenize=ops.Tokenize()),
        "retrieval": Retrieval(source=DIGITS(split="test"), tokenize=ops.Tokenize()),
        "tune": FineTune(
            train=DIGITS(), test=DIGITS(split="test"), rule=AdamWRule(num_steps=5)
        ),
    }
    return [
        first,
        recipe(optimizer=SGD(schedule=schedules[0]), data=repeated),
        recipe(optimizer=Adafactor(schedule=schedules[1])),
        recipe(optimizer=AdamW(schedule=schedules[2]), model=hybrid),
        *(recipe(optimizer=optimizer) for optimizer in optimizers),
        *(recipe(model=model) for model in models),
        *(
            recipe(model=model, objective=objective, evaluators=watched)
            for model, objective in without_labels
        ),
        recipe(data=Stream(source=of_elsewhere, batch_size=1), objective=Numbers()),
        recipe(
            data=Stream(source=sources.Resampled(source=tagged), batch_size=8),
            objective=SoftmaxClassification(share_labels=True),
        ),
        recipe(
            data=Stream(source=ages, batch_size=8),
            objective=Regression(names=("age",), mean=(40.0,), std=(9.0,)),
            evaluators={"val": regression.Regression(source=ages)},
        ),
    ]


# Dataclasses that are no part of a recipe, by module.
NOT_CONFIG = {
    "recipes.command_line", "data.host_batch", "data.sources.contents",
    "data.sources.listing", "data.sources.table_file", "data.sources.table_labels",
    "data.sources.tfds.prepared_set", "data.sources.tfds.features", "data.unreadable",
    "runs.class_pairs", "runs.evaluations", "evaluators.features",
    "models.blocks.attention", "models.blocks.mlp", "models.blocks.patches",
    "models.blocks.pooling", "models.blocks.projections", "predict", "training.program",
    "runs.load", "training.state", "evaluators.knn", "evaluators.duplicates",
}  # fmt: skip
PARTS = {
    *("StandardisedConv", "Conv", "BatchNorm", "Unit", "Stage", "Bottleneck"),
    *("EncoderBlock", "Encoder", "MixerBlock", "Multiplier", "MaskedModel"),
    *("DecoderBlock", "TextEmbedding", "PhiS", "Queue"),
    *("Dense", "LayerNorm", "GroupNorm", "SavedRun", "_Split"),
}


@functools.cache
def components() -> dict[str, type]:
    """Finds every class of the package that a recipe may hold."""
    found = {}
    for module in pkgutil.walk_packages(big_vision_lite.__path__, "big_vision_lite."):
        short = module.name.removeprefix("big_vision_lite.")
        if short in NOT_CONFIG:
            continue
        for name, kind in vars(importlib.import_module(module.name)).items():
            own = isinstance(kind, type) and kind.__module__ == module.name
            if not own or not dataclasses.is_dataclass(kind) or name in PARTS:
                continue
            # Flags set fields; what is frozen is no part of a recipe. Linen's are, by
            # another name.
            if hasattr(kind, "apply") or not kind.__dataclass_params__.frozen:
                found[f"{module.name}.{name}"] = kind
    return found


def classes_in(encoded) -> set[str]:
    if isinstance(encoded, dict):
        here = {encoded[serialize.CLASS]} if serialize.CLASS in encoded else set()
        return here.union(*map(classes_in, encoded.values()))
    if isinstance(encoded, list):
        return set().union(*map(classes_in, encoded))
    return set()


def test_the_samples_below_hold_every_component_of_the_package():
    documents = [json.loads(serialize.to_json(config)) for config in everything()]
    held = set().union(*map(classes_in, documents))
    assert held == set(components()), held ^ set(components())


@pytest.mark.parametrize("index", range(len(everything())))
def test_a_recipe_of_every_component_survives_json(index):
    config = everything()[index]
    text = serialize.to_json(config)
    rebuilt = serialize.from_json(text)
    assert rebuilt == config and rebuilt is not config
    assert serialize.to_json(rebuilt) == text
    assert serialize.rebuild(config) == config
    for path, value, _ in mistakes.list_leaves(config):
        again = dict((p, v) for p, v, _ in mistakes.list_leaves(rebuilt))[path]
        assert type(again) is type(value) and again == value, path


@pytest.mark.parametrize("name", sorted(components()))
def test_a_component_is_built_by_keyword_from_types_that_flags_can_set(name):
    kind = components()[name]
    fields = serialize.fields(kind)
    assert all(field.kw_only for field in fields)
    assert not kind.__dataclass_params__.frozen or hasattr(kind, "apply")
    for field, declared in serialize.field_types(kind).items():
        item, _ = serialize.without_none(declared)
        if typing.get_origin(item) is tuple:
            items = typing.get_args(item)
            assert len(items) == 2 and items[1] is Ellipsis, field
            item = items[0]
        elif typing.get_origin(item) is dict:
            assert kind is TrainConfig and typing.get_args(item)[0] is str
            continue
        assert isinstance(item, type), f"{name}.{field}: {declared}"
        assert (
            item in (bool, int, float, str)
            or issubclass(item, enum.StrEnum)
            or dataclasses.is_dataclass(item)
            or getattr(item, "_is_protocol", False)
        ), f"{name}.{field}: {declared}"
    for field in fields:
        default = field.default
        assert not dataclasses.is_dataclass(default), f"{name}.{field.name} is shared"


def enums() -> list[type[enum.StrEnum]]:
    found = set()
    for module in pkgutil.walk_packages(big_vision_lite.__path__, "big_vision_lite."):
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
                if kind.__module__.startswith("big_vision_lite"):
                    found.add(kind)
    return sorted(found, key=lambda kind: kind.__qualname__)


def test_names_of_enumerations_are_their_values():
    # ml_collections reads an override by name, JSON by value.
    assert len(enums()) > 8
    for kind in enums():
        assert {m.name.lower() for m in kind} == {m.value.lower() for m in kind}, kind
        assert all(m.name.lower() == m.value for m in kind), kind


def test_files_that_define_components_do_not_postpone_annotations():
    files = {
        importlib.import_module(k.__module__).__file__ for k in components().values()
    }
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(pathlib.Path(file).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                assert "annotations" not in [n.name for n in node.names], file
    # What it would do: types become text, and no override works.
    for kind in components().values():
        assert not any(isinstance(f.type, str) for f in serialize.fields(kind)), kind


def test_the_names_at_the_top_of_a_recipe_are_frozen():
    # Every name is in READMEs, shell histories and messages: think before adding.
    assert [f.name for f in dataclasses.fields(TrainConfig)] == [
        "model", "objective", "data", "preprocess", "optimizer", "evaluators", "seed",
        "num_epochs", "num_steps", "init", "freeze", "ema", "micro_batches", "mesh",
        "sharding", "checkpoints", "log_every_steps", "platform", "deterministic",
        "profile_steps",
    ]  # fmt: skip
    names = {
        Stream: ["source", "batch_size", "ops", "device_ops", "threads", "processes"],
        Init: [
            "path",
            "into",
            "part",
            "drop",
            "rename",
            "position_resize",
            "match_classes",
        ],
        Checkpoints: ["every_steps", "keep_latest", "keep_every_steps"],
        Mesh: ["data", "fsdp", "tensor"],
    }
    for kind, expected in names.items():
        assert [f.name for f in dataclasses.fields(kind)] == expected


def parse(*flags, file=TINY, more=()) -> TrainConfig:
    argv = ["train", f"--config={file}", *(f"--config.{f}" for f in flags), *more]
    return command_line.parse(argv, train.define_flags).config


def error_of(*flags, file=TINY, more=()) -> str:
    with pytest.raises(ValueError) as caught:
        parse(*flags, file=file, more=more)
    return str(caught.value)


def write(folder, text) -> pathlib.Path:
    path = folder / "recipe.py"
    path.write_text(text)
    return path


BODY = """
from big_vision_lite.config import TrainConfig
from big_vision_lite.config import Init, PositionResize
from big_vision_lite.data.ops import Decode, Resize
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits
from big_vision_lite.data.ops.device import Mixup
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.training.optimizers import AdamW, Rule
from big_vision_lite.schedules import WarmupCosine


def get_config(arg=""):
    return TrainConfig(
        num_steps=10,
        model=ViT.of("Ti/4", depth=1, head=Classifier(num_classes=10)),
        objective=SoftmaxClassification(),
        data=Stream(
            source=Digits(),
            ops=(Decode(channels=1), Resize(size_px=8)),
            device_ops=(Mixup(num_classes=10),),
            batch_size=8,
        ),
        preprocess=(Decode(channels=1),),
        optimizer=AdamW(
            schedule=WarmupCosine(peak=0.1, warmup_steps=2),
            weight_decay=0.1,
            rules=(Rule(pattern="head/.*", learning_rate_multiplier=0.5),),
        ),
        evaluators={"test": Classification(source=Digits(split="test"))},
        init=(Init(path="runs/x"),),
    )
"""


@pytest.fixture
def body(tmp_path):
    return write(tmp_path, BODY)


# Values that no constructor refuses, where one more or another letter would be.
OTHER = {
    "data.source.split": "test",
    "evaluators.test.source.split": "train",
    "data.ops[0].channels": 3,
    "preprocess[0].channels": 3,
    "optimizer.beta1": 0.5,
    "optimizer.beta2": 0.5,
    "optimizer.layer_decay": 0.5,
    "optimizer.rules[0].learning_rate_multiplier": 0.25,
    "ema": None,
    "objective.label_smoothing": 0.5,
    "model.dropout": 0.5,
    "model.stochastic_depth": 0.5,
    "model.width": 12,
    "micro_batches": 2,
    "data.batch_size": 10,
    "profile_steps": (3, 4),
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "freeze": ("a", "b"),
    "init[0].rename": ("a=>b",),
    # Allowed only together with other values.
    "data.ops[0].orientation": None,
    "preprocess[0].orientation": None,
    "model.distillation_token": None,
    "model.class_tokens": None,
    "model.position_grid": None,
}


def other(path, value, declared):
    """Another value of the declared type than the one a recipe has."""
    if path in OTHER:
        return OTHER[path]
    kind, _ = serialize.without_none(declared)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return (item(1), item(2)) if item in (int, float) else None
    if issubclass(kind, enum.StrEnum):
        return next(m for m in kind if m != value)
    if kind is bool:
        return not value
    if kind is str:
        return f"{value or ''}x y"
    if kind not in (int, float):
        return None  # a component: chosen in the recipe, not by a flag
    return kind(1 if value is None else value + 1)


def test_every_leaf_of_a_recipe_is_overridden_by_its_flag(body):
    config = parse(file=body)
    expected, flags = {}, []
    for path, value, declared in mistakes.list_leaves(config):
        new = other(path, value, declared)
        if new is not None:
            expected[path] = new
            flags.append(f"{path}={new}")
    for flag, (path, new) in zip(flags, expected.items(), strict=True):
        # The length of both stays free for the schedule's checks.
        found = {p: v for p, v, _ in mistakes.list_leaves(parse(flag, file=body))}
        assert found[path] == new and type(found[path]) is type(new), flag
        changed = [p for p, v, _ in mistakes.list_leaves(config) if found[p] != v]
        assert changed == [path]
    assert len(flags) > 50
    untouched = {p for p, _, _ in mistakes.list_leaves(config)} - set(expected)
    alone = {name for name, value in OTHER.items() if value is None} | {"model.stem"}
    assert untouched <= {"sharding[0].pattern", *alone}, untouched
    # And all at once.
    found = {p: v for p, v, _ in mistakes.list_leaves(parse(*flags, file=body))}
    assert {p: found[p] for p in expected} == expected


def test_none_clears_what_is_optional(body):
    for path, value, declared in mistakes.list_leaves(parse(file=body)):
        if not serialize.without_none(declared)[1]:
            continue
        if value is None:
            if (new := other(path, value, declared)) is None:
                continue
            config = parse(f"{path}={new}", f"{path}=none", file=body)
        else:
            config = parse(f"{path}=none", "num_epochs=1", file=body)
        assert dict((p, v) for p, v, _ in mistakes.list_leaves(config))[path] is None
    assert parse("init=none", file=body).init == ()
    assert parse("evaluators.test.every_steps=0").evaluators["test"].every_steps == 0


def test_the_last_of_several_values_counts():
    def threads(*flags, **more):
        return parse(*flags, **more).data.threads

    assert threads("data.threads=none", "data.threads=5") == 5
    assert threads("data.threads=5", "data.threads=none") is None
    assert threads("data.threads=5", "data.threads=2") == 2
    assert threads("data.threads=NONE") is None
    assert threads(more=["--config.data.threads", "none"]) is None
    assert threads(more=["--config.data.threads", "5"]) == 5


def test_an_average_needs_no_more_than_its_decay():
    assert parse("ema.start=0.5").ema == Average(start=0.5)
    assert parse("ema=build", "ema.end=1").ema == Average(end=1.0)
    assert parse("ema.start=0.5", "ema=none").ema is None


def test_an_enumeration_may_have_a_none_of_its_own():
    config = parse("model.remat=none", "model.positions=none")
    assert config.model.remat is Remat.NONE
    assert config.model.positions is Positions.NONE
    assert parse("model.remat=FULL").model.remat is Remat.FULL


def test_what_is_not_optional_cannot_be_none():
    assert "model.depth is a int and may not be none" in error_of("model.depth=none")
    assert "optimizer is a Optimizer and may not be n" in error_of("optimizer=none")


def test_a_start_from_another_run_needs_no_more_than_its_path():
    assert parse().init == ()
    init = parse("init.path=runs/x", "init.drop=none", "init.rename=('a=>b',)").init
    assert init == (Init(path="runs/x", rename=("a=>b",)),)
    assert "init.path is empty: give the run to start fr" in error_of("init.drop=head")


def test_a_second_checkpoint_is_added_by_its_number(body, tmp_path):
    (tmp_path / "two").mkdir()
    second = Init(path="runs/y", into="teacher")
    flags = ("init[1].path=runs/y", "init[1].into=teacher")
    assert parse("init.path=runs/x", *flags).init == (Init(path="runs/x"), second)
    both = parse(*flags, file=body).init
    assert both == (Init(path="runs/x"), second)
    assert "init has 1, counted from 0" in error_of("init[2].path=z", file=body)
    assert "init has 0 elements; name one" in error_of("init.drop=none")
    for words in ("init[0]=a", "init=a"):
        assert "give what it holds: --config.init.path=a" in error_of(words)
    # In any order, and after a recipe's own was cleared.
    flags = ("init[1].path=runs/y", "init[0].path=runs/z")
    assert [i.path for i in parse(*flags).init] == ["runs/z", "runs/y"]
    assert parse("init=none", "init.path=runs/z", file=body).init == (
        Init(path="runs/z"),
    )
    assert parse("init.path=runs/z", "init=none", file=body).init == ()
    message = error_of("init[1].path=a", "init.drop=none", file=body)
    assert "--config.init.drop=none: init has 2 elements; name one" in message
    # What a recipe has, an override must name; what overrides add, they have named.
    first = parse("init[1].path=a", "init.drop=head", file=body).init[0]
    assert first == Init(path="runs/x", drop="head")
    one = 'init=(Init(path="runs/x"),),'
    two = write(tmp_path / "two", BODY.replace(one, one.replace("),)", "),) * 2")))
    message = error_of("init.drop=head", file=two)
    assert "init has 2 elements; name one" in message
    assert "--config.init[0].drop=head" in message


def test_a_part_of_a_recipes_own_init_keeps_the_rest(body):
    config = parse("init.position_resize=error", file=body)
    expected = Init(path="runs/x", position_resize=PositionResize.ERROR)
    assert config.init == (expected,)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("model.wdith=3", "model.width"),
        ("optimizer.weigth_decay=3", "optimizer.weight_decay"),
        ("num_step=3", "num_steps"),
        ("data.ops[0].chanels=1", "data.ops[0].channels"),
        ("evaluators.tset.every_steps=0", "evaluators.test.every_steps"),
        ("weight_decay=none", "optimizer.weight_decay"),
        ("init.pth=x", "init[0].path"),
    ],
)
def test_an_unknown_name_is_refused_with_what_was_meant(flag, meant):
    message = error_of(flag)
    key = flag.split("=")[0].replace("init.", "init[0].")
    assert f'No config key "{key}". Did you mean {meant}' in message
    assert f"--config.{meant}=VALUE" in message


def test_a_part_beyond_the_last_is_refused_with_their_number():
    count = len(parse().data.ops)
    message = error_of(f"data.ops[{count}].channels=1")
    assert (
        f'No config key "data.ops[{count}].channels": data.ops has {count}' in message
    )
    assert f"from 0: data.ops[0] to data.ops[{count - 1}]." in message


def test_an_unknown_name_is_found_in_the_recipe(body):
    message = error_of("optimizer.weigth_decay=0.3", file=body)
    number = BODY.splitlines().index("            weight_decay=0.1,") + 1
    assert f"optimizer.weight_decay ({body}:{number})?" in message


def test_unknown_flags_and_stray_words_are_refused():
    message = error_of(more=["--wrokdir=x"])
    assert "There is no flag --wrokdir. Did you mean --workdir?" in message
    assert 'What is "stray"? Flags go as' in error_of(more=["stray"])
    with pytest.raises(ValueError, match="--config.a needs a recipe before it"):
        command_line.parse(["train", "--config.a=3"], train.define_flags)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "num_steps=abc",
            "num_steps=abc is not an int or none. The recipe has --config",
        ),
        ("model.width=1.5", "width=1.5 is not an int. The recipe has --config.model.w"),
        (
            "model.dtype=float17",
            "dtype=float17 is not one of float32, bfloat16. The re",
        ),
        ("deterministic=maybe", "deterministic=maybe is not a bool. The recipe has"),
        ("model=3", "--config.model is a component: choose it in the recipe, and over"),
        ("data.ops=3", r"config.data.ops.0.=3 is not an Op"),
        ("freeze=3", r"config.freeze.0.=3 is not a str"),
        ("model.dropout=1", "config.model: dropout=1.0 is not a probability"),
        (
            "micro_batches=3",
            "micro_batches=3 equal parts; use --config.micro_batches=2 or 4",
        ),
        ("num_steps=0", "num_steps=0 must be above 0"),
        ("ema.start=1", "ema.start=1.0 must lie between 0 and 1"),
        ("ema.end=0.5", "ema.end=0.5 must lie between start=0.9 and 1"),
        ("log_every_steps=0", "log_every_steps=0 must be at least 1, for example --co"),
        ("profile_steps=(3,)", r"profile_steps=\(3,\) must be empty or \(first, last"),
        ("checkpoints.keep_latest=0", "keep_latest=0 must be at least 1"),
        ("num_steps=none", "num_epochs and num_steps are both none; set one"),
        ("mesh.fsdp=0", "mesh.fsdp=0 is not a number of devices"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(flag, message):
    with pytest.raises(ValueError, match=message):
        parse(flag)


@pytest.mark.parametrize(
    ("flag", "typed"),
    [
        ("freeze=a,b", """--config.freeze="('a', 'b')" or, for one, """),
        ("freeze=stem/.*,head/.*", """--config.freeze="('stem/.*', 'head/.*')" or"""),
        ("freeze=stem/.* head/.*", """--config.freeze="('stem/.*', 'head/.*')" or"""),
        ("freeze=(a,b", """--config.freeze="('a', 'b')" or"""),
        ("freeze=[a", """--config.freeze="('a',)" or"""),
        ("freeze='a", """--config.freeze="('a',)" or"""),
        ("freeze=head/.{1,2}", """or, for one, --config.freeze="('head/.{1,2}',)\""""),
        ("freeze={'a': 1}", "--config.freeze="),
        ("freeze=it's", "--config.freeze="),
        ("profile_steps=3 4", "--config.profile_steps=3,4"),
        ("profile_steps=(3,4", "--config.profile_steps=3,4"),
        ("profile_steps=a,b", "--config.profile_steps=1,2"),
    ],
)
def test_a_tuple_that_is_unclear_is_answered_with_what_to_type(flag, typed):
    message = error_of(flag)
    assert message.startswith(f"--config.{flag} is not clearly") and typed in message
    # What the message says, a shell takes, and the parser after it.
    for words in re.findall(r"(?:type|for one,) (.*?)(?= or, for one|$)", message):
        (word,) = shlex.split(words)
        found = parse(word.removeprefix("--config."))
        name = flag.partition("=")[0]
        if name == "freeze":
            assert isinstance(found.freeze, tuple) and found.freeze
        else:
            assert all(isinstance(step, int) for step in found.profile_steps)


def test_a_pattern_without_commas_is_one_string():
    for text in ("stem/.*", "(head|stem)/.*", "a;b", "block_[0-9]"):
        assert parse(f"freeze={text}").freeze == (text,)
    assert parse("freeze=('a','b')").freeze == ("a", "b")
    assert parse("freeze=['a','b']").freeze == ("a", "b")
    assert parse(more=["--config.freeze=a", "--config.freeze=b"]).freeze == ("a", "b")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "data.ops.0.channels=3",
            r'No config key "data.ops.0.channels". Did you mean ',
        ),
        (
            "data.ops[0.channels=3",
            r'No config key "data.ops[0.channels". Did you mean ',
        ),
        (
            "data..batch_size=3",
            'No config key "data..batch_size". Did you mean data.ba',
        ),
        ("=3", 'No config key "". Overrides go as'),
        ("optimizer.beta1=0,5", "optimizer.beta1=0,5 is not a float. The recipe has"),
        ("seed=(1", "seed=(1 is not an int. The recipe has"),
        ("platform=cpu,gpu", "platform=cpu,gpu is not one of cpu, gpu, tpu"),
        ("deterministic='yes", "deterministic='yes is not a bool"),
        ("data.ops[0].orientation=turn", "=turn is not one of ignore, apply"),
        ("data.ops[0].orientation=apply", "EXIF's orientation differently"),
    ],
)
def test_no_flag_ends_in_invalid_syntax(flag, message):
    found = error_of(flag)
    assert message in found and "invalid syntax" not in found


def test_a_mistake_in_the_recipe_names_its_line(tmp_path):
    path = write(tmp_path, BODY.replace("peak=0.1", "peak=-0.1"))
    number = BODY.splitlines().index("        optimizer=AdamW(") + 2
    assert error_of(file=path).startswith(f"{path}:{number}: schedule.peak=-0.1 is not")
    path = write(tmp_path, BODY.replace("Digits()", "Digit()"))
    number = BODY.splitlines().index("            source=Digits(),") + 1
    assert f"{path}:{number}: name 'Digit' is not defined" in error_of(file=path)


def test_a_recipe_that_is_not_there_is_not_guessed(tmp_path):
    (tmp_path / "quickstart.py").write_text("")
    with pytest.raises(FileNotFoundError) as caught:
        parse(file=tmp_path / "quikstart.py")
    message = str(caught.value)
    assert f'Did you mean "{tmp_path}/quickstart.py"?' in message
    with pytest.raises(FileNotFoundError, match="Recipes there: "):
        parse(file=tmp_path / "x" / "y.py")


OWN = """
import dataclasses
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.types import Objective
{base}

@dataclasses.dataclass(kw_only=True)
class Mine(Objective):
    scale: float = 1.0

    def __call__(self, forward, batch, rng):
        losses, metrics = SoftmaxClassification()(forward, batch, rng)
        return losses * self.scale, metrics
"""


def test_a_recipe_defines_no_classes(tmp_path):
    text = OWN.format(base="") + BODY.replace(
        "objective=SoftmaxClassification()", "objective=Mine()"
    )
    message = error_of(file=write(tmp_path, text))
    assert "config.objective is a Mine, defined in the recipe itself" in message
    assert "--allow_module=<module>" in message
    local = BODY.replace(
        'def get_config(arg=""):',
        'def get_config(arg=""):\n'
        "    class Local(SoftmaxClassification):\n        pass\n",
    )
    local = local.replace("objective=SoftmaxClassification()", "objective=Local()")
    message = error_of(file=write(tmp_path, local))
    assert "Local, defined in the recipe itself" in message


def test_own_components_live_in_a_module_that_is_named(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(OWN.format(base=""))
    monkeypatch.syspath_prepend(str(tmp_path))
    text = BODY.replace("objective=SoftmaxClassification()", "objective=Mine()")
    path = write(tmp_path, "from my_parts import Mine\n" + text)
    message = error_of(file=path)
    assert 'config.objective needs the class "my_parts.Mine" from outside' in message
    assert "--allow_module=my_parts" in message
    config = parse("objective.scale=2", file=path, more=["--allow_module=my_parts"])
    assert type(config.objective).__name__ == "Mine" and config.objective.scale == 2.0
    # A checkpoint of a stranger chooses nothing.
    with pytest.raises(ValueError, match="from outside big_vision_lite"):
        serialize.from_json(serialize.to_json(config))
    assert serialize.from_json(serialize.to_json(config), ["my_parts"]) == config


@pytest.mark.parametrize(
    "path", ["os.system", "subprocess.Popen", "big_vision_lite_evil.X", "builtins.eval"]
)
def test_json_from_a_stranger_imports_nothing(path):
    document = json.loads(serialize.to_json(recipe()))
    document["config"]["objective"] = {"class": path}
    before = set(sys.modules)
    with pytest.raises(ValueError, match="from outside big_vision_lite"):
        serialize.from_json(json.dumps(document))
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("big_vision_lite.nowhere.X", "there is no class"),
        ("big_vision_lite.trees.flatten", "is no component"),
        ("big_vision_lite.recipes.serialize.json", "is no component"),
        ("big_vision_lite.runtime.sharding.Mesh", "is not an Objective"),
    ],
)
def test_json_with_a_class_that_does_not_fit_is_refused(path, message):
    document = json.loads(serialize.to_json(recipe()))
    document["config"]["objective"] = {"class": path}
    with pytest.raises(ValueError, match=message):
        serialize.from_json(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": "0", "config": 3}', "3"])
def test_json_that_is_no_configuration_is_refused(text):
    with pytest.raises(ValueError):
        serialize.from_json(text)


class Two(Classifier, kw_only=True):
    one: Classifier
    two: Classifier


def test_a_module_in_two_places_of_a_model_is_refused():
    # One object in both would tie their parameters without a word.
    head = Classifier(num_classes=3)
    with pytest.raises(ValueError, match=r"config.two and config.one are the same mod"):
        serialize.to_json(Two(num_classes=1, one=head, two=head))
    text = serialize.to_json(Two(num_classes=1, one=head, two=head.clone()))
    assert '"two"' in text


def test_what_two_recipes_parts_share_is_shared_no_more():
    decode = ops.Decode(channels=1)
    config = recipe(
        preprocess=(decode, decode),
        data=Stream(source=DIGITS(), ops=(decode,), batch_size=8),
    )
    rebuilt = serialize.rebuild(config)
    assert rebuilt == config
    assert len({id(op) for op in (*rebuilt.preprocess, *rebuilt.data.ops)}) == 3


def test_a_value_json_cannot_hold_is_refused_by_its_place():
    for value in ([1], {1}, 1j, b"x", jax.numpy.ones(2)):
        config = recipe()
        config.checkpoints.every_steps = value if not isinstance(value, list) else {1}
        with pytest.raises(ValueError, match="config.checkpoints.every_steps is a "):
            serialize.to_json(config)


def test_steps_follow_epochs_and_steps_win():
    assert recipe(num_steps=None, num_epochs=1.0).resolve_steps(100) == 12
    assert recipe(num_steps=None, num_epochs=0.001).resolve_steps(100) == 1
    assert recipe(num_steps=None, num_epochs=90.0).resolve_steps(1281167) == 14413129
    assert recipe(num_steps=7, num_epochs=90.0).resolve_steps(100) == 7


def run(*argv, **environment):
    return subprocess.run(
        [sys.executable, "-m", "big_vision_lite.train", *argv],
        capture_output=True,
        text=True,
        env=dict(os.environ, JAX_PLATFORMS="cpu", **environment),
        check=False,
    )


def test_a_typo_ends_the_program_at_once_with_one_message(tmp_path, body):
    finished = run(
        f"--config={body}",
        f"--workdir={tmp_path / 'run'}",
        "--config.optimizer.weigth_decay=0.3",
        TMPDIR=str(tmp_path),
        PYTHONPROFILEIMPORTTIME="1",
    )
    assert finished.returncode == 1
    assert "Did you mean optimizer.weight_decay" in finished.stderr
    assert "Traceback" not in finished.stderr + finished.stdout
    (trace,) = tmp_path.glob("*_error.txt")
    assert "Traceback" in trace.read_text()
    assert not (tmp_path / "run").exists()
    # At once: before the libraries that take seconds to import.
    imported = {
        line.split("|")[-1].strip().split(".")[0]
        for line in finished.stderr.splitlines()
        if line.startswith("import time:")
    }
    slow = {"torch", "tensorflow", "sklearn", "pandas", "matplotlib", "pyarrow"}
    assert "jax" in imported and not imported & slow, imported & slow


def test_a_typo_in_the_recipe_names_the_closest_field(tmp_path):
    # In a process of its own: the runtime type checks of tests word it otherwise.
    path = write(tmp_path, BODY.replace("weight_decay=0.1", "weigth_decay=0.1"))
    finished = run(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    number = BODY.splitlines().index("        optimizer=AdamW(") + 1
    assert finished.returncode == 1
    expected = f"error: {path}:{number}: AdamW.__init__() got an unexpected keyword"
    assert expected in finished.stderr, finished.stderr
    assert 'Did you mean "weight_decay"? Fields: schedule, beta1' in finished.stderr


def test_print_config_prints_what_would_run(body):
    finished = run(f"--config={body}", "--config.num_steps=77", "--print_config")
    assert finished.returncode == 0, finished.stderr
    config = serialize.from_json(finished.stdout)
    assert config == parse("num_steps=77", file=body)
    assert json.loads(finished.stdout)["version"] == big_vision_lite.__version__
