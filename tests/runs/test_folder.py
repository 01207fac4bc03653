import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest
from etils import epath

from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import Decode
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.recipes import serialize
from big_vision_lite.runs import folder as run_folder
from big_vision_lite.runs.folder import RunFolder
from big_vision_lite.runs.integrity import DamagedCheckpoint
from big_vision_lite.runtime import startup
from big_vision_lite.runtime.sharding import Mesh
from big_vision_lite.runtime.startup import Platform
from big_vision_lite.schedules import Average, WarmupCosine
from big_vision_lite.training.optimizers import AdamW

ROOT = pathlib.Path(__file__).parents[2]


def recipe(*, width: int = 16, **overrides) -> TrainConfig:
    fields = dict(
        num_steps=100,
        model=ViT(
            width=width,
            depth=1,
            mlp_dim=32,
            num_heads=2,
            patch_size=4,
            head=Classifier(num_classes=10),
        ),
        objective=SoftmaxClassification(),
        data=Stream(source=Digits(), ops=(Decode(channels=1),), batch_size=128),
        preprocess=(Decode(channels=1),),
        optimizer=AdamW(schedule=WarmupCosine(peak=1e-3, warmup_steps=10)),
    )
    return TrainConfig(**{**fields, **overrides})


def open_folder(path, config=None, log=lambda line: None):
    return RunFolder(epath.Path(path), config or recipe(), log=log)


def begin(path, config=None, step=50):
    """Leaves a folder as a run does that was killed after its first checkpoint."""
    with open_folder(path, config):
        pass
    folder = path / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize("fails", [True, False])
def test_the_trace_of_a_failed_try_stays_until_a_run_ends_well(tmp_path, fails):
    (tmp_path / "error.txt").write_text("of the first try")
    with contextlib.suppress(KeyError), open_folder(tmp_path):
        if fails:
            raise KeyError
    assert (tmp_path / "error.txt").exists() == fails


def test_the_folder_tells_what_ran_on_what_and_with_what(tmp_path):
    with open_folder(tmp_path / "new" / "run with space é"):
        pass
    folder = epath.Path(tmp_path / "new" / "run with space é")
    document = run_folder.read_config_document(folder)
    assert run_folder.read_config(folder) == recipe()
    assert document["versions"]["jax"] == jax.__version__
    assert document["versions"]["python"] == sys.version.split()[0]
    assert document["machine"]["devices"] == jax.device_count()
    assert document["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert list(document) == ["version", "config", "versions", "machine"]


def test_a_run_that_is_refused_before_it_begins_leaves_no_configuration(tmp_path):
    config = tmp_path / "config.json"
    with pytest.raises(ValueError, match="no such set"), open_folder(tmp_path):
        assert config.exists()
        raise ValueError("no such set")
    assert not config.exists()
    with pytest.raises(KeyboardInterrupt), open_folder(tmp_path) as folder:
        folder.begin()
        raise KeyboardInterrupt
    assert config.exists()
    # Once begun it stays, whatever becomes of a later start.
    with pytest.raises(ValueError, match="disk"), open_folder(tmp_path):
        raise ValueError("disk")
    assert config.exists()


def test_without_git_or_outside_its_repository_no_commit_is_claimed(
    tmp_path, monkeypatch
):
    if (ROOT / ".git").exists():
        assert len(startup.versions()["commit"]) == 40
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        found = startup.versions()
    assert "commit" not in found and found["jax"] == jax.__version__
    # A copy inside a repository of somebody else.
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    copied = tmp_path / "vendor" / "big_vision_lite" / "runtime" / "startup.py"
    copied.parent.mkdir(parents=True)
    monkeypatch.setattr(startup, "__file__", str(copied))
    assert startup.versions() == found


def test_a_second_run_in_the_folder_is_refused_while_the_first_lasts(tmp_path):
    with open_folder(tmp_path):
        for _ in range(2):
            expected = f"{tmp_path} is in use by process {os.getpid()} on .*another --w"
            with pytest.raises(ValueError, match=expected), open_folder(tmp_path):
                pass
    with open_folder(tmp_path):
        pass


HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[2])
import test_folder
with test_folder.open_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_run_leaves_no_lock_behind(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLDER,
            tmp_path,
            pathlib.Path(__file__).parent,
        ],
        stdout=subprocess.PIPE,
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match=f"in use by process {holder.pid} on"),
            open_folder(tmp_path),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with open_folder(tmp_path):
        pass
    assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_a_resume_of_the_same_recipe_says_nothing(tmp_path):
    begin(tmp_path)
    before = (tmp_path / "config.json").read_text()
    lines = []
    with open_folder(tmp_path, log=lines.append):
        pass
    assert lines == [] and (tmp_path / "config.json").read_text() == before


