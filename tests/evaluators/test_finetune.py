"""Fine-tuning by BiT-HyperRule: as an evaluator, and as recipes that do only that."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes_run
from etils import epath
from tiny_runs import tiny_vit, written_weights

from big_vision_lite import evaluate, train, trees
from big_vision_lite.config import Init
from big_vision_lite.conversion.formats import Library
from big_vision_lite.data import pipeline
from big_vision_lite.data.ops import Decode, Resize
from big_vision_lite.data.sources import Digits, ImageFolder
from big_vision_lite.data.sources.folder import open_folder
from big_vision_lite.evaluators import finetune
from big_vision_lite.evaluators.finetune import FineTune
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.recipes import command_line, serialize
from big_vision_lite.recipes.arguments import parse_arg
from big_vision_lite.runs import evaluations, hyperrule, init, load, step_folder
from big_vision_lite.runs.hyperrule import HyperRule, Repeated
from big_vision_lite.runs.records import read_history
from big_vision_lite.runtime.processes import Stopped, StopSignal
from big_vision_lite.training import program
from big_vision_lite.training import state as state_lib

ROOT = pathlib.Path(__file__).parents[2]
CLOCK = ("images_per_second", "data_wait", "eta_seconds", "mfu")


@pytest.fixture(scope="module")
def images():
    return shapes_run.shared()[0]


@pytest.fixture(scope="module")
def pretrained():
    return shapes_run.shared()[1]


@pytest.fixture(scope="module")
def two_shapes(tmp_path_factory):
    """A set of other classes, of which one batch holds more than there are."""
    root = tmp_path_factory.mktemp("new")
    counts = {"train": 6, "test": 9}
    return shapes_run.make_folder(root, counts, classes=("disc", "cross"), seed=1)


def small_rule(**changes) -> HyperRule:
    return HyperRule(**{"num_steps": 5, "size_px": 16, "batch_size": 16} | changes)


def evaluator(folder, **changes) -> FineTune:
    fields = {
        "train": ImageFolder(path=str(folder), split="train"),
        "test": ImageFolder(path=str(folder), split="test"),
        "rule": small_rule(),
        "every_steps": 5,
        "eval_batch_size": 16,
    }
    return FineTune(**fields | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory, images, two_shapes):
    """The shared run once more, fine-tuned after steps 5 and 10."""
    config = shapes_run.recipe(images)
    config.evaluators = {"transfer": evaluator(two_shapes)}
    return shapes_run.run(tmp_path_factory.mktemp("run") / "tuned", config)


def records(folder) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for record in read_history(epath.Path(folder)):
        kept = {n: x for n, x in record.items() if n not in CLOCK}
        found[record["step"]] = found.get(record["step"], {}) | kept
    return found


class Sized:
    """As many gray images as it is told, all of one size."""

    class_names = tuple("abc")

    def __init__(self, count: int, side: int = 8):
        self.fingerprint = f"{count} of {side}"
        self._count, self._side = count, side

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        image = np.zeros((self._side, self._side, 1), np.uint8)
        return {"image": image, "label": index % 3}

    def name(self, index):
        return str(index)


def configured(rule: HyperRule, source) -> train.TrainConfig:
    model = shapes_run.Net(dropout=0.1)
    return rule.config(model, source, {}, (Decode(channels=1),), init=())


@pytest.mark.parametrize(
    "examples, steps, alpha",
    [
        (1, (100, 200, 300, 400, 500), 0.0),
        (19_999, (100, 200, 300, 400, 500), 0.0),
        (20_000, (500, 3000, 6000, 9000, 10_000), 0.1),
        (499_999, (500, 3000, 6000, 9000, 10_000), 0.1),
        (500_000, (500, 6000, 12_000, 18_000, 20_000), 0.1),
    ],
)
def test_the_rule_is_the_published_one_at_every_number_of_images(
    examples, steps, alpha
):
    config = configured(HyperRule(), Sized(examples))
    warmup, *drops, last = steps
    assert config.num_steps == last
    at = np.arange(last)
    schedule = config.optimizer.schedule.build(last)
    rates = np.asarray(jax.vmap(schedule)(jnp.asarray(at)))
    by_table = np.where(
        at < warmup,
        0.003 * at / warmup,
        0.003 / 10.0 ** sum((at > drop).astype(int) for drop in drops),
    )
    np.testing.assert_allclose(rates, by_table, rtol=1e-5)
    assert [op.alpha for op in config.data.device_ops] == [alpha] * bool(alpha)
    for op in config.data.device_ops:
        assert op.partner == "reverse" and not op.fold_lambda and op.num_classes == 3
    assert config.data.batch_size == 512
    assert config.optimizer.momentum == 0.9 and not config.optimizer.nesterov
    assert config.optimizer.weight_decay == 0 and config.optimizer.clip_norm is None
    assert config.objective.label_smoothing == 0
    assert config.model.dropout == 0 and config.model.head == Classifier(num_classes=3)


def test_one_update_is_momentum_sgd_at_the_table_s_rate():
    """Two ways: the built optimiser, and the formula by hand, over all five steps."""
    config = configured(small_rule(), Sized(30))
    schedule = config.optimizer.schedule.build(5)
    # 500 steps of the rule as 5: warm-up to 1, drops after 2, 3 and 4.
    rates = [0.0, 0.003, 0.003, 0.0003, 0.00003]
    np.testing.assert_allclose([schedule(i) for i in range(5)], rates, rtol=1e-5)
    transformation = config.optimizer.build(5)
    params = {"kernel": jnp.asarray([1.0, -2.0])}
    state, velocity, by_hand = transformation.init(params), 0, params["kernel"]
    for step, rate in enumerate(rates):
        gradient = {"kernel": jnp.asarray([100.0, step + 1.0])}
        updates, state = transformation.update(gradient, state, params)
        params = {"kernel": params["kernel"] + updates["kernel"]}
        velocity = 0.9 * velocity + gradient["kernel"]
        by_hand = by_hand - rate * velocity
    np.testing.assert_allclose(params["kernel"], by_hand, rtol=1e-5)


@pytest.mark.parametrize(
    "side, size, resize, crop",
    [(95, None, 160, 128), (96, None, 512, 480), (8, 8, 10, 8), (50, 384, 448, 384)],
)
def test_sizes_follow_the_area_of_the_images(side, size, resize, crop):
    config = configured(HyperRule(size_px=size), Sized(40, side))
    _, resized, cropped, _ = config.data.ops
    assert (resized.size_px, cropped.size_px) == (resize, crop)
    assert config.preprocess == (Decode(channels=1), Resize(size_px=crop))
    image = np.zeros((side, side + 9, 3), np.uint8)
    for road in (config.data.ops, config.preprocess):
        example = {"image": image, "label": 0}
        for op in road:
            example = op(example, np.random.default_rng(0))
        assert example["image"].shape == (crop, crop, 1)


def test_the_median_decides_and_unreadable_images_do_not(tmp_path):
    folder = shapes_run.make_folder(tmp_path, {"train": 5})
    (folder / "train" / "disc" / "broken.jpg").write_bytes(b"nothing")
    source = ImageFolder(path=str(folder), split="train")
    assert hyperrule.crop_by_area(source) == 128
    large = np.zeros((200, 300, 3), np.uint8)
    for name in ("cross", "disc", "square"):
        for file in (folder / "train" / name).glob("00[0-2]*"):
            cv2.imwrite(str(file.with_suffix(".png")), large)
            if file.suffix != ".png":
                file.unlink()
    source = ImageFolder(path=str(folder), split="train")
    assert hyperrule.crop_by_area(source) == 480
    assert hyperrule.input_shape(source, (Decode(), Resize(size_px=9))) == (9, 9, 3)


def test_a_set_below_one_batch_is_repeated_evenly():
    source = Digits(split="test")
    few = Repeated(source=source, times=2)
    assert len(few) == 718 and few.class_names == source.class_names
    seen = np.bincount([few[i]["label"] for i in range(718)])
    once = np.bincount([source[i]["label"] for i in range(359)])
    np.testing.assert_array_equal(seen, 2 * once)
    assert few.name(359) == source.name(0)
    assert few.fingerprint != Repeated(source=source, times=3).fingerprint
    config = configured(HyperRule(), source)
    assert config.data.source == few and config.data.batch_size == 512
    assert serialize.rebuild(config, ["shapes_run"]) == config
    assert configured(HyperRule(batch_size=359), source).data.source == source


def test_everything_but_the_head_starts_from_the_run_and_the_head_from_zero(
    pretrained, images, two_shapes
):
    loaded, _ = load.load_variables(step_folder.find(str(pretrained)))
    assert np.any(loaded["head/kernel"])
    for folder, classes in ((two_shapes, 2), (images, 3)):  # the old head fits three
        config = small_rule().config(
            shapes_run.small_model(),
            ImageFolder(path=str(folder), split="train"),
            {},
            (Decode(),),
            init=hyperrule.start(str(pretrained), shapes_run.small_model()),
        )
        mesh = load.sharding.make_mesh(config.mesh)
        with (
            jax.set_mesh(mesh),
            pipeline.open_batches(config.data, 0, mesh) as batches,
        ):
            built = program.build(config, mesh, batches.spec())
            origins = []
            begin = functools.partial(
                init.initial_state,
                config,
                built,
                log=lambda _: None,
                note_origin=origins.append,
            )
            from_file = begin(first_params=None)
            from_memory = begin(first_params=loaded)
        assert [origin["path"] for origin in origins] == [str(pretrained)]
        for state in (from_file, from_memory):
            params = trees.flatten(state_lib.merge(state.params, state.frozen))
            assert params["head/kernel"].shape == (16, classes)
            for name, leaf in params.items():
                expected = 0 * leaf if name.startswith("head/") else loaded[name]
                np.testing.assert_array_equal(leaf, expected, err_msg=name)


def test_fine_tuning_is_recorded_beside_its_control_and_leaves_no_checkpoint(run):
    found = records(run)
    for step in (5, 10):
        assert 0 <= found[step]["transfer/accuracy"] <= 1
    control = [found[step]["transfer/control_untrained"] for step in (5, 10)]
    assert control[0] == control[1]
    known = json.loads((run / "transfer_controls.json").read_text())
    assert known["scores"] == {"control_untrained": control[0]}
    inner = sorted(p.parent for p in run.rglob("seed_0/metrics.jsonl"))
    assert len(inner) == 3  # after step 5, after step 10, the control
    for folder in inner:
        assert not (folder / "checkpoints").exists()
        assert records(folder)[5]["test/examples"] == 18
    rates = [records(f)[5]["train/learning_rate"] for f in inner]
    np.testing.assert_allclose(rates, 0.00003, rtol=1e-5)


def test_the_outer_run_goes_on_as_if_nobody_had_fine_tuned(run, pretrained):
    """Its parameters were neither given away nor changed: the same losses and bits."""
    ours, theirs = records(run), records(pretrained)
    for step in (5, 10):
        assert ours[step]["train/loss"] == theirs[step]["train/loss"]
    sums = [
        {n: leaf["checksum"] for n, leaf in manifest["leaves"].items()}
        for manifest in (
            step_folder.verified_manifest(epath.Path(folder) / "checkpoints" / "10")
            for folder in (run, pretrained)
        )
    ]
    assert sums[0] == sums[1]


def test_fine_tuning_alone_gives_the_scores_of_training(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    for kept in copy.glob("finetune/transfer/*"):
        shutil.rmtree(kept)
    (copy / "transfer_controls.json").unlink()
    flags = (f"--workdir={copy}", "--allow_module=shapes_run")
    assert command_line.run(evaluate.main, ["evaluate", *flags]) == 0
    alone = json.loads((copy / "evaluation_10.json").read_text())["scores"]
    inside = records(run)[10]
    assert alone == {n: inside[n] for n in alone}
    assert set(alone) == {"transfer/accuracy", "transfer/control_untrained"}


@pytest.fixture
def ready(pretrained, two_shapes, tmp_path):
    """A context, the training it would run, and the parameters it would start from."""
    loaded = shapes_run.load_run(pretrained, log=lambda _: None)
    context = evaluations.make_context(
        "transfer",
        loaded.config,
        mesh=loaded.mesh,
        workdir=epath.Path(tmp_path),
        class_names=loaded.class_names,
        num_steps=10,
        abstract_state=loaded.state,
        untrained_state=loaded.untrained,
        log=lambda _: None,
    )
    config = evaluator(two_shapes).training(context, 0)
    with jax.set_mesh(loaded.mesh):
        yield context, config, state_lib.variables(loaded.state, averaged=True)


def test_a_stop_in_the_inner_training_is_resumed_where_it_was(ready, run, tmp_path):
    context, config, params = ready
    folder = epath.Path(tmp_path) / "pieces"
    with StopSignal() as stop:
        stop.received = "SIGTERM"
        with pytest.raises(Stopped, match="saved step 1"):
            finetune.fine_tune(context, config, folder, params)
    assert step_folder.complete_steps(folder / "seed_0" / "checkpoints") == [1]
    accuracy = finetune.fine_tune(context, config, folder, params)
    assert accuracy == records(run)[10]["transfer/accuracy"]
    digest = finetune.digest(params)
    straight = records(run / "finetune" / "transfer" / f"10_{digest}" / "seed_0")
    assert records(folder / "seed_0")[5] == straight[5]
    # Once finished, it is not run again.
    history = (folder / "seed_0" / "metrics.jsonl").read_bytes()
    assert finetune.fine_tune(context, config, folder, params) == accuracy
    assert (folder / "seed_0" / "metrics.jsonl").read_bytes() == history
    # Another rule is another training, which starts anew.
    config.log_every_steps = 1
    config.optimizer.schedule.peak = 0.002
    finetune.fine_tune(context, config, folder, params)
    assert records(folder / "seed_0")[2]["train/learning_rate"] == pytest.approx(0.002)


SCRIPT = """
import pathlib, sys
import shapes_run
from big_vision_lite.evaluators.finetune import FineTune
from big_vision_lite.data.sources import ImageFolder
from big_vision_lite.runs.hyperrule import HyperRule

