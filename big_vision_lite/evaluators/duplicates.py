"""Images of an evaluation set that have a near duplicate among the training images."""

import csv
import dataclasses
import os
from pathlib import Path

from big_vision_lite.messages import some
from big_vision_lite.types import Example, Source

# The key of an example that says whether it has one.
MARK = "duplicate"
# The columns of a file of duplicates, which tools/find_duplicates.py writes.
COLUMNS = ("place", "image", "training_image", "likeness")


@dataclasses.dataclass(kw_only=True)
class Marked:
    """A source whose examples say by "duplicate" whether they are among `marked`."""

    source: Source
    marked: frozenset[int]

    @classmethod
    def read(cls, source: Source, path: str, evaluator: str) -> "Marked":
        """Marks the images that the rows of evaluators.`evaluator` in a file name.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no such file, was not made with this evaluator, or names
                images that the set does not have.
        """
        names = read_names(path, evaluator)
        known = {source.name(index): index for index in range(len(source))}
        strange = sorted(names - known.keys())
        if strange:
            raise ValueError(
                f"{evaluator}: {path} names {len(strange)} images that its set of "
                f"{len(source)} does not have: {some(strange, 3)}. Make it again with "
                f"this recipe: {_command(path)}"
            )
        return cls(source=source, marked=frozenset(known[name] for name in names))

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return {**self.source[index], MARK: index in self.marked}

    def name(self, index: int) -> str:
        """Returns the origin of example `index`."""
        return self.source.name(index)


def read_names(path: str, evaluator: str) -> frozenset[str]:
    """Returns the images of an evaluator's set that a file of duplicates names."""
    place = Path(os.path.expanduser(path))
    if not place.is_file():
        raise FileNotFoundError(
            f"{evaluator}: there is no file of duplicates {path}; make it: "
            f"{_command(path)}"
        )
    with place.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    if not lines or tuple(lines[0]) != COLUMNS:
        raise ValueError(
            f"{evaluator}: {path} does not begin with the columns {','.join(COLUMNS)}; "
            f"make it again: {_command(path)}"
        )
    # A place without a duplicate has a line of its own, so that a set that was not
    # looked at is not taken for one without.
    where = f"evaluators.{evaluator}.source"
    found = [line for line in lines[1:] if line[0] == where]
    if not found:
        there = dict.fromkeys(line[0] for line in lines[1:])
        raise ValueError(
            f"{evaluator}: {path} says nothing of {where}, only of {some(there)}; make "
            f"it again with this recipe: {_command(path)}"
        )
    return frozenset(line[1] for line in found if line[1])


def _command(path: str) -> str:
    return f"python tools/find_duplicates.py --config RECIPE --out {path}"