FREE = {
    "log_every_steps": 7,
    "checkpoints": Checkpoints(every_steps=3, keep_latest=2),
    "evaluators": {"test": Classification(source=Digits(split="test"))},
    "platform": Platform.CPU,
    "mesh": Mesh(fsdp=2),
    "profile_steps": (2, 3),
    "data": Stream(
        source=Digits(), ops=(Decode(channels=1),), batch_size=128, threads=3
    ),
}
BINDING = {
    "seed": (3, "seed 0 -> 3"),
    "ema": (Average(start=0.9), "ema null -> "),
    "freeze": (("head/.*",), 'freeze [] -> ["head/.*"]'),
    "micro_batches": (2, "micro_batches 1 -> 2"),
    "optimizer": (
        AdamW(schedule=WarmupCosine(peak=2e-3, warmup_steps=10)),
        "optimizer.schedule.peak 0.001 -> 0.002",
    ),
    "data": (
        Stream(source=Digits(), ops=(Decode(channels=1),), batch_size=64),
        "data.batch_size 128 -> 64",
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_what_moves_no_parameter_may_change(name, tmp_path):
    begin(tmp_path)
    changed = recipe(**{name: FREE[name]})
    with open_folder(tmp_path, changed):
        pass
    assert run_folder.read_config(epath.Path(tmp_path)) == changed


@pytest.mark.parametrize("name", BINDING)
def test_what_moves_parameters_may_not_change(name, tmp_path):
    begin(tmp_path)
    before = (tmp_path / "config.json").read_text()
    value, shown = BINDING[name]
    with pytest.raises(ValueError, match="belongs to another configuration") as caught:
        open_folder(tmp_path, recipe(**{name: value})).__enter__()
    assert shown in str(caught.value)
    assert (tmp_path / "config.json").read_text() == before
    # And before there is a checkpoint everything may.
    (tmp_path / "checkpoints" / "50" / "manifest.json").unlink()
    with open_folder(tmp_path, recipe(**{name: value})):
        pass


def test_another_architecture_is_named_by_its_field(tmp_path):
    begin(tmp_path)
    with pytest.raises(ValueError) as caught:
        open_folder(tmp_path, recipe(width=32)).__enter__()
    message = str(caught.value)
    assert "model.width 16 -> 32" in message
    assert "(sha " in message and ", you pass (sha " in message
    assert f"Use a new --workdir, or --config.init.path={tmp_path} with" in message
    # The lock of the refused run is gone with it.
    with open_folder(tmp_path):
        pass


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        ({"num_steps": 100}, {"num_steps": 200}, "num_steps 100 -> 200"),
        (
            {"num_steps": None, "num_epochs": 10.0},
            {"num_steps": None, "num_epochs": 20.0},
            "num_epochs 10.0 -> 20.0",
        ),
    ],
)
def test_another_length_is_refused_with_both_learning_rates(
    before, after, shown, tmp_path
):
    begin(tmp_path, recipe(**before), step=80)
    with pytest.raises(ValueError) as caught:
        open_folder(tmp_path, recipe(**after)).__enter__()
    message = str(caught.value)
    assert f"started with another length: {shown}." in message
    steps = [recipe(**length).resolve_steps(1438) for length in (before, after)]
    schedule = WarmupCosine(peak=1e-3, warmup_steps=10)
    was, would_be = (float(schedule.build(n)(80)) for n in steps)
    assert would_be > 2 * was
    assert f"Learning rate now {was:.1e} -> would be {would_be:.1e}." in message
    assert "Choose the old length, or start a new run" in message


