import dataclasses
import errno
import gc
import pathlib
import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from big_vision_lite import trees
from big_vision_lite.config import Checkpoints
from big_vision_lite.runs import integrity, load, step_folder
from big_vision_lite.runs.checkpoint import Checkpointer
from big_vision_lite.runs.integrity import DamagedCheckpoint
from big_vision_lite.runtime import files, sharding
from big_vision_lite.runtime.sharding import Mesh, ShardingRule
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.state import TrainState

FSDP = (ShardingRule(pattern=".*"),)
ALL = Checkpoints(keep_latest=100)


def everything(width: int = 24) -> TrainState:
    """A state with every part a run may have, in every dtype it may have."""
    params = {
        "encoder": {"kernel": jnp.linspace(-1, 1, 16 * width).reshape(16, width)},
        "head": {"kernel": jnp.ones((width, 10)), "bias": jnp.arange(10.0)},
    }
    moments = optax.scale_by_adam(mu_dtype=jnp.bfloat16).init(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen={"stem": {"kernel": jnp.full((3, 8), 0.1)}},
        collections={
            "batch_stats": {"mean": jnp.arange(5.0), "seen": jnp.ones(3, bool)}
        },
        opt_state=moments._replace(
            mu=jax.tree.map(lambda x: (x + 0.3).astype(jnp.bfloat16), params)
        ),
        ema=jax.tree.map(lambda x: x * 0.5, params),
    )


def blueprint(devices: int = 1, fsdp: int = 1, width: int = 24) -> TrainState:
    mesh = sharding.make_mesh(Mesh(data=-1, fsdp=fsdp), jax.devices()[:devices])
    return state_lib.blueprint(lambda key: everything(width), FSDP, mesh)


def build(devices: int = 1, fsdp: int = 1, step: int = 0) -> TrainState:
    abstract = blueprint(devices, fsdp)
    state = jax.tree.map(
        lambda value, leaf: jax.device_put(np.asarray(value), leaf.sharding),
        everything(),
        abstract,
    )
    return at(state, step)


def at(state: TrainState, step: int) -> TrainState:
    """The state of another step: the counter and one parameter differ."""
    bias = state.params["head"]["bias"] + step
    params = state.params | {"head": state.params["head"] | {"bias": bias}}
    counter = jax.device_put(np.int32(step), state.step.sharding)
    return dataclasses.replace(state, step=counter, params=params)


def open_checkpointer(workdir, policy=ALL, log=lambda line: None, **metadata):
    metadata = {"class_names": ["a", "b"], "source": "digits"} | metadata
    return Checkpointer(
        epath.Path(workdir),
        policy,
        config_text='{"version": "0", "config": {}}\n',
        metadata=metadata,
        log=log,
    )


def save(workdir, *steps, state=None, policy=ALL):
    state = build() if state is None else state
    with open_checkpointer(workdir, policy) as checkpointer:
        for step in steps:
            checkpointer.save(step, at(state, step))


def restore(workdir, abstract=None, **metadata):
    lines = []
    with open_checkpointer(workdir, log=lines.append, **metadata) as checkpointer:
        state = checkpointer.restore_latest(abstract or blueprint())
    return state, lines


def assert_same_bits(found, expected):
    for (name, a), b in zip(
        trees.flatten(found).items(), jax.tree.leaves(expected), strict=True
    ):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), name


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run with spaces é")
    save(workdir, 1, 2, 3)
    return workdir


@pytest.fixture
def run(three_steps, tmp_path):
    """A run folder with steps 1, 2, 3, to be damaged."""
    return epath.Path(shutil.copytree(three_steps, tmp_path / "run"))


@pytest.mark.parametrize(
    ("saved", "restored"),
    [((8, 4), (8, 4)), ((8, 8), (2, 1)), ((1, 1), (8, 8))],
)
def test_what_is_restored_is_what_was_saved_on_any_mesh(saved, restored, tmp_path):
    state = build(*saved)
    save(tmp_path, 7, state=state)
    abstract = blueprint(*restored)
    found, lines = restore(tmp_path, abstract)
    assert_same_bits(found, at(state, 7))
    state_lib.check_same(abstract, found)
    moved = f"saved on {saved[0]} devices, restoring on {restored[0]}"
    assert lines == ([] if saved[0] == restored[0] else [moved])


