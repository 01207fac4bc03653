"""Compilers of devices that are not there stay out of sight, and out of the output."""

import os
import pathlib
import subprocess
import sys

import pytest
from tiers import few

from big_vision_lite.runtime import plugins

pytestmark = pytest.mark.compilers

COMPILERS = (*plugins.CUDA_WHEELS, *plugins.CUDA_PLUGINS, "libtpu")
needs_compilers = pytest.mark.skipif(
    not plugins.compilers_installed(), reason="needs pip install -e '.[plan]'"
)
# Python finds no module of these names, as if they were not installed.
UNINSTALL = """
import sys
class Uninstalled:
    def find_spec(self, name, path=None, target=None):
        if name in NAMES:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Uninstalled())
import jax_plugins
jax_plugins.__path__ = []
import importlib.metadata as m
found = m.entry_points
m.entry_points = lambda **k: () if k.get("group") == "jax_plugins" else found(**k)
"""
COMMAND = """
import runpy, sys
sys.argv = ["train", *sys.argv[1:]]
runpy.run_module("big_vision_lite.MODULE", run_name="__main__", alter_sys=True)
"""


def bare_environment() -> dict[str, str]:
    """Leaves out what the tests have set, and JAX itself: TPU_LIBRARY_PATH."""
    left = {n: v for n, v in os.environ.items() if not n.startswith(("JAX_", "TPU_"))}
    return left | {"JAX_COMPILATION_CACHE_DIR": ""}


def output(module: str, installed: bool, *words: str) -> tuple[int, str]:
    code = "" if installed else UNINSTALL.replace("NAMES", repr(COMPILERS))
    ended = subprocess.run(
        [sys.executable, "-c", code + COMMAND.replace("MODULE", module), *words],
        capture_output=True,
        text=True,
        env=bare_environment(),
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


@needs_compilers
@pytest.mark.parametrize("module", few(["train", "evaluate", "predict"], "evaluate"))
def test_with_the_compilers_installed_not_one_line_more_is_printed(module, tmp_path):
    root = str(pathlib.Path(__file__).parents[2])
    words = {
        "train": (
            f"--config={root}/configs/quickstart.py",
            "--config.platform=none",
            "--config.model.width=8",
            f"--workdir={tmp_path}",
            "--dry_run",
        ),
        "evaluate": (f"--workdir={tmp_path}/nothing",),
        "predict": (f"--workdir={tmp_path}/nothing", "--images=x", "--out=y.csv"),
    }[module]
    shown = [output(module, installed, *words) for installed in (True, False)]
    with_them, without = (
        (code, [line for line in text.splitlines() if "trace is in" not in line])
        for code, text in shown
    )
    assert with_them == without
    assert len(without[1]) > 0


@needs_compilers
def test_the_default_platform_of_a_machine_without_devices_is_cpu_in_silence():
    code = "import big_vision_lite, jax; print(jax.devices()[0].platform)"
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=bare_environment(),
        check=True,
    )
    assert (ended.stdout, ended.stderr) == ("cpu\n", "")


@pytest.mark.parametrize(
    ("path", "nvidia", "tpu"),
    [
        ("dev/nvidia0", True, False),
        ("dev/dxg", True, False),
        ("proc/driver/nvidia", True, False),
        ("dev/accel0", False, True),
        ("dev/vfio/0", False, True),
        ("dev/null", False, False),
    ],
)
def test_devices_are_known_by_their_files(tmp_path, path, nvidia, tpu):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).touch()
    assert plugins.has_nvidia(tmp_path) == nvidia
    assert plugins.has_tpu(tmp_path) == tpu


def test_a_process_that_has_imported_jax_already_is_left_alone(monkeypatch, tmp_path):
    before = dict(sys.modules)
    plugins.hide_without_devices(tmp_path)
    assert sys.modules == before
