"""What an evaluator returns is recorded as plain numbers, or refused by name."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite.runs.scores import named_scores


def named(scores):
    return named_scores(lambda state: scores, None, "val_ema")


@pytest.mark.parametrize(
    "value, expected",
    [
        (np.int64(7), 7),
        (np.float32(0.5), 0.5),
        (np.bool_(True), 1),
        (np.array(3, np.uint8), 3),
        (jnp.float32(0.25), 0.25),
        (jnp.bfloat16(0.25), 0.25),
        (3, 3),
        (2.5, 2.5),
    ],
)
def test_numbers_of_any_library_become_those_of_python(value, expected):
    found = named({"score": value})
    assert found == {"val_ema/score": expected}
    assert type(found["val_ema/score"]) is type(expected)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize(
    "value, message",
    [
        (math.nan, r'"bad" is nan \(float\)'),
        (np.float32(-np.inf), r'"bad" is -inf \(float32\)'),
        (np.zeros(3), r'"bad" is an array of shape \(3,\)'),
        (jnp.zeros((1,)), r'"bad" is an array of shape \(1,\)'),
        (1j, r'"bad" is 1j \(complex\)'),
        ("0.5", r'"bad" is 0.5 \(str\)'),
        (None, r'"bad" is None \(NoneType\)'),
        ({"a": 1}, r"'a': 1\} \(dict\)"),
    ],
)
def test_what_is_no_finite_number_is_refused_by_name(value, message):
    with pytest.raises(ValueError, match=rf"val_ema: .*{message}") as error:
        named({"good": 1.0, "bad": value, "worse": None})
    assert '"worse"' in str(error.value) and '"good"' not in str(error.value)


@pytest.mark.parametrize("scores", [None, 0.5, [0.5], {"": 0.5}, {3: 0.5}])
def test_scores_without_a_name_are_refused(scores):
    with pytest.raises(ValueError, match="val_ema: .*name"):
        named(scores)
