"""ruff finds nothing, CI asks the type checker too, nothing names what is elsewhere."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = (("ruff", "check"), ("ruff", "format", "--check"))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_code_is_clean(command):
    program = pathlib.Path(sys.executable).parent / command[0]
    found = subprocess.run(
        [program, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-500:]


def test_ci_runs_the_linters_and_the_type_checker():
    ci = (ROOT / ".ci" / "run").read_text().replace('"', "")
    for words in (*COMMANDS, ("basedpyright", "--level", "error")):
        assert f"\n$bin/{' '.join(words)}" in ci, words


def test_every_document_that_is_named_is_in_the_repository():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    assert listed
    kinds = (".py", ".md", ".toml", ".sh", "run")
    texts = {p: ROOT / p for p in listed if p.endswith(kinds) and (ROOT / p).exists()}
    missing = [
        f"{path}: {name}"
        for path, file in texts.items()
        for name in re.findall(r"[\w./-]+\.md\b", file.read_text())
        if not (ROOT / name).exists()
    ]
    assert not missing, missing
