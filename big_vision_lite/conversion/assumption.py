"""What weights do not say of themselves and was taken: said, and recorded."""

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any


class About(enum.Enum):
    """What an assumption is about."""

    PART = "part of the file"
    ARCHITECTURE = "architecture"
    PREPROCESSING = "preprocessing"
    VALUE_RANGE = "value range"
    LOGITS = "meaning of logits"
    CLASSES = "classes"


@dataclasses.dataclass(frozen=True)
class Assumption:
    """One thing that was taken, in a sentence: what, why, what to type if it is not so.

    Opening weights gathers these. They are printed once, stand in the manifests of runs
    that begin with the weights, and in the parity.txt of exports.
    """

    about: About
    words: str

    def __str__(self) -> str:
        return f"{self.about.value}: {self.words}"


def of_architecture(*words: str) -> tuple[Assumption, ...]:
    """Returns assumptions about the architecture, one for each sentence."""
    return tuple(Assumption(About.ARCHITECTURE, each) for each in words)


def to_record(assumptions: Iterable[Assumption]) -> list[dict[str, str]]:
    """Returns assumptions as JSON values, for manifests."""
    return [{"about": each.about.value, "words": each.words} for each in assumptions]


def from_origin(origin: Mapping[str, Any] | None) -> tuple[Assumption, ...]:
    """Returns all assumptions in the origin that a manifest records, oldest first."""
    if not origin:
        return ()
    found = from_origin(origin.get("origin"))
    for part in origin.get("parts", ()):
        found += from_origin(part)
    own = origin.get("assumptions", ())
    return (*found, *(Assumption(About(a["about"]), a["words"]) for a in own))
