"""ruff and pyright (basic) find nothing."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [("ruff", "check"), ("ruff", "format", "--check"), ("basedpyright", "--level", "error")],
    ids=" ".join,
)
def test_the_code_is_clean(command):
    folder = pathlib.Path(sys.executable).parent
    found = subprocess.run(
        [folder / command[0], *command[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-500:]
