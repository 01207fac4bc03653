"""Finds a source's classes among the model's, by name."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from big_vision_lite.messages import some


@dataclasses.dataclass(kw_only=True)
class ClassTable:
    """A label mapping: `indices[c]` is the model's label of the source's class c."""

    indices: Int32[np.ndarray, " classes"]
    message: str | None

    @property
    def is_identity(self) -> bool:
        """Returns whether every class has the same label on both sides."""
        return np.array_equal(self.indices, np.arange(len(self.indices)))


def class_table(
    theirs: Sequence[str],
    ours: Sequence[str],
    *,
    name: str,
    ours_is: str,
    in_order: str | None = None,
) -> ClassTable:
    """Returns the labels in `ours` of the classes `theirs`, matched by class name.

    Matching by number would give wrong labels without an error if a class is missing
    or the order differs. In messages `name` and `ours_is` name the two sides, and
    `in_order` the option that matches by number.

    Raises:
        ValueError: the source has a class that `ours` lacks, or names are ambiguous.
    """
    if tuple(theirs) == tuple(ours):
        return ClassTable(indices=np.arange(len(ours), dtype=np.int32), message=None)
    hint = ""
    if in_order is not None:
        hint = f" Where only the names differ and not the order: {in_order}"
    for whose, names in ((name, theirs), (ours_is, ours)):
        twice = sorted({n for n in names if list(names).count(n) > 1})
        if twice:
            raise ValueError(
                f"{whose} has classes of the same name ({some(twice)}), so that "
                f"those of {name} cannot be told apart; give every class its own name."
                + hint
            )
    number = {class_name: index for index, class_name in enumerate(ours)}
    unknown = [n for n in theirs if n not in number]
    if unknown:
        raise ValueError(
            f"{name} has {len(unknown)} classes unknown to {ours_is}: "
            f"{some(unknown)}. It knows {len(ours)}: {some(ours)}. Rename the "
            f"classes, or take them out of {name}." + hint
        )
    missing = [n for n in ours if n not in set(theirs)]
    message = None
    if missing:
        message = (
            f"{name} has {len(theirs)} of the {len(ours)} {ours_is} classes (missing: "
            f"{some(missing)}) - indices follow {ours_is}."
        )
    indices = np.array([number[n] for n in theirs], np.int32)
    return ClassTable(indices=indices, message=message)