def test_another_machine_is_said_and_allowed(tmp_path):
    begin(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    document["machine"]["cores"] = 99
    (tmp_path / "config.json").write_text(json.dumps(document))
    lines = []
    with open_folder(tmp_path, log=lines.append):
        pass
    cores = len(os.sched_getaffinity(0))
    assert len(lines) == 1
    assert f"resuming on another machine (cores 99 -> {cores})" in lines[0]


def test_another_mesh_is_said_and_allowed(tmp_path):
    begin(tmp_path)
    lines = []
    with open_folder(tmp_path, recipe(mesh=Mesh(fsdp=2)), lines.append):
        pass
    assert len(lines) == 1
    assert "resuming on another mesh (mesh.fsdp 1 -> 2): the same batches" in lines[0]


@pytest.mark.parametrize("name", ["jax", "jaxlib", "flax", "optax", "python"])
def test_other_versions_are_said_and_allowed(name, tmp_path):
    begin(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    now = document["versions"][name]
    document["versions"] |= {name: "0.1", "commit": "another one"}
    (tmp_path / "config.json").write_text(json.dumps(document))
    lines = []
    with open_folder(tmp_path, log=lines.append):
        pass
    assert len(lines) == 1
    assert f"resuming with other versions ({name} 0.1 -> {now})" in lines[0]
    assert "the same batches, but the last bits of the results may differ" in lines[0]
    # Said once; and a run that has saved nothing has nothing to continue.
    with open_folder(tmp_path, log=lines.append):
        pass
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "checkpoints" / "50" / "manifest.json").unlink()
    with open_folder(tmp_path, log=lines.append):
        pass
    assert len(lines) == 1


def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(tmp_path):
    # Root may write anywhere, so: below a file, and in a folder that takes nothing.
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", epath.Path("/proc/self/run")):
        with pytest.raises(
            OSError, match=f"Cannot write {path}: .*nothing was trained"
        ):
            open_folder(path).__enter__()


def test_a_damaged_config_is_refused_and_left_alone(tmp_path):
    begin(tmp_path)
    for text in ("", "{", "[]", '{"version": "1"}', "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DamagedCheckpoint, match=r"config.json is damaged"):
            open_folder(tmp_path).__enter__()
        assert (tmp_path / "config.json").read_text() == text
    with pytest.raises(FileNotFoundError, match="is no run folder and no step folder"):
        run_folder.read_config(epath.Path(tmp_path / "checkpoints"))


def test_a_config_from_a_newer_version_says_what_to_install(tmp_path):
    document = json.loads(serialize.to_json(recipe()))
    document["version"] = "99.1.0"
    document["config"]["model"]["foresight"] = 4
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError) as caught:
        run_folder.read_config(epath.Path(tmp_path))
    message = str(caught.value)
    assert 'ViT has no field "foresight"' in message
    assert "written by big_vision_lite 99.1.0" in message
    assert "pip install 'big_vision_lite>=99.1.0'" in message
    # The same of this version or an older one is just wrong.
    document["version"] = "0.0.1"
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError) as caught:
        run_folder.read_config(epath.Path(tmp_path))
    assert "pip install" not in str(caught.value)


def test_a_resume_in_a_folder_of_a_newer_version_says_so(tmp_path):
    begin(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    document["version"] = "99.1.0"
    document["config"]["model"]["foresight"] = 4
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="model.foresight 4 -> null") as caught:
        open_folder(tmp_path).__enter__()
    assert "written by big_vision_lite 99.1.0" in str(caught.value)


def test_differences_name_every_leaf_once():
    old = {"a": 1, "b": {"c": [1, 2], "d": "x"}, "gone": 2}
    new = {"a": 1, "b": {"c": [1, 3], "d": "y"}, "come": {"class": "m.Adam", "z": 1}}
    assert run_folder.differences(old, new) == [
        ("b.c[1]", "2", "3"),
        ("b.d", '"x"', '"y"'),
        ("gone", "2", "null"),
        ("come", "null", "Adam"),
    ]
    assert run_folder.differences(old, json.loads(json.dumps(old))) == []


def test_dataclass_and_json_agree_on_what_may_change():
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    tops = {f.split(".")[0] for f in (*run_folder.FREE, *run_folder.LENGTH)}
    assert tops <= names
