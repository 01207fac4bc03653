"""Writes files atomically: a kill leaves the old or the new file, complete."""

import contextlib
import csv
import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from etils import epath

# Bytes of a file's name on nearly all file systems.
LONGEST_NAME = 255


def is_remote(path: epath.Path) -> bool:
    """Returns whether `path` is in an object store, without appends and locks."""
    return "://" in os.fspath(path)


def absolute(path: str | epath.Path) -> epath.Path:
    """Returns a local path as absolute, with ~ expanded; a remote one unchanged.

    Raises:
        ValueError: its name is not UTF-8, or it is a link to itself.
    """
    check_name(path)
    given = epath.Path(path)
    if is_remote(given):
        return given
    try:
        return given.expanduser().resolve()
    except RuntimeError as error:  # Python 3.13 has no such case
        raise ValueError(
            f"{path} is a link that leads to itself; remove it, or name another path."
        ) from error


def check_name(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a name that config.json and checkpoints cannot hold."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{os.fsencode(path)!r} is a name that is not UTF-8, which no run can "
            "record; rename it, or give a copy another name."
        ) from error


def is_writable(folder: epath.Path) -> bool:
    """Returns whether `folder` is writable; a remote one is assumed to be."""
    return is_remote(folder) or os.access(folder, os.W_OK)


def make_folder(path: epath.Path) -> None:
    """Makes a writable folder, parents included.

    Raises:
        OSError: it cannot be made or written in.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not is_writable(path):
            raise PermissionError("it is read-only")
    except OSError as error:
        raise OSError(
            f"Cannot write {path}: {error.strerror or error}. Use another --workdir or "
            "free the disk."
        ) from error


def replace(path: epath.Path, content: bytes | str) -> None:
    """Writes a file, replacing the old one atomically; encodes text as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        file.write(data)
        if not is_remote(path):
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


def _temporary(path: epath.Path) -> epath.Path:
    name = f".{path.name}.new"
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.new"
    return path.parent / name


def check_output(path: epath.Path) -> None:
    """Checks before the work that `replace` can write `path`; makes its folder.

    Raises:
        OSError, ValueError: it is a folder, a pipe or a device, or cannot be written.
    """
    if is_remote(path):
        return
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it.")
    # epath calls all a file that is no folder.
    if path.exists() and not os.path.isfile(path):
        raise ValueError(f"{path} is a pipe or a device; name a file.")
    try:
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise OSError(f"its name has more than {LONGEST_NAME} bytes")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Asked of the file system: for root, a read-only disk is writable otherwise.
        _temporary(path).write_bytes(b"")
        _temporary(path).unlink()
    except OSError as error:
        raise OSError(
            f"Cannot write {path}: {error.strerror or error}. Checked at the start, "
            "nothing was computed. Name another file, or free the folder."
        ) from error


def check_new_folder(path: pathlib.Path) -> None:
    """Checks before the work that a new folder can be made at `path`.

    Raises:
        OSError, ValueError: something is there, or it cannot be written.
    """
    check_name(path)
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to nothing; name a new folder with --out.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is no folder; name a new folder with --out.")
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; name a new folder with --out.")
    # The weights are written beside it first, under a longer name.
    check_output(epath.Path(path.parent) / f".{path.name}.unfinished")


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    r"""Returns rows as CSV with "\n" after each, quoted alike by every Python.

    Before 3.13 the module quotes "\r" only if it is a part of the line's end.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    lines = []
    for row in rows:
        writer.writerow(row)
        lines.append(text.getvalue().removesuffix("\r\n") + "\n")
        text.seek(0)
        text.truncate()
    return "".join(lines)


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """Adds `path` and advice to an OSError raised inside the context.

    Raises:
        OSError: the disk is full, read-only or gone.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Could not write {path}: {error.strerror or error}. Free disk space or "
            "mend the folder; the same command continues from the last checkpoint."
        ) from error


class AppendOnlyFile:
    """An unbuffered local file that grows by whole records.

    Raises:
        OSError: it cannot be written; what was added before stays.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        with writing(path):
            # Unbuffered: closing does not retry a write that a full disk refused.
            self._file = open(os.fspath(path), "ab", buffering=0)  # noqa: SIM115

    def add(self, record: bytes) -> None:
        with writing(self._path):
            while record:  # a nearly full disk takes only a part
                record = record[self._file.write(record) :]

    def close(self) -> None:
        with writing(self._path):
            self._file.close()
