"""Files that are the old one or the new one, whole, whenever the program is killed."""

import os

from etils import epath


def is_remote(path: epath.Path) -> bool:
    """Says whether `path` is in an object store, which has no appends and no locks."""
    return "://" in os.fspath(path)


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
