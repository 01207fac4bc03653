"""Images without labels: all those below a folder, or one file."""

import os
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import numpy as np

from big_vision_lite.data.ops import UndecodableImage
from big_vision_lite.data.sources.listing import (
    SUFFIXES,
    Skipped,
    check_folder,
    list_images,
)

Example = dict[str, Any]


class ImageFiles:
    """A source of all images below a folder, or of one image file.

    `files` are sorted paths relative to `root`. An example is {"image": the file's
    bytes, "index": its place in `files`}; `skipped` counts the other files by kind.
    Raises FileNotFoundError for a wrong path, ValueError for a folder without images.
    """

    class_names: tuple[str, ...] = ()
    fingerprint: str = ""

    def __init__(self, path: str):
        given = pathlib.Path(path).expanduser()
        self.skipped = Skipped()
        if given.is_file():
            self.root, self._paths = given.parent, [given.name]
        else:
            check_folder(given)
            found = list_images(given, self.skipped, labelled=False)
            self.root, self._paths = given, found.get("", [])
            # Nobody would expect these among the images.
            for kind in ("hidden", "links to a folder above"):
                del self.skipped[kind]
        if not self._paths:
            there = sorted(p.name for p in given.iterdir())[:5]
            raise ValueError(
                f"{given} holds no images ({', '.join(SUFFIXES)}); it holds "
                f"{', '.join(there) or 'nothing'}."
            )
        # File names are bytes, not always UTF-8.
        self.files = tuple(
            os.fsencode(name).decode("utf-8", "replace") for name in self._paths
        )

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: SupportsIndex) -> Example:
        path = self.root / self._paths[index]
        return {"image": path.read_bytes(), "index": index.__index__()}

    def name(self, index: SupportsIndex) -> str:
        """Returns the path of an example, for messages."""
        return os.fsencode(self.root / self._paths[index]).decode("utf-8", "replace")


class Guarded:
    """Runs several ops as one, and records in `errors` {index: reason} what they raise.

    Their ValueError becomes UndecodableImage, for which the pipeline skips the image.
    """

    def __init__(self, ops: Sequence[Callable[..., Example]]):
        self.errors: dict[int, str] = {}
        self._ops = tuple(ops)
        self._lock = threading.Lock()

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        index = example["index"]
        try:
            for op in self._ops:
                example = op(example, rng)
        except ValueError as error:
            with self._lock:
                self.errors[index] = str(error)
            raise UndecodableImage(str(error)) from error
        return example
