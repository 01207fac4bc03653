"""Plans need no data and no accelerator, and say what a training would compile."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
import shapes_run
from tables import write_table

from big_vision_lite import plan
from big_vision_lite.console import bar_chart
from big_vision_lite.data import pipeline, sources, unopened
from big_vision_lite.recipes import command_line
from big_vision_lite.runtime import plugins, sharding, targets
from big_vision_lite.training import compile_process, estimate, fitting, program

pytestmark = pytest.mark.compilers

ROOT = pathlib.Path(__file__).parents[1]
needs_compilers = pytest.mark.skipif(
    not plugins.compilers_installed(), reason="needs pip install -e '.[plan]'"
)
SMALL = (
    "--config.model.depth=1",
    "--config.model.width=24",
    "--config.model.num_heads=2",
    "--config.model.mlp_dim=24",
)


def parse(recipe: str, *flags: str):
    words = ["plan", f"--config={ROOT}/{recipe}", *flags]
    return command_line.parse(words, plan.define_flags).config


def without_metadata(text: str) -> str:
    """Leaves out where in our sources an operation comes from."""
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    return re.sub(r"stack_frame_id=\d+", "", text.split("\n\nFileNames")[0])


@pytest.mark.parametrize(
    "recipe", ["digits_tiny", pytest.param("digits_vit", marks=pytest.mark.slow)]
)
def test_shapes_alone_give_the_program_that_real_data_give(recipe):
    config = parse(f"tests/recipes/{recipe}.py")
    mesh = sharding.make_mesh(config.mesh, targets.parse("cpu:8").describe())
    with jax.set_mesh(mesh):
        planned = estimate.outline(config, mesh)
        with pipeline.open_batches(config.data, config.seed, mesh) as batches:
            trained = program.build(config, mesh, batches.spec())
        assert planned.spec == trained.spec
        first, second = (
            built.train_step.lower(built.abstract, dict(built.spec)).compile()
            for built in (planned, trained)
        )
    assert without_metadata(first.as_text()) == without_metadata(second.as_text())
    sizes = [str(step.memory_analysis()) for step in (first, second)]
    assert sizes[0] == sizes[1]


def test_no_source_is_opened(monkeypatch):
    def opened(*unused):
        raise AssertionError("a plan opened the data")

    for kind in (sources.Digits, sources.Tfds):
        for method in ("__len__", "__getitem__", "name"):
            monkeypatch.setattr(kind, method, opened)
        for name in ("class_names", "fingerprint"):
            monkeypatch.setattr(kind, name, property(opened))
    config = parse("tests/recipes/digits_vit.py")
    found = estimate.on_target(config, targets.parse("cpu:2"))
    assert found.parameters > 0 and found.flops
    small = (*SMALL, "--config.data.batch_size=8")
    config = parse("configs/vit_s16_i1k.py:size=32", *small)
    assert unopened.count(config.data.source) == 1_268_355
    assert estimate.on_target(config, targets.parse("cpu:1")).batch == {
        "image": "(8, 32, 32, 3) uint8",
        "label": "(8,) int32",
    }


def test_sizes_are_said_in_the_unit_that_fits():
    said = plan._size
    assert said(None) == "" and said(0) == "0 MB" and said(300) == "0.0 MB"
    assert said(12_340_000) == "12.3 MB" and said(12_340_000_000) == "12.34 GB"


def test_data_that_are_not_there_are_not_missed(capsys):
    recipe = f"{ROOT}/configs/vit_s16_i1k.py:size=32,data_dir=/nowhere"
    words = ["plan", f"--config={recipe}"]
    words += [*SMALL, "--on=cpu:2", "--batch=4", "--json"]
    assert command_line.run(plan.main, words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["steps"] == round(90 * 1_268_355 / 4)
    (found,) = document["targets"]
    assert found["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert found["memory_needed"] >= sum(found["memory"].values()) * 0.9
    assert found["step_seconds"] is None  # nobody knows the rates of a CPU
    assert found["checkpoint_bytes"] > 12 * found["parameters"] * 0.8


def test_a_set_that_no_table_knows_is_asked_for():
    config = parse("configs/glyphs.py:dataset=glyphs32_mine,model=vit", *SMALL)
    assert unopened.count(config.data.source) is None
    config = dataclasses.replace(config, num_steps=None, num_epochs=2.0)
    made = planned_for_a_cpu(config, examples=None)
    assert made.num_steps is None and any("--examples=N" in x for x in made.assumed)
    assert planned_for_a_cpu(config, examples=128_000).num_steps == 2000


def planned_for_a_cpu(config, examples):
    return plan.make(
        config,
        [targets.parse("cpu:1")],
        recipe="glyphs",
        examples=examples,
        modules=(),
        search=False,
        say=lambda line: None,
    )


OWN = """
import tiny_runs
from big_vision_lite.config import TrainConfig
from big_vision_lite.data.ops import Decode
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.training.optimizers import AdamW
from big_vision_lite.schedules import Constant

