"""Paths: local ones in full, remote ones as they were given."""

import csv
import io
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


ODD_ROWS = [["a", "b\rc"], ["d\n", 'e"f'], ["g,h", ""], [" i", "\r\n"], ["ü", "%"]]


def test_tables_are_quoted_alike_by_every_python():
    text = files.csv_text(ODD_ROWS)
    assert text.startswith('a,"b\rc"\n"d\n","e""f"\n"g,h",\n')
    assert list(csv.reader(io.StringIO(text, newline=""))) == ODD_ROWS


@pytest.mark.parametrize("name", ["plain.csv", "x" * 251 + ".csv"])
def test_what_can_be_written_is_checked_without_a_trace(tmp_path, name):
    path = epath.Path(tmp_path) / "new" / name
    files.check_output(path)
    assert list((tmp_path / "new").iterdir()) == []
    files.replace(path, "content")
    files.check_output(path)
    assert [p.name for p in (tmp_path / "new").iterdir()] == [name]
    assert path.read_text() == "content"


def test_what_cannot_be_written_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for path, error, said in (
        (tmp_path, ValueError, "is a folder"),
        (tmp_path / "pipe", ValueError, "is a pipe or a device"),
        ("/dev/null", ValueError, "is a pipe or a device"),
        (tmp_path / "file" / "below", OSError, "nothing was computed"),
        (tmp_path / ("x" * 256), OSError, "more than 255 bytes"),
        ("/proc/below", OSError, "nothing was computed"),
    ):
        with pytest.raises(error, match=said):
            files.check_output(epath.Path(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pipe"]
