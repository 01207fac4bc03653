"""What is settled before JAX looks at its devices, on machines that are only faked."""

import functools
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import pytest
from etils import epath

from big_vision_lite import evaluate, predict
from big_vision_lite.recipes import command_line
from big_vision_lite.runs import folder as run_folder
from big_vision_lite.runs import integrity, load
from big_vision_lite.runtime import processes, startup
from big_vision_lite.runtime.startup import Platform

DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\n"
    "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"
)
LAUNCHERS = ("SLURM_", "TPU_", "CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS", "XLA_FLAGS")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    """Takes away what the launcher of the tests themselves may have left."""
    # Joining sets it; what is changed here is put back after the test.
    monkeypatch.setenv("PJRT_NPROC", "")
    monkeypatch.delenv("PJRT_NPROC")
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)


@pytest.fixture
def updates(monkeypatch) -> dict:
    """Collects changes of JAX's settings instead of making them."""
    made = {}
    monkeypatch.setattr(jax.config, "update", made.__setitem__)
    return made


@pytest.fixture
def joined(monkeypatch, updates) -> list[dict]:
    """Collects the calls of jax.distributed.initialize instead of making them."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: calls.append(kw))
    monkeypatch.setattr(startup, "_on_tpu_vm", lambda: False)
    return calls


def fake_gpu(tmp_path: pathlib.Path) -> pathlib.Path:
    version = tmp_path / "driver" / "nvidia" / "version"
    version.parent.mkdir(parents=True)
    version.write_text(DRIVER)
    return tmp_path


# By faked device files.


def test_an_idle_gpu_is_refused_with_the_install_command(tmp_path):
    with pytest.raises(ValueError) as error:
        startup.check_not_idle("--config.platform", fake_gpu(tmp_path))
    message = str(error.value)
    assert "driver 580.65.06" in message
    assert f"JAX {jax.__version__} was installed for CPU only" in message
    assert "pip install -e '.[cuda]'" in message
    assert "--config.platform=cpu" in message


def test_a_machine_without_a_gpu_trains_on_its_cpu(tmp_path):
    startup.check_not_idle("--config.platform", tmp_path)


def test_a_gpu_that_jax_uses_is_fine(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    startup.check_not_idle("--config.platform", fake_gpu(tmp_path))


@pytest.mark.parametrize("by", ["recipe", "environment", "nobody"])
def test_a_cpu_chosen_on_purpose_is_not_questioned(joined, monkeypatch, by):
    asked = []
    monkeypatch.setattr(startup, "check_not_idle", lambda _: asked.append(True))
    if by == "environment":
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    startup.set_up(Platform.CPU if by == "recipe" else None)
    assert asked == ([True] if by == "nobody" else [])


@pytest.mark.parametrize(
    ("platform", "name"), [("cpu", "cpu"), ("gpu", "cuda"), ("tpu", "tpu")]
)
def test_the_platform_of_the_recipe_is_asked_of_jax(joined, updates, platform, name):
    startup.set_up(Platform(platform))
    assert updates["jax_platforms"] == name


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_platform_that_is_not_there_is_one_message(platform):
    program = (
        "import jax; from big_vision_lite.runtime import startup\n"
        "from big_vision_lite.runtime.startup import Platform\n"
        "startup._on_tpu_vm = lambda: False\n"
        f"try: startup.set_up(Platform('{platform}'), platform_flag='--platform')\n"
        "except ValueError as error: print(error)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={n: v for n, v in os.environ.items() if n != "JAX_PLATFORMS"},
        check=True,
    )
    assert f"--platform={platform}: JAX {jax.__version__} finds no" in ended.stdout
    assert "There is: cpu, so --platform=cpu. If it has one: pip" in ended.stdout


def test_deterministic_adds_to_the_flags_of_xla(joined, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_of_the_user=1")
    startup.set_up(Platform.CPU, deterministic=True)
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_of_the_user=1",
        "--xla_gpu_deterministic_ops=true",
    ]


@pytest.fixture
def use(tmp_path, joined, monkeypatch, capsys):
    """Returns a function that uses a saved step beside a GPU that JAX cannot use.

    The command line runs up to the loading of the step; what it printed is returned.
    """
    fake = functools.partial(startup.check_not_idle, proc=fake_gpu(tmp_path))
    monkeypatch.setattr(startup, "check_not_idle", fake)

    def settled(*_, **__):
        raise ValueError("all set up")

    monkeypatch.setattr(load, "load", settled)

    def run(program, config: str, *flags: str) -> str:
        folder = tmp_path / "run" / "checkpoints" / "5"
        folder.mkdir(parents=True)
        (folder / integrity.MANIFEST).write_text("{}")
        (folder / "config.json").write_text(config)
        (folder / "image.png").write_bytes(b"")
        argv = ["program", f"--workdir={tmp_path / 'run'}", *flags]
        if program is predict:
            argv += [f"--images={folder}", f"--out={tmp_path / 'out.csv'}"]
        assert command_line.run(program.main, argv) == 1
        return capsys.readouterr().err

    return run


USERS = (predict, evaluate)


@pytest.mark.parametrize("program", USERS)
def test_a_run_trained_on_the_cpu_on_purpose_is_used_there(use, updates, program):
    assert "all set up" in use(program, '{"config": {"platform": "cpu"}}')
    assert updates["jax_platforms"] == "cpu"


@pytest.mark.parametrize("program", USERS)
@pytest.mark.parametrize("platform", ["null", '"gpu"', '"cp'])
def test_an_idle_gpu_is_told_in_the_spelling_of_the_program(
    use, updates, program, platform
):
    """Also where the run was on a GPU: it may be used elsewhere, but on purpose."""
    message = use(program, f'{{"config": {{"platform": {platform}}}}}')
    assert "on purpose: --platform=cpu" in message
    assert "jax_platforms" not in updates


@pytest.mark.parametrize("program", USERS)
def test_the_platform_of_the_flag_comes_before_the_runs(use, updates, program):
    config = '{"config": {"platform": "cpu"}}'
    assert "all set up" in use(program, config, "--platform=gpu")
    assert updates["jax_platforms"] == "cuda"


@pytest.mark.parametrize("program", USERS)
def test_the_platform_of_the_environment_comes_before_the_runs(
    use, updates, monkeypatch, program
):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert "all set up" in use(program, '{"config": {"platform": "cpu"}}')
    assert "jax_platforms" not in updates


# The compile cache.


def test_compiled_programs_are_kept_in_the_home_folder(updates, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    startup.cache_compiled()
    home = pathlib.Path.home()
    assert updates["jax_compilation_cache_dir"] == str(
        home / ".cache" / "big_vision_lite" / "compiled"
    )


def test_the_environment_chooses_another_cache_or_none(updates, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "a b"))
    startup.cache_compiled()
    assert updates["jax_compilation_cache_dir"] == str(tmp_path / "a b")
    updates.clear()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    startup.cache_compiled()
    assert not updates


# Who joins whom; jax.distributed.initialize is replaced.


def test_one_process_joins_nobody(joined):
    startup.join(None, None, None)
    assert joined == []


@pytest.mark.parametrize(
    "flags",
    [
        ("host:1", None, None),
        ("host:1", 2, None),
        (None, 2, 0),
        ("host:1", None, 0),
    ],
)
def test_the_three_flags_go_together(joined, flags):
    with pytest.raises(ValueError, match="go together, for example --coordinator="):
        startup.join(*flags)
    assert joined == []


@pytest.mark.parametrize("flags", [("host", 2, 0), ("host:1", 2, 2), ("host:1", 2, -1)])
def test_flags_that_contradict_each_other_are_refused(joined, flags):
    with pytest.raises(ValueError, match="processes count from 0"):
        startup.join(*flags)
    assert joined == []


def test_flags_are_followed_whatever_a_launcher_left_behind(joined, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    startup.join("host:1234", 4, 1)
    (call,) = joined
    assert call["coordinator_address"] == "host:1234"
    assert (call["num_processes"], call["process_id"]) == (4, 1)
    assert call["cluster_detection_method"] == "deactivate"
    # Ours speaks before the one that ends the process in a stack trace.
    assert call["initialization_timeout"] > startup.JOIN_SECONDS
    assert call["heartbeat_timeout_seconds"] <= 60
    assert int(os.environ["PJRT_NPROC"]) >= 8


def slurm(monkeypatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("nodes", "visible", "all_gpus"),
    [
        ("4", "0,1,2,3,4,5,6,7", True),  # one task a node, all its GPUs
        ("1", "3", True),  # each task sees its own GPU, as number 0
        ("1", "0,1,2,3", False),  # tasks share what they see: one each
    ],
)
def test_slurm_tasks_join_and_use_the_gpus_that_are_theirs(
    joined, updates, monkeypatch, nodes, visible, all_gpus
):
    slurm(
        monkeypatch,
        SLURM_NTASKS="4",
        SLURM_PROCID="2",
        SLURM_NNODES=nodes,
        SLURM_STEP_NODELIST="node[1-4]",
        CUDA_VISIBLE_DEVICES=visible,
    )
    startup.join(None, None, None)
    assert len(joined) == 1
    assert "coordinator_address" not in joined[0]
    assert ("jax_cuda_visible_devices" in updates) == all_gpus


def test_slurm_without_srun_is_told_to_use_it(joined, monkeypatch):
    slurm(monkeypatch, SLURM_NTASKS="4", SLURM_PROCID="0")
    with pytest.raises(ValueError, match="not started by srun.*SLURM_NTASKS=1"):
        startup.join(None, None, None)
    assert joined == []


@pytest.mark.parametrize("tasks", [{"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}])
def test_one_slurm_task_or_an_interactive_shell_trains_alone(
    joined, monkeypatch, tasks
):
    slurm(monkeypatch, **tasks)
    if not tasks:
        slurm(monkeypatch, SLURM_NTASKS="4")
    startup.join(None, None, None)
    assert joined == []


def test_a_tpu_vm_joins_its_slice_unless_another_platform_is_chosen(
    joined, monkeypatch
):
    monkeypatch.setattr(startup, "_on_tpu_vm", lambda: True)
    startup.join(None, None, None, Platform.CPU)
    assert joined == []
    startup.join(None, None, None, None)
    startup.join(None, None, None, Platform.TPU)
    assert len(joined) == 2


@pytest.mark.parametrize("chip", ["accel0", "vfio/0"])
def test_a_tpu_vm_has_chips_and_their_library(tmp_path, monkeypatch, chip):
    import importlib.util

    installed = {"libtpu": object()}
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    assert not startup._on_tpu_vm(tmp_path)
    path = tmp_path / chip
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert startup._on_tpu_vm(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not startup._on_tpu_vm(tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS")
    installed.clear()
    assert not startup._on_tpu_vm(tmp_path)


def test_a_failed_join_says_who_where_and_what_to_type(monkeypatch, updates):
    def initialize(**unused):
        raise RuntimeError("Failed to start RPC server")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="process 0 of 2 at host:1.*RPC server.*--coo"):
        startup.join("host:1", 2, 0)


def test_a_process_that_waits_alone_says_so_and_gives_up():
    # A real one: it is the library's silence that is tested.
    code = (
        "from big_vision_lite.runtime import startup\n"
        "startup.REMIND_SECONDS, startup.JOIN_SECONDS = 0.5, 2\n"
        "startup.join('localhost:1', 2, 1)\n"
    )
    waited = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert waited.returncode == 1, waited.stderr
    assert "Waiting for the other processes: this is process 1 of 2" in waited.stdout
    assert "error: no sign in 2 s" in waited.stderr
    assert "command running on every host" in waited.stderr
    assert "localhost:1 is this host alone" in waited.stderr


# What one process alone may rely on.


def test_alone_the_first_process_is_all_processes():
    assert processes.on_first(lambda: {"step": 3}) == {"step": 3}
    assert processes.gather(True, 2.5) == [(1.0, 2.5)]
    with pytest.raises(OSError, match="full"):
        processes.on_first(lambda: (_ for _ in ()).throw(OSError("full")))


def test_alone_errors_and_exit_codes_stay_what_they_are():
    with pytest.raises(ValueError, match="Gloo"), processes.named_losses():
        raise ValueError("Gloo AllGather failed")
    assert processes.run(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        processes.run(lambda: 1 // 0)


def test_a_lost_process_is_said_in_words(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with (
        pytest.raises(
            processes.OtherProcessFailed, match="process 0 of 2 lost another"
        ),
        processes.named_losses(),
    ):
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")


def test_a_folder_that_not_all_processes_see_is_refused(tmp_path, monkeypatch):
    recipe = pathlib.Path(__file__).parents[1] / "recipes" / "digits_spread.py"
    config = runpy.run_path(str(recipe))["get_config"]()
    monkeypatch.setattr(processes, "gather", lambda seen: [(seen,), (1.0,), (0.0,)])
    with (
        pytest.raises(OSError, match="not there for process 2.*--workdir=gs://"),
        run_folder.RunFolder(epath.Path(tmp_path) / "run", config),
    ):
        pass