images, new, workdir = map(pathlib.Path, sys.argv[1:])
config = shapes_run.recipe(images)
config.evaluators = {
    "transfer": FineTune(
        train=ImageFolder(path=str(new), split="train"),
        test=ImageFolder(path=str(new), split="test"),
        rule=HyperRule(num_steps=400, size_px=16, batch_size=16),
        every_steps=10,
        eval_batch_size=16,
    )
}
shapes_run.run(workdir, config)
"""


@pytest.mark.slow
@pytest.mark.processes
def test_a_kill_in_the_inner_training_changes_no_score(images, two_shapes, tmp_path):
    def start(name):
        argv = [sys.executable, "-W", "ignore", "-c", SCRIPT, images, two_shapes]
        env = dict(os.environ, PYTHONPATH=str(pathlib.Path(__file__).parents[1]))
        return subprocess.Popen([*map(str, argv), str(tmp_path / name)], env=env)

    straight, pieces = start("straight"), start("pieces")
    for pattern in ("10_*/seed_0/checkpoints/*", "untrained/seed_0/checkpoints/*"):
        wanted = f"finetune/transfer/{pattern}/manifest.json"
        while not list((tmp_path / "pieces").glob(wanted)):
            assert pieces.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        pieces.kill()
        pieces.wait()
        pieces = start("pieces")
    assert straight.wait() == pieces.wait() == 0
    assert records(tmp_path / "pieces") == records(tmp_path / "straight")
    inner = [
        {str(f.parent.relative_to(root)): records(f.parent) for f in found}
        for root in (tmp_path / "pieces", tmp_path / "straight")
        if (found := list(root.rglob("seed_0/metrics.jsonl")))
    ]
    assert inner[0] == inner[1] and len(inner[0]) == 2


def test_what_another_state_left_at_this_step_is_removed(ready, tmp_path):
    context, _, params = ready
    others = {name: 2 * leaf for name, leaf in params.items()}
    assert finetune.digest(params) == finetune.digest(dict(params))
    assert finetune.digest(params) != finetune.digest(others)
    folder = epath.Path(tmp_path) / f"10_{finetune.digest(params)}"
    for name in (folder.name, "10_abcdef", "100_abcdef"):
        (folder.parent / name).mkdir()
    finetune.forget_others(context, folder)
    there = {p.name for p in folder.parent.iterdir()}
    assert there == {folder.name, "100_abcdef"}


def test_averages_are_preferred_and_seeds_give_mean_and_spread(pretrained):
    state = shapes_run.load_run(pretrained, log=lambda _: None).state
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    found = state_lib.variables(state.replace(ema=zeros), averaged=True)
    assert not any(np.any(leaf) for leaf in found.values())
    scores = finetune.summarise("accuracy", [0.5, 0.7, 0.9])
    assert scores == {"accuracy": pytest.approx(0.7), "accuracy_sd": pytest.approx(0.2)}
    assert finetune.summarise("accuracy", [0.5]) == {"accuracy": 0.5}


def test_wrong_settings_say_what_is_allowed(ready, two_shapes):
    context, _, _ = ready
    for change, words in (
        ({"num_steps": 4}, "5 or more"),
        ({"batch_size": 0}, "at least 1"),
        ({"ops": (Decode(),)}, "both or neither"),
        ({"ops": (Decode(),), "preprocess": (Decode(),), "flip": False}, "do nothing"),
    ):
        with pytest.raises(ValueError, match=words):
            HyperRule(**change)
    with pytest.raises(ValueError, match="must be there and differ"):
        evaluator(two_shapes, seeds=(1, 1))
    with pytest.raises(ValueError, match="no field head"):
        hyperrule.with_head(Classifier(num_classes=3), 2)
    swapped = evaluator(two_shapes)
    swapped.train, swapped.test = Digits(), swapped.test
    with pytest.raises(ValueError, match="unknown to transfer train: cross"):
        swapped.prepare(context)
    for change, words in (
        ({"rule": small_rule(batch_size=12)}, "transfer.rule.batch_size=12 does not"),
        ({"eval_batch_size": 9}, r"use --config\.evaluators\.transfer\.eval_ba"),
        ({"test": Sized(0)}, "transfer: its test set has no images; give a split"),
        ({"train": Sized(0)}, "transfer: its training set has no images"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluator(two_shapes, **change).prepare(context)


def test_preparing_looks_at_a_sample_of_the_images_once(ready, two_shapes, monkeypatch):
    context, _, _ = ready
    reads = []
    read = ImageFolder.__getitem__
    monkeypatch.setattr(
        ImageFolder,
        "__getitem__",
        lambda source, index: reads.append(index) or read(source, index),
    )
    evaluator(two_shapes, seeds=(0, 1, 2), rule=small_rule(size_px=None)).prepare(
        context
    )
    # Twelve images: one for the channels, all for the median of their areas.
    assert len(reads) == 1 + 12


def parse(name: str, arg: str, *overrides: str):
    arg += ",allow_module=shapes_run" if "init=" in arg else ""
    command = ["train", f"--config={ROOT}/configs/{name}.py:{arg}", *overrides]
    command.append("--allow_module=shapes_run")
    return command_line.parse(command, train.define_flags).config


def test_the_finetune_recipe_is_the_evaluator_s_training(
    pretrained, two_shapes, tmp_path, ready, run
):
    """The recipe from the step folder gives the score of the evaluator, bit for bit."""
    config = parse(
        "finetune",
        f"init={pretrained},data={two_shapes},size=keep,batch=16,steps=5",
        "--config.evaluators.test.batch_size=16",
    )
    assert config.init == (Init(path=str(pretrained), drop="(head)/.*"),)
    shapes_run.run(tmp_path / "tuned", config)
    final = records(tmp_path / "tuned")[5]
    assert final["test/accuracy"] == records(run)[10]["transfer/accuracy"]
    digest = finetune.digest(ready[2])
    inner = records(run / "finetune" / "transfer" / f"10_{digest}" / "seed_0")[5]
    assert final["train/loss"] == inner["train/loss"]
    assert final["test/loss"] == inner["test/loss"]


@pytest.mark.parametrize(
    "arg, words",
    [
        ("data=x", "needs init"),
        ("init={run}", "give one of them"),
        ("init={run},data={new},tfds=x", "give one of them"),
        ("init={run},data={new},size=big", "rule, keep, or a number"),
        ("init={run},data={new},sise=3", 'Did you mean "size"'),
        ("init={run}_,data={new}", "No complete checkpoint"),
        ("init={run},data={new}x", "there is no folder"),
        ("init={run},tfds=no_such_set,data_dir={new}", "not prepared"),
    ],
)
def test_wrong_arguments_of_a_recipe_say_what_is_allowed(
    pretrained, two_shapes, arg, words
):
    with pytest.raises(ValueError, match=words):
        parse("finetune", arg.format(run=pretrained, new=two_shapes))


def test_the_folder_recipe_fits_the_folder(images, pretrained, tmp_path):
    config = parse("folder", f"dir={images}")
    assert config.data.source.classes == shapes_run.CLASSES
    assert config.data.batch_size == 64 and config.resolve_steps(72) == 112
    assert config.model.head.num_classes == 3 and set(config.evaluators) == {"val"}
    tuned = parse("folder", f"dir={images},init={pretrained},flip=false")
    assert tuned.data.ops == (
        Decode(),
        Resize(size_px=20),
        hyperrule.RandomCrop(size_px=16),
    )
    assert tuned.optimizer.schedule.peak == 0.001 and tuned.num_steps == 500
    # Without split folders, a tenth of each class is held out.
    flat = open_folder(str(images / "train"))
    assert list(flat) == ["train", "val"] and len(flat["val"]) == 6
    assert flat["val"].classes == shapes_run.CLASSES
    with pytest.raises(ValueError, match="use steps"):
        parse("folder", f"dir={images},init={pretrained},epochs=3")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_recipes_fine_tune_weights_of_other_libraries(kind, images, tmp_path):
    """Both heads of a distilled model are new, all else is as in the file."""
    model = tiny_vit(
        pooling=Pooling.CLASS_TOKEN,
        positions=Positions.LEARNED,
        distillation_token=kind == "safetensors",
    )
    folder = tmp_path / "theirs"
    variables = written_weights(model, Library(kind), folder)
    for name, arg in (("finetune", "size=keep,data"), ("folder", "dir")):
        config = parse(name, f"{arg}={images},init={folder},steps=5,batch=8")
        assert config.model.head.num_classes == 3
        assert config.preprocess == (Decode(channels=3), Resize(size_px=32))
    still = dataclasses.replace(config.optimizer.schedule, peak=1e-30)
    optimizer = dataclasses.replace(config.optimizer, schedule=still)
    shapes_run.run(tmp_path / "run", dataclasses.replace(config, optimizer=optimizer))
    tuned, _ = load.load_variables(step_folder.find(str(tmp_path / "run")))
    for name, leaf in tuned.items():
        is_new = name.startswith(("head/", "distillation_head/"))
        expected = 0 * leaf if is_new else variables[name]
        np.testing.assert_allclose(leaf, expected, atol=1e-25, err_msg=name)


@pytest.mark.slow
def test_the_folder_recipe_learns_from_scratch(images, tmp_path):
    config = parse("folder", f"dir={images},size=16,epochs=60,flip=false")
    shapes_run.run(tmp_path / "run", config)
    assert (
        max(r.get("val/accuracy", 0) for r in records(tmp_path / "run").values()) > 0.9
    )


def test_arguments_are_typed_by_their_defaults():
    found = parse_arg("a=3,path=x,y/z,on=true", a=1, path=str, on=False, rest=0.5)
    assert vars(found) == {"a": 3, "path": "x,y/z", "on": True, "rest": 0.5}
    assert vars(parse_arg("", a=1)) == {"a": 1}
    for arg, words in (
        ("a=x,path=y", 'a="x".*of type int'),
        ("path=y,on=maybe", "true or false"),
        ("a=1,a=2,path=y", "twice"),
        ("a", "not of the form name=value"),
        ("", "needs path"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_arg(arg, a=1, path=str, on=False)
    with pytest.raises(ValueError, match="takes no arguments"):
        parse_arg("x=1")
