"""Weight files of every format with one array missing, flat, a number or empty."""

import dataclasses
import re

import numpy as np
import pytest
from conversion_cases import CASES, WRITTEN
from tiers import crossed

from big_vision_lite.conversion import foreign, formats
from big_vision_lite.conversion.families import FORMATS
from big_vision_lite.conversion.weights import Weights

SIZE = (16, 16)
PATH = "folder/weights.file"
# In this order: by default each format meets the first damage, the first format all.
NAMES = sorted(WRITTEN)
DAMAGES = {
    "removed": None,
    "flat": lambda array: array.reshape(-1),
    "a number": lambda array: np.ones((), np.float32),
}
# Without one of these, the rest is another model of the same format, which is read.
OPTIONAL = re.compile("(img/)?(cls|pos_embedding)|(cls|reg)_token|pos_embed")


def written(name):
    """Returns random weights in the format of a name."""
    form = next(f for f in FORMATS if f.name == name)
    model, config = WRITTEN[name].ours, WRITTEN[name].config
    rng = np.random.default_rng(0)
    ours = {
        name: rng.uniform(0.5, 1, shape).astype(np.float32)
        for name, shape in formats.shapes(model, SIZE, 3).items()
    }
    arrays = formats.write(form, model, SIZE, ours)
    config = form.describe(model, SIZE, 3) if config is None else config
    return Weights(arrays=arrays, path=PATH, config=config)


def load(weights):
    form = foreign.recognise(weights)
    architecture = form.architecture(weights)
    size = architecture.image_size_px or SIZE
    return formats.load(weights, form, architecture, size)


def same(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name], expected[name]) for name in expected
    )


def test_every_format_is_tried():
    found = sorted(case.form for case in CASES.values() if case.ours is not None)
    assert found == sorted(form.name for form in FORMATS)


@pytest.mark.parametrize(("name", "kind"), crossed(NAMES, DAMAGES))
def test_one_damaged_array_is_refused_with_the_name_of_the_file(name, kind):
    whole = written(name)
    assert foreign.recognise(whole).name == name
    expected, damage = load(whole), DAMAGES[kind]
    wrong = {}
    for key, array in whole.arrays.items():
        arrays = dict(whole.arrays)
        if damage is None:
            del arrays[key]
        else:
            arrays[key] = damage(array)
        try:
            found = load(dataclasses.replace(whole, arrays=arrays))
        except ValueError as error:
            if not str(error).startswith(PATH):
                wrong[key] = str(error)
        except Exception as error:
            wrong[key] = repr(error)
        else:
            # Counters that no model reads; norms, which have several shapes.
            another = kind == "removed" and OPTIONAL.fullmatch(key)
            if not another and not same(found, expected):
                wrong[key] = "loads other numbers"
    assert not wrong, "\n".join(f"{k}: {v}" for k, v in wrong.items())


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (None, r"  \+ blocks\.0\.mlp\.fc1\.weight  only in the model\n"),
        (
            DAMAGES["flat"],
            r"  - blocks\.0\.mlp\.fc1\.weight \(1024,\) float32  must have 2 axes\n",
        ),
        (
            lambda array: array[:0],
            r"\(0, 32\) float32  must have 2 axes and cannot be empty",
        ),
    ],
)
def test_the_report_says_what_is_wrong_and_what_to_do(damage, line):
    whole = written("timm ViT")
    name = "blocks.0.mlp.fc1.weight"
    array = whole.arrays.pop(name)
    if damage is not None:
        whole.arrays[name] = damage(array)
    with pytest.raises(ValueError, match=rf"{PATH} and the model differ:\n.*{line}"):
        load(whole)
    with pytest.raises(ValueError, match="Fetch or save the file again"):
        load(whole)
