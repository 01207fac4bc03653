"""Atomic file writes: a kill leaves the old or the new file, complete."""

import contextlib
import os
from collections.abc import Iterator

from etils import epath


def is_remote(path: epath.Path) -> bool:
    """Returns whether `path` is in an object store, without appends and locks."""
    return "://" in os.fspath(path)


def absolute(path: str | epath.Path) -> epath.Path:
    """Returns a local path in full, ~ being the home folder; a remote one as it is."""
    given = epath.Path(path)
    return given if is_remote(given) else given.expanduser().resolve()


def is_writable(folder: epath.Path) -> bool:
    """Returns whether `folder` is writable; a remote one is assumed to be."""
    return is_remote(folder) or os.access(folder, os.W_OK)


def make_folder(path: epath.Path) -> None:
    """Makes a folder in which files can be written, parents included.

    Raises:
        OSError: it cannot be; says what to type.
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
    """Writes a file in one move; text is written as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.parent / f".{path.name}.new"
    with temporary.open("wb") as file:
        file.write(data)
        if not is_remote(path):
            file.flush()
            os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[None]:
    """Names `path`, and what to do, where the system gives an error number alone.

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
    """A local file that grows by whole records; nothing waits in a buffer.

    Raises:
        OSError: it cannot be written; what was added before stays.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        with writing(path):
            # Unbuffered: what a full disk refused is not tried again on closing.
            self._file = open(os.fspath(path), "ab", buffering=0)  # noqa: SIM115

    def add(self, record: bytes) -> None:
        with writing(self._path):
            while record:  # a disk that is nearly full takes a part
                record = record[self._file.write(record) :]

    def close(self) -> None:
        with writing(self._path):
            self._file.close()