def get_config(arg=""):
    return TrainConfig(
        num_steps=3,
        model=tiny_runs.Net(),
        objective=SoftmaxClassification(),
        data=Stream(source=Digits(), ops=(Decode(channels=1),), batch_size=16),
        preprocess=(Decode(channels=1),),
        optimizer=AdamW(schedule=Constant(peak=0.1)),
    )
"""


def test_a_model_of_the_users_own_module_is_planned(tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    words = ["plan", f"--config={tmp_path}/own.py", "--on=cpu:2", "--json"]
    words += ["--allow_module=tiny_runs", f"--picture={tmp_path}/plan.png"]
    assert command_line.run(plan.main, words) == 0, capsys.readouterr().err
    (found,) = json.loads(capsys.readouterr().out)["targets"]
    assert found["flops"] > 0 and "all-reduce" in found["collectives"]
    picture = cv2.imread(str(tmp_path / "plan.png"))
    assert picture.shape[1] == bar_chart.WIDTH and picture.min() < 255


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--on=v6:8"], 'Unknown target "v6:8"'),
        (["--on=cpu:2,cpu:2"], "names a target twice"),
        (["--on=,"], "names no target"),
        (["--on=cpu:8", "--config.mesh.fsdp=3"], "do not make the 8 cpu devices"),
        (["--on=cpu:8", "--batch=4"], "does not divide over 8 devices"),
        (["--on=cpu:1", "--picture=plan.jpg"], "write --picture=plan.png"),
        (
            ["--on=cpu:1", "--config.data.device_ops[0].num_classes=7"],
            "data.source has 10 classes (as many as the head",
        ),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_message(flags, said, capsys):
    words = ["plan", f"--config={ROOT}/tests/recipes/digits_tiny.py", *flags]
    assert command_line.run(plan.main, words) == 1
    assert said in capsys.readouterr().err


def test_without_a_recipe_an_example_is_given(capsys):
    assert command_line.run(plan.main, ["plan"]) == 1
    assert "--config configs/vit_s16_i1k.py --on v5e" in capsys.readouterr().err


def test_the_last_words_of_a_compiler_that_dies_are_said(monkeypatch):
    config = parse("tests/recipes/digits_vit.py")
    dying = "import sys; print('F0 out of cheese', file=sys.stderr); sys.exit(6)"
    start = subprocess.Popen
    monkeypatch.setattr(
        compile_process.subprocess,
        "Popen",
        lambda words, **kw: start([sys.executable, "-c", dying], **kw),
    )
    with (
        compile_process.CompileProcess() as process,
        pytest.raises(
            ValueError, match="(?s)ended with code 6.*out of cheese.*smaller"
        ),
    ):
        process.estimate(config, "cpu:1", None)


def test_chips_are_doubled_along_the_shortest_side():
    more = plan.more_chips
    assert more(targets.parse("v5e:2x4")) == ["v5e:4x4", "v5e:8x4"]
    assert more(targets.parse("h100:8")) == ["h100:2x8", "h100:4x8"]


def refused(config, target: str, needed: int) -> estimate.Estimate:
    there = targets.parse(target).memory
    return estimate.Estimate(
        target=target,
        mesh={"data": 8, "fsdp": 1},
        fits=needed <= there,
        memory={"parameters": 10**8, "optimizer": 2 * 10**8},
        memory_needed=needed,
        memory_there=there,
        parameters=25_000_000,
        trained=25_000_000,
        batch={},
        model_flops=1,
        checkpoint_bytes=1,
        compile_seconds=0.0,
    )


@pytest.mark.parametrize(
    ("each_row", "flags"),
    [
        (10**7, ["--config.micro_batches=2"]),
        (10**8, ["--config.micro_batches=16"]),
        # Not even a row fits: rows halve only with more chips, which does not help.
        (2 * 10**10, None),
    ],
)
def test_the_fewest_micro_batches_that_fit_are_found(each_row, flags):
    """Of a compiler whose memory is so many bytes a row and block."""
    config = parse("configs/vit_s16_i1k.py")
    asked = []

    def ask(changed, target):
        rows = changed.data.batch_size // 8 // changed.micro_batches
        needed = 3 * 10**8 + rows * changed.model.depth * each_row
        if changed.model.remat == "full" or changed.mesh.fsdp > 1:
            needed *= 1 + (each_row < 10**10)  # no help here
        asked.append(changed.model.depth)
        return refused(changed, target, needed)

    first = dataclasses.replace(ask(config, "v5e:2x4"), fits=False)
    found = fitting.search(config, first, ["v5e:2x4"], ask, lambda line: None)
    assert (found and found.flags) == flags
    if flags:
        assert found.estimate.fits and asked[-1] == config.model.depth
        assert len(asked) <= 8


def test_parameters_are_split_where_state_alone_is_too_large():
    config = parse("configs/vit_s16_i1k.py")

    def ask(changed, target):
        state = 20 * 10**9 // changed.mesh.fsdp
        rows = changed.data.batch_size // 8 // changed.micro_batches
        found = refused(changed, target, state + rows * changed.model.depth * 10**7)
        kinds = {"parameters": state, "optimizer": 0}
        return dataclasses.replace(found, memory=kinds)

    found = fitting.search(config, ask(config, "v5e:2x4"), ["v5e:2x4"], ask, print)
    assert found.flags[:2] == ["--config.mesh.fsdp=8", "--config.mesh.data=-1"]


def test_a_refusal_says_how_much_was_needed():
    read = estimate.refused_bytes
    assert read("INTERNAL: something else") is None
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
    )
    assert read(f"{text}HLO temporaries (95.5G) exceeds") == int(95.5 * 2**30)
    assert read("RESOURCE_EXHAUSTED: Used 20.25G of 15.75G hbm.") == int(20.25 * 2**30)


def test_an_image_costs_what_its_ops_cost():
    config = parse("configs/vit_s16_i1k.py")
    came = []

    def last(example, rng):
        came.append(example["image"].shape)
        return example

    ops = (*config.data.ops, last)
    assert 0 < unopened.seconds_an_image(ops, config.preprocess, 0.1) < 1
    assert len(came) > 1 and set(came) == {(224, 224, 3)}
    assert unopened.native_size(config.preprocess) == (224, 224, 3)


def test_bars_are_as_long_as_their_numbers():
    png = bar_chart.draw(
        [bar_chart.Chart(title="t", bars={"a": {"x": 1.0}, "b": {"x": 2.0}})]
    )
    sheet = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    blue = (sheet == bar_chart.COLOURS[0]).all(-1).sum(1)
    short, long = sorted(set(blue[blue > 50].tolist()))[-2:]
    assert long == pytest.approx(2 * short, rel=0.02)


SHRUNK = {
    "configs/vit_s16_i1k.py": (*SMALL, "--batch=64"),
    "configs/bit_i1k.py": (
        "--config.model.stages=(1,)",
        "--config.model.width=32",
        "--batch=64",
    ),
    "configs/fashion_mnist.py": (*SMALL, "--config.model.mlp_dim=48"),
    "configs/glyphs.py": ("--config.model.width=8", "--config.model.groups=4"),
    "configs/quickstart.py": ("--config.model.width=8", "--config.model.groups=4"),
    "configs/mae_i1k.py": (
        *(flag.replace("model.", "model.encoder.") for flag in SMALL),
        "--config.model.decoder_depth=1",
        "--batch=64",
    ),
    "configs/dino_i1k.py": (
        *(flag.replace("model.", "model.encoder.") for flag in SMALL),
        "--config.model.prototypes=64",
        "--config.model.patch_prototypes=64",
        "--batch=64",
    ),
    "configs/lejepa_imagenette.py": (
        *(flag.replace("model.", "model.encoder.") for flag in SMALL),
        "--batch=64",
    ),
    "configs/masked_fashion.py": ("--config.model.encoder.depth=1",),
    "configs/comparison.py": ("--config.model.depth=1",),
    "configs/glyphs_captions.py": (
        "--config.model.image_tower.width=8",
        "--config.model.image_tower.groups=4",
        "--config.model.text_tower.depth=1",
    ),
    "configs/siglip.py": (
        *(flag.replace("model.", "model.image_tower.") for flag in SMALL),
        "--config.model.text_tower.depth=1",
        "--config.model.features=24",
        "--batch=64",
    ),
    "configs/cappa.py": (
        *(flag.replace("model.", "model.encoder.") for flag in SMALL),
        "--config.model.decoder_depth=1",
        "--batch=64",
    ),
    "configs/glyphs_views.py": (
        "--config.model.encoder.width=8",
        "--config.model.encoder.groups=4",
    ),
    "configs/glyphs_distil.py": (
        "--config.model.width=8",
        "--config.model.groups=4",
    ),
    "configs/glyphs_tags.py": ("--config.model.width=8", "--config.model.groups=4"),
}
MACHINES = "v5e:2x4,v5p:2x2x1,h100:8,a100:8"
# Recipes whose argument is a folder or a run, and what makes them small.
TINY = ("--config.model.width=8", "--config.model.groups=4")
OWN_DATA = {
    "configs/folder.py": ("dir={images},size=32", TINY),
    "configs/table.py": (
        "table={table},image=file,label=grey,kind=numbers,size=32",
        TINY,
    ),
    "configs/weak_tags.py": (
        "table={table},image=file,tags=tags,vocabulary=tags.json,classes=2,size=32",
        ("--config.model.stages=(1,)", "--config.model.statistics_groups=1"),
    ),
    "configs/finetune.py": (
        "init={run},data={images},allow_module=shapes_run,size=keep",
        (),
    ),
    "configs/distil_i1k.py": (
        "teacher={run},allow_module=shapes_run",
        (
            "--config.model.student.stages=(1,)",
            "--config.model.student.width=32",
            "--batch=64",
        ),
    ),
    "configs/distil.py": (
        "teacher={run},student=ViT:Ti/8,data={images},allow_module=shapes_run",
        ("--config.model.student.depth=1",),
    ),
}


def test_all_recipes_are_planned_below():
    recipes = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert recipes == {*SHRUNK, *OWN_DATA}


@needs_compilers
@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("recipe", SHRUNK)
def test_every_recipe_is_planned_for_tpus_and_gpus_that_are_not_there(recipe, capsys):
    check_on_machines([f"--config={ROOT}/{recipe}", *SHRUNK[recipe]], capsys)


@needs_compilers
@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("recipe", OWN_DATA)
def test_recipes_on_own_data_are_planned_too(recipe, capsys, tmp_path):
    images, run = shapes_run.shared()
    table = write_table(tmp_path)
    argument, smaller = OWN_DATA[recipe]
    argument = argument.format(images=images, run=run, table=table)
    words = [f"--config={ROOT}/{recipe}:{argument}", "--allow_module=shapes_run"]
    check_on_machines([*words, *smaller, "--batch=64"], capsys)


def check_on_machines(words: list[str], capsys) -> None:
    words = ["plan", *words, f"--on={MACHINES}", "--json"]
    assert command_line.run(plan.main, words) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)["targets"]
    assert [one["target"] for one in found] == MACHINES.split(",")
    for one in found:
        assert one["fits"] and 0 < one["mfu"] < 1
        assert one["step_seconds"] >= one["bound_seconds"] > 0
        assert "all-reduce" in one["collectives"]


@needs_compilers
def test_a_topology_that_libtpu_does_not_know_is_refused(capsys):
    words = ["plan", f"--config={ROOT}/tests/recipes/digits_vit.py", "--on=v5e:3x5"]
    assert command_line.run(plan.main, words) == 1
    said = capsys.readouterr().err
    assert "libtpu knows no topology v5e:3x5" in said and "such as v5e:2x4" in said


@needs_compilers
@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_a_large_model_is_refused_and_what_is_proposed_fits(capsys):
    """ViT-g/14, batch 4,096, on eight v5e; minutes of compiling."""
    model = dict(width=1408, depth=40, mlp_dim=6144, num_heads=16, patch_size=14)
    words = ["plan", f"--config={ROOT}/configs/vit_s16_i1k.py", "--batch=4096"]
    words += [f"--config.model.{name}={value}" for name, value in model.items()]
    assert command_line.run(plan.main, [*words, "--on=v5e:2x4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert not document["targets"][0]["fits"]
    fit = document["fits"]["v5e:2x4"]
    assert fit["estimate"]["fits"] and "--config.mesh.fsdp=8" in fit["flags"]
