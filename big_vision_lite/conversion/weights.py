"""The content of a file of another library, before its format is known."""

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

    `arrays` as stored, without the wrappers that checkpoints of training scripts add.
    `config` and `preprocessor` are the config.json and preprocessor_config.json beside
    them, {} where there are none. `path` is what messages name. `part` is the part of
    the file that was asked for, "" where it has none of that name; `assumptions` say
    what was taken and what was left.
    """

    arrays: Mapping[str, np.ndarray]
    path: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    preprocessor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    part: str = ""
    assumptions: tuple[Assumption, ...] = ()

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """Returns the shape of an array that a model cannot be without.

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
        """Reads sizes off shapes in words: {"stem.weight": "width channels 7 7"}.

        Returns {word: size}. "_" is any size, a number must be that size, and a word
        means one size wherever it stands.

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
        """Counts blocks that names number from 0; the pattern's group is the number."""
        numbers = (re.match(pattern, name) for name in self.arrays)
        return 1 + max((int(found[1]) for found in numbers if found), default=-1)

    def units(self, pattern: str) -> tuple[int, ...]:
        """Counts the units of every stage; the pattern's groups are stage and unit.

        Gaps are filled: what is missing there is then reported by name.
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
        """Returns a head of as many classes as a weight has, None without it."""
        if name not in self.arrays:
            return None
        return Classifier(num_classes=self.sizes({name: shape})["classes"])