@pytest.mark.parametrize("devices", [1, 8])
def test_a_save_compiles_nothing_that_was_prepared(devices, tmp_path, caplog):
    """Two ways: what JAX logs when it compiles, and the programs at hand."""
    integrity._checksum_program.cache_clear()
    state = build(devices)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        with open_checkpointer(tmp_path) as checkpointer:
            checkpointer.prepare(blueprint(devices))
            checkpointer.wait()
            prepared = integrity._checksum_program.cache_info().currsize
            caplog.clear()
            checkpointer.save(1, state)
        # Nor does Orbax compile anything: it would cut small arrays for each device.
        assert "Compiling" not in caplog.text
    assert integrity._checksum_program.cache_info().currsize == prepared
    # Without it the same save compiles all of them.
    integrity._checksum_program.cache_clear()
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        save(tmp_path / "unprepared", 1, state=state)
    assert caplog.text.count("Compiling jit(leaf_checksum)") == prepared


def test_a_folder_without_a_checkpoint_restores_nothing(tmp_path):
    state, lines = restore(tmp_path)
    assert state is None and lines == []
    assert step_folder.complete_steps(epath.Path(tmp_path / "checkpoints")) == []


def test_what_is_saved_is_the_state_at_the_call_not_after_later_steps(tmp_path):
    @jax.jit
    def big(key):
        return jax.random.normal(key, (2048, 2048))

    step = jax.jit(
        lambda s: jax.tree.map(lambda x: (x + 1).astype(x.dtype), s), donate_argnums=0
    )
    state = dataclasses.replace(build(), params={"kernel": big(jax.random.key(0))})
    expected = jax.device_get(jax.tree.map(jnp.copy, state))
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    found, _ = restore(tmp_path, abstract)
    assert_same_bits(found, expected)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        # One damaged byte must not cost the run.
        (Checkpoints(), ["5", "6"]),
        (Checkpoints(keep_latest=1), ["6"]),
        (Checkpoints(keep_latest=1, keep_every_steps=2), ["2", "4", "6"]),
    ],
)
def test_the_policy_says_which_steps_stay(policy, kept, tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, 6, policy=policy)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == kept
    found, _ = restore(tmp_path)
    assert_same_bits(found, at(build(), 6))
    first = epath.Path(tmp_path / "checkpoints" / kept[0])
    assert step_folder.verified_manifest(first)["step"] == int(kept[0])


def test_a_policy_that_keeps_nothing_is_refused():
    for wrong in ({"keep_latest": 0}, {"every_steps": 0}, {"keep_every_steps": -1}):
        with pytest.raises(ValueError, match="checkpoints: every_steps="):
            Checkpoints(**wrong)


def test_a_save_lasts_until_its_step_is_complete(tmp_path, monkeypatch):
    finish, goes_on = Checkpointer._finish, threading.Event()
    late = lambda *arguments: (goes_on.wait(30), finish(*arguments))  # noqa: E731
    monkeypatch.setattr(Checkpointer, "_finish", late)
    with open_checkpointer(tmp_path) as checkpointer:
        assert not checkpointer.saving()
        checkpointer.save(1, build(step=1))
        assert checkpointer.saving()
        goes_on.set()
        checkpointer.wait()
        assert not checkpointer.saving()


def test_a_step_is_saved_once(tmp_path, monkeypatch):
    saved = []
    save_async = step_folder.ocp.save_async

    def counted(folder, state):
        saved.append(folder.name)
        return save_async(folder, state)

    monkeypatch.setattr(step_folder.ocp, "save_async", counted)
    with open_checkpointer(tmp_path, Checkpoints(every_steps=5)) as checkpointer:
        assert [s for s in range(1, 16) if checkpointer.due(s)] == [5, 10, 15]
        checkpointer.save(5, at(build(), 5))
        checkpointer.save(5, at(build(), 5))
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.restore_latest(blueprint())
        checkpointer.save(5, at(build(), 5))  # as after a resume at the last step
    assert saved == ["5"]


def test_the_manifest_describes_the_step(run):
    folder = epath.Path(run / "checkpoints" / "3")
    manifest = step_folder.verified_manifest(folder)
    assert manifest["step"] == 3 and manifest["devices"] == 1
    assert manifest["class_names"] == ["a", "b"]
    leaves = trees.flatten(at(build(), 3))
    assert list(manifest["leaves"]) == sorted(leaves)
    for name, leaf in leaves.items():
        assert manifest["leaves"][name]["dtype"] == str(leaf.dtype)
        assert manifest["leaves"][name]["shape"] == list(leaf.shape)
    on_disk = {str(p.relative_to(folder)) for p in files_of_a_step(folder)}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    assert "config.json" in on_disk


