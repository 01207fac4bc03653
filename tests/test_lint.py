"""ruff and pyright (basic) find nothing."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = (
    ("ruff", "check"),
    ("ruff", "format", "--check"),
    ("basedpyright", "--level", "error", "--pythonpath", sys.executable),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_the_code_is_clean(command):
    program = pathlib.Path(sys.executable).parent / command[0]
    found = subprocess.run(
        [program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-500:]
