"""Images without labels: all those below a folder, or one file."""

import errno
import functools
import os
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import numpy as np

from big_vision_lite.data.ops import UndecodableImage
from big_vision_lite.data.sources import contents, file_kinds
from big_vision_lite.data.sources.contents import LeftOut
from big_vision_lite.data.sources.tfds.records import with_retries

Example = dict[str, Any]
# Errors of a path that time does not mend.
_LASTING = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)


class ImageFiles:
    """A source of all images below a folder, or of one image file.

    `files` are paths relative to `root`, sorted, as `contents.written` writes them;
    those that are images by their names alone (links to nothing, pipes) and folders
    that cannot be opened are among them. An example is {"image": the file's bytes,
    "index": its place among them}, or an OSError; `left_out` is what else is there.
    Raises OSError for a wrong path, ValueError for a folder without images.
    """

    class_names: tuple[str, ...] = ()
    fingerprint: str = ""

    def __init__(self, path: str):
        given = pathlib.Path(path).expanduser()
        self.left_out = LeftOut()
        self._faults: dict[str, str] = {}
        if os.path.isfile(given):
            self.root, self._paths = given.parent, [given.name]
        else:
            contents.check_folder(given)
            found = contents.list_images(given, self.left_out, labelled=False)
            prefix = len(os.path.join(given, ""))
            faults = self.left_out.faults.items()
            self._faults = {path[prefix:]: reason for path, (_, reason) in faults}
            self.root = given
            self._paths = sorted([*found.get("", []), *self._faults])
        if not self._paths:
            there = sorted(contents.written(name) for name in os.listdir(given))[:5]
            raise ValueError(
                f"{given} holds no images ({', '.join(file_kinds.SUFFIXES)}); it holds "
                f"{', '.join(there) or 'nothing'}."
            )
        self.files = tuple(map(contents.written, self._paths))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: SupportsIndex) -> Example:
        path = self._paths[index]
        if path in self._faults:
            raise OSError(self._faults[path])
        data = _read(os.path.join(self.root, path))
        return {"image": data, "index": index.__index__()}

    def name(self, index: SupportsIndex) -> str:
        """Returns the path, for messages."""
        return contents.written(os.path.join(self.root, self._paths[index]))


def _read(path: str) -> bytes:
    try:
        return contents.read_file(path)
    except OSError as error:
        if error.errno in _LASTING:
            raise OSError(f"it cannot be opened: {error.strerror}") from error
    return with_retries(functools.partial(contents.read_file, path), path)


class Guarded:
    """A source and the ops on it, which note what they refuse in `errors`.

    {index: reason}: a file that cannot be opened or does not fit the ops is then one
    that cannot be read, not the end. As a source it gives examples; as an op it calls
    the ops.
    """

    def __init__(self, source: Any, ops: Sequence[Callable[..., Example]]):
        self.errors: dict[int, str] = {}
        self.class_names: tuple[str, ...] = source.class_names
        self.fingerprint: str = source.fingerprint
        self._source = source
        self._ops = tuple(ops)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> Example:
        try:
            return self._source[index]
        except OSError as error:
            raise self._noted(index.__index__(), error) from error

    def name(self, index: SupportsIndex) -> str:
        """Returns the name of an example, for messages."""
        return self._source.name(index)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        index = example["index"]
        try:
            for op in self._ops:
                example = op(example, rng)
        except ValueError as error:
            raise self._noted(index, error) from error
        return example

    def _noted(self, index: int, error: Exception) -> UndecodableImage:
        with self._lock:
            self.errors[index] = str(error)
        return UndecodableImage(str(error))