@pytest.mark.parametrize("how", ["no manifest", "orbax folder"])
def test_an_unfinished_step_is_moved_away_and_said(run, how):
    if how == "no manifest":
        (run / "checkpoints" / "3" / "manifest.json").unlink()
        left, newest = "3", 2
    else:
        left, newest = "4.orbax-checkpoint-tmp", 3
        shutil.copytree(run / "checkpoints" / "3", run / "checkpoints" / left)
    for _ in range(2):  # a second time over what lies in the trash already
        found, lines = restore(run)
        assert_same_bits(found, at(build(), newest))
        assert lines == [
            f"step {left[0]} is unfinished (its run was killed, or the save failed): "
            f"moved to {run / 'trash' / left}. Newest complete: {newest}."
        ]
        assert (run / "trash" / left).is_dir()
        assert not (run / "checkpoints" / left).exists()
        shutil.copytree(run / "trash" / left, run / "checkpoints" / left)
    # The step can be saved again.
    shutil.rmtree(run / "checkpoints" / left)
    save(run, newest + 1)
    assert_same_bits(restore(run)[0], at(build(), newest + 1))


def test_an_unfinished_first_step_leaves_nothing_to_restore(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "1" / "manifest.json").unlink()
    found, lines = restore(tmp_path)
    assert found is None
    assert lines[0].endswith("None before.")


def files_of_a_step(folder):
    return sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())


