"""Which of many like cases run by default, and which only with -m slow."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest

SLOW = pytest.mark.slow
PUBLISHED = (pytest.mark.slow, pytest.mark.published)


def few(cases: Iterable[Any], *kept: Any, marks: Any = SLOW) -> list[Any]:
    """Returns parameters of which all but those `kept` are slow."""
    return [c if c in kept else pytest.param(c, marks=marks) for c in cases]


def crossed(first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """Returns all pairs: by default each value with the first of the others."""
    first, second = list(first), list(second)
    return [
        pytest.param(a, b, marks=() if a == first[0] or b == second[0] else SLOW)
        for a, b in itertools.product(first, second)
    ]
