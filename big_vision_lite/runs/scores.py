"""Checks an evaluator's numbers: its interval, its batch size and its scores."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from big_vision_lite.types import Runner


def check_fields(evaluator: Any) -> None:
    """Checks `every_steps` and each batch size of an evaluator, a dataclass.

    Raises:
        ValueError: `every_steps` is below 0, or a batch size below 1.
    """
    sizes = [
        field.name
        for field in dataclasses.fields(evaluator)
        if field.name.endswith("batch_size")
    ]
    values = {name: getattr(evaluator, name) for name in ("every_steps", *sizes)}
    if values["every_steps"] < 0 or any(values[name] < 1 for name in sizes):
        given = ", ".join(f"{name}={value}" for name, value in values.items())
        starts = "".join(f"{name} starts at 1, " for name in sizes)
        raise ValueError(
            f"{type(evaluator).__name__}({given}): {starts}every_steps at 1, and 0 "
            "switches the evaluator off."
        )


def named_scores(runner: Runner, state: Any, name: str) -> dict[str, float | int]:
    """Runs an evaluator; returns its scores named "`name`/<score>", as float or int.

    Scores may be numbers of Python, numpy or JAX.

    Raises:
        ValueError: a score is no finite real number; names every such score.
    """
    found: Any = runner(state)
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{name}: the evaluator returned {type(found).__name__}; return its "
            'scores by name, for example {"accuracy": 0.9}.'
        )
    numbers = {score: _number(value) for score, value in found.items()}
    wrong = [
        f'"{score}" is {_described(found[score])}'
        for score, number in numbers.items()
        if number is None or not isinstance(score, str) or not score
    ]
    if wrong:
        raise ValueError(
            f"{name}: {', '.join(wrong)}. A score is one finite real number under a "
            "name; leave out what is not defined. If the loss is not finite, lower the "
            "learning rate or evaluate an earlier checkpoint."
        )
    return {f"{name}/{score}": x for score, x in numbers.items() if x is not None}


def _number(value: Any) -> float | int | None:
    """Returns the value as a float or int of Python, None if it is none or infinite."""
    array = np.asarray(value)
    if array.shape == () and array.dtype.kind == "V":  # bfloat16 and its like
        array = array.astype(np.float32)
    if array.shape != () or array.dtype.kind not in "biuf":
        return None
    number = float(array) if array.dtype.kind == "f" else int(array)
    return number if math.isfinite(number) else None


def _described(value: Any) -> str:
    shape = np.shape(value) if hasattr(value, "shape") else ()
    if shape:
        return f"an array of shape {shape}"
    text = str(value)
    return f"{text if len(text) < 40 else text[:37] + '...'} ({type(value).__name__})"
