"""Holds the content of a file of another library, before its format is known."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from big_vision_lite import trees
from big_vision_lite.conversion import engine
from big_vision_lite.conversion.assumption import Assumption
from big_vision_lite.models.blocks.heads import Classifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """The content of a file or folder of another library, its format unknown.

    `arrays` have float32 for all floats, and names without the prefixes of training
    scripts. `config` and `preprocessor` are the config.json and
    preprocessor_config.json beside them, {} if absent. `path` is for messages. `part`
    is the part of the file that was asked for, "" where it has none of that name;
    `assumptions` say what was taken and what was left.
    """

    arrays: Mapping[str, np.ndarray]
    path: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preprocessor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    part: str = ""
    assumptions: tuple[Assumption, ...] = ()

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """Returns the shape of the array `name`, which must have `axes` axes.

        Raises:
            ValueError: it is missing, empty or has another number of axes; names it.
        """
        array = self.arrays.get(name)
        if array is not None and array.ndim == axes and array.size:
            return array.shape
        line = f"  + {name}  only in the model"
        if array is not None:
            line = f"  - {name} {trees.describe(array)}  must have {axes} axes"
            line += "" if array.size else " and cannot be empty"
        raise ValueError(engine.report(self.path, [line]))

    def sizes(self, shapes: Mapping[str, str]) -> dict[str, int]:
        """Returns {word: size} from shapes in words: {"stem.weight": "width _ 7 7"}.

        "_" is any size, a number must be that size, and a word is the same size
        everywhere.

        Raises:
            ValueError: an array is missing or has another shape; names it.
        """
        found: dict[str, int] = {}
        for name, text in shapes.items():
            words = text.split()
            shape = self.shape(name, len(words))
            for word, size in zip(words, shape, strict=True):
                known = int(word) if word.isdecimal() else found.get(word, size)
                if word != "_" and known != size:
                    wanted = ", ".join(str(found.get(w, w)) for w in words)
                    raise ValueError(
                        f"{self.path}: {name} is {shape}; here it is ({wanted})."
                    )
                found[word] = size
        return found

    def count(self, pattern: str) -> int:
        """Returns the number of blocks, counted from 0 by the pattern's group."""
        numbers = (re.match(pattern, name) for name in self.arrays)
        return 1 + max((int(found[1]) for found in numbers if found), default=-1)

    def units(self, pattern: str) -> tuple[int, ...]:
        """Returns the units of every stage; the pattern's groups are stage and unit.

        Gaps count, so that `engine.read` reports by name what is missing there.
        """
        found = (re.match(pattern, name) for name in self.arrays)
        places = {(int(each[1]), int(each[2])) for each in found if each}
        if not places:
            return ()
        (first_stage, _), (last_stage, _) = min(places), max(places)
        first = min(unit for _, unit in places)
        last = [
            max((unit for at, unit in places if at == stage), default=first)
            for stage in range(first_stage, last_stage + 1)
        ]
        return tuple(unit - first + 1 for unit in last)

    def head(self, name: str, shape: str = "classes _") -> Classifier | None:
        """Returns a head with the classes of the array `name`, None without it."""
        if name not in self.arrays:
            return None
        return Classifier(num_classes=self.sizes({name: shape})["classes"])