def test_every_kind_of_damage_to_every_file_is_refused_by_name(run):
    newest = run / "checkpoints" / "3"
    files = files_of_a_step(newest)
    names = {str(p.relative_to(newest)) for p in files}
    assert {"config.json", "manifest.json"} < names and len(names) > 5, names
    tried = 0
    for path in files:
        whole = path.read_bytes()
        flips = {0, len(whole) // 2, len(whole) - 1} if whole else set()
        damages = [
            whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            for at in sorted(flips)
        ]
        damages += [whole[:-1], whole + b"x"] if whole else [b"x"]
        if path.name != "manifest.json":
            damages.append(None)
        for damage in damages:
            path.unlink() if damage is None else path.write_bytes(damage)
            with pytest.raises(DamagedCheckpoint) as caught:
                restore(run)
            message = str(caught.value)
            assert str(path) in message, message
            assert f"Step 2 is intact. To continue from it: mkdir -p '{run}/trash'" in (
                message
            )
            path.write_bytes(whole)
            tried += 1
    assert tried > 25
    assert_same_bits(restore(run)[0], at(build(), 3))


def test_what_is_offered_is_intact_and_the_command_works(run):
    for step in ("3", "2"):
        config = run / "checkpoints" / step / "config.json"
        config.write_bytes(config.read_bytes() + b" ")
    with pytest.raises(
        DamagedCheckpoint, match=r"3/config.json has \d+ bytes"
    ) as caught:
        restore(run)
    message = str(caught.value)
    assert "Step 1 is intact" in message and "Step 2" not in message
    # Only the newest is in the way; then the next one is met.
    shutil.rmtree(run / "checkpoints" / "3")
    with pytest.raises(DamagedCheckpoint, match=r"2/config.json"):
        restore(run)
    shutil.rmtree(run / "checkpoints" / "2")
    assert_same_bits(restore(run)[0], at(build(), 1))
    (run / "checkpoints" / "1" / "config.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="missing.*\nNo other complete step"):
        restore(run)


@pytest.mark.parametrize(
    "name",
    [
        "step",
        "params/encoder/kernel",
        "frozen/stem/kernel",
        "collections/batch_stats/mean",
        "collections/batch_stats/seen",
        "opt_state/mu/head/kernel",
        "opt_state/count",
        "ema/head/bias",
    ],
)
def test_a_flipped_bit_that_no_file_digest_sees_is_named_by_its_leaf(name, tmp_path):
    state = build()
    leaves, structure = jax.tree.flatten(state)
    index = trees.names(state).index(name)
    flat = np.array(leaves[index]).reshape(-1)
    if flat.dtype == bool:
        flat[-1] ^= True
    else:
        flat.view(np.uint8)[-2] ^= 1
    leaves[index] = jax.device_put(
        flat.reshape(leaves[index].shape), leaves[index].sharding
    )
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.save(2, jax.tree.unflatten(structure, leaves))
    good, bad = (epath.Path(tmp_path / "checkpoints" / n) for n in "12")
    # Files and their digests agree; what they hold is not what was summed.
    manifest = integrity.read_manifest(bad)
    manifest["leaves"] = integrity.read_manifest(good)["leaves"]
    integrity.write_manifest(bad, manifest)
    with pytest.raises(
        DamagedCheckpoint, match=f"/2: {name} differ.*\nStep 1 is intact"
    ):
        restore(tmp_path)


# Orbax leaves the other reads of a failed load to themselves; they are collected here,
# not in the middle of another test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_flipped_byte_of_the_data_loads_even_if_the_digests_are_made_to_agree(run):
    newest = epath.Path(run / "checkpoints" / "3")
    expected = at(build(), 3)
    caught = []
    data = [p for p in files_of_a_step(run / "checkpoints" / "3") if "/d/" in str(p)]
    assert data
    for path in data:
        whole = path.read_bytes()
        for place in np.linspace(0, len(whole) - 1, 12).astype(int):
            flipped = bytearray(whole)
            flipped[place] ^= 64
            path.write_bytes(bytes(flipped))
            manifest = integrity.read_manifest(newest)
            manifest["files"] = integrity.digest_files(newest)
            integrity.write_manifest(newest, manifest)
            try:
                found, _ = restore(run)
            except DamagedCheckpoint as error:
                caught.append(str(error))
            else:
                assert_same_bits(found, expected)  # the byte is none of the values
        path.write_bytes(whole)
    gc.collect()
    assert len(caught) > 10
    for message in caught:
        assert f"{newest}: " in message or f"{newest} cannot be read" in message
        assert "Step 2 is intact" in message and "Traceback" not in message


def test_a_manifest_that_is_no_manifest_is_damage(run):
    path = run / "checkpoints" / "3" / "manifest.json"
    whole = path.read_text()
    changed = whole.replace('\\"step\\": 3', '\\"step\\": 4')
    assert changed != whole
    for text in ("", "[]", "{}", '{"body": 3, "sha256": ""}', changed):
        path.write_text(text)
        with pytest.raises(DamagedCheckpoint, match=r"3/manifest.json is damaged \("):
            restore(run)


@pytest.mark.parametrize("reader", [load.load, load.load_variables])
def test_who_else_loads_a_damaged_step_is_offered_the_intact_one(reader, run):
    newest = epath.Path(run / "checkpoints" / "3")
    data = next(p for p in files_of_a_step(newest) if "/d/" in str(p))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpoint, match="Step 2 is intact. To continue from"):
        reader(newest)


def test_a_copied_step_folder_is_enough(run, tmp_path):
    copy = epath.Path(tmp_path / "elsewhere" / "my model")
    shutil.copytree(run / "checkpoints" / "2", copy)
    shutil.rmtree(run)
    folder = step_folder.find(copy)
    assert folder == copy
    params, manifest = load.load_variables(folder)
    assert manifest["step"] == 2
    expected = at(build(), 2)
    np.testing.assert_array_equal(
        params["encoder/kernel"], expected.ema["encoder"]["kernel"]
    )
    found = step_folder.restore(folder, blueprint(), manifest)
    assert_same_bits(found, expected)


def test_find_takes_run_folder_checkpoints_folder_and_step_folder(run, monkeypatch):
    newest = epath.Path(run / "checkpoints" / "3")
    for given in (run, run / "checkpoints"):
        lines = []
        assert step_folder.find(given, lines.append) == newest
        assert lines == [f"{given}: using step 3, the newest of 3 complete"]
    lines = []
    older = run / "checkpoints" / "2"
    assert step_folder.find(older, lines.append) == epath.Path(older)
    monkeypatch.chdir(run.parent)
    assert step_folder.find("run", lines.append) == newest
    assert step_folder.find("run/checkpoints/../", lines.append) == newest
    # A step that is not complete is none.
    (run / "checkpoints" / "3" / "manifest.json").unlink()
    assert step_folder.find(run, lines.append).name == "2"


def test_find_says_what_it_saw_instead(tmp_path):
    tmp_path = epath.Path(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"No complete.*it does not exist.*run f"
    ):
        step_folder.find(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="it holds nothing"):
        step_folder.find(tmp_path)
    (tmp_path / "weights.npz").write_text("")
    with pytest.raises(FileNotFoundError, match="it holds weights.npz. Give a run fo"):
        step_folder.find(tmp_path)
    with pytest.raises(FileNotFoundError, match="it is a file"):
        step_folder.find(tmp_path / "weights.npz")


def test_find_says_which_steps_are_incomplete(run, capsys):
    folder = epath.Path(run / "checkpoints")
    (folder / "3" / "manifest.json").unlink()
    assert step_folder.find(run) == folder / "2"
    said = capsys.readouterr().out
    assert "using step 2" in said and "step 3 is incomplete (no manifest" in said
    with pytest.raises(FileNotFoundError, match="step 3 is incomplete"):
        step_folder.find(folder / "3")
    for step in step_folder.complete_steps(folder):
        (folder / str(step) / "manifest.json").unlink()
    for given in (run, folder):
        with pytest.raises(FileNotFoundError, match=r"steps .*2, 3 are incomplete"):
            step_folder.find(given)


def test_a_checkpoint_of_another_architecture_is_refused_with_the_names(run):
    with pytest.raises(ValueError, match="differ:") as caught:
        restore(run, blueprint(width=32))
    message = str(caught.value)
    assert "  + params/encoder/kernel (16, 32) float32  in this recipe" in message
    assert "  - params/encoder/kernel (16, 24) float32  in the checkpoint" in message
    assert f"--config.init.path={run}" in message
    less = dataclasses.replace(blueprint(), ema=None)
    with pytest.raises(
        ValueError, match=r"- ema/head/bias \(10,\) float32  only in the"
    ):
        restore(run, less)
    other = blueprint()
    other = dataclasses.replace(
        other,
        opt_state=jax.tree.map(
            lambda x: (
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
                if x.dtype != jnp.bfloat16
                else jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
            ),
            other.opt_state,
        ),
    )
    with pytest.raises(ValueError, match=r"opt_state/mu/.*bfloat16  in the checkpoint"):
        restore(run, other)


def test_a_resume_with_other_data_is_refused(run):
    assert restore(run)[0] is not None
    with pytest.raises(ValueError, match=r"fingerprint digits, which is now fashion"):
        restore(run, source="fashion")


class Failing:
    def result(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_comes_up_at_the_next_one_or_at_the_end(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(step_folder.ocp, "save_async", lambda *_: Failing())
    expected = (
        r"Could not save step 2 in .*No space left.*Step 1 is complete. Free disk"
    )
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, at(build(), 2))  # returns: it fails in the background
        with pytest.raises(OSError, match=expected):
            checkpointer.save(3, at(build(), 3))
    with pytest.raises(OSError, match=expected), open_checkpointer(tmp_path) as c:
        c.save(2, at(build(), 2))
    # Or as soon as anybody asks, which waits for nothing.
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.check()
        checkpointer.save(2, at(build(), 2))
        checkpointer._thread.join()
        with pytest.raises(OSError, match=expected):
            checkpointer.check()
        checkpointer.check()  # said once
    monkeypatch.undo()
    assert_same_bits(restore(tmp_path)[0], at(build(), 1))


def test_a_manifest_that_cannot_be_written_fails_the_save(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "replace", full)
    with pytest.raises(OSError, match="Could not save step 1.*No step is saved yet"):
        save(tmp_path, 1)
    monkeypatch.undo()
    found, lines = restore(tmp_path)
    assert found is None and "step 1 is unfinished" in lines[0]


def test_a_disk_that_is_really_full_loses_nothing_earlier(tmp_path):
    # The kernel refuses files above a limit just as it does on a full disk.
    random = np.random.default_rng(0).normal(size=(500, 1000)).astype(np.float32)
    state = dataclasses.replace(build(), params={"kernel": jnp.asarray(random)})
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            checkpointer.save(2, state)
            with pytest.raises(OSError, match="Could not save step 2") as caught:
                checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        message = str(caught.value)
        assert "File too large" in message and "Step 1 is complete" in message
        assert "\n" not in message and "Traceback" not in message
        # With room again, the next save is as good as any.
        checkpointer.save(3, state)
    found, lines = restore(tmp_path, abstract)
    assert_same_bits(found, state)
    assert len(lines) == 1 and "step 2 is unfinished" in lines[0]
    assert step_folder.complete_steps(epath.Path(tmp_path / "checkpoints")) == [1, 3]
