"""What is installed is all of the package: a folder without __init__.py vanishes."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
IMPORT_ALL = """
import importlib, pkgutil, big_vision_lite
for module in pkgutil.walk_packages(big_vision_lite.__path__, "big_vision_lite."):
    importlib.import_module(module.name)
    print(module.name)
"""


@pytest.mark.slow
def test_every_module_is_in_the_wheel_and_can_be_imported(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    found = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        env=dict(os.environ, PYTHONPATH=str(installed)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    package = ROOT / "big_vision_lite"
    there = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in package.rglob("*.py")
        if path.stem != "__init__"
    }
    assert there <= set(found)
