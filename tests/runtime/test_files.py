"""Paths: local ones in full, remote ones as they were given."""

import os
import pathlib

import pytest
from etils import epath

from big_vision_lite.runs import step_folder
from big_vision_lite.runtime import files


def test_a_remote_path_stays_as_it_is():
    for given in ("gs://bucket/runs/x", "s3://bucket/~/x"):
        assert os.fspath(files.absolute(given)) == given
        assert files.is_remote(files.absolute(epath.Path(given)))


def test_a_local_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    assert files.absolute("runs/x") == epath.Path(tmp_path) / "runs" / "x"
    assert files.absolute("a/../b") == epath.Path(tmp_path) / "b"
    assert os.fspath(files.absolute("~/runs/x")) == "/home/ada/runs/x"


def test_a_checkpoint_is_looked_for_where_it_was_said(tmp_path, monkeypatch):
    # What a remote path must not become: a local folder of that name.
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        step_folder.files, "absolute", lambda path: seen.append(path) or epath.Path("x")
    )
    with pytest.raises(FileNotFoundError, match="gs://bucket/x"):
        step_folder.find("gs://bucket/x")
    assert seen == ["gs://bucket/x"]


def test_nobody_resolves_paths_in_another_way():
    # resolve() makes gs://bucket/x a folder of the working directory.
    root = pathlib.Path(__file__).parents[2] / "big_vision_lite"
    found = [
        path.name
        for path in root.rglob("*.py")
        if ".resolve()" in path.read_text() and path != root / "runtime" / "files.py"
    ]
    assert found == []


def test_a_remote_folder_is_not_taken_for_a_read_only_one(tmp_path):
    assert files.is_writable(epath.Path("gs://bucket/runs"))
    assert files.is_writable(epath.Path(tmp_path))
    assert not files.is_writable(epath.Path(tmp_path / "nowhere"))
