"""The meaning of logits comes with weights, and goes into every format or nowhere."""

import json

import numpy as np
import pytest
from etils import epath
from foreign_models import write_gray_resnet

import big_vision_lite
from big_vision_lite import predict
from big_vision_lite.conversion import export, foreign, problem_type
from big_vision_lite.conversion.assumption import About
from big_vision_lite.conversion.formats import Library
from big_vision_lite.conversion.preprocessing import Preprocessing
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.runs import evaluations, load
from big_vision_lite.types import Logits

pytestmark = pytest.mark.parity

LEVELS = (0.2, 0.8)
IMAGE = np.full((1, 32, 32, 3), 51, np.uint8)


def logits_of(gray):
    features = np.asarray(LEVELS) + 1
    return 1000 * (2 * features * (gray + 1) - features**2)


@pytest.mark.parametrize(
    ("named", "logits"),
    [
        ("single_label_classification", Logits.SOFTMAX),
        ("multi_label_classification", Logits.SIGMOID),
        ("regression", Logits.NONE),
    ],
)
def test_what_the_file_says_is_honoured_and_goes_out_again(named, logits, tmp_path):
    folder = write_gray_resnet(tmp_path / "weights", LEVELS, problem_type=named)
    found = foreign.load(str(folder))
    assert found.logits == logits
    assert About.LOGITS not in {each.about for each in found.assumptions}
    answer = big_vision_lite.load(folder).predict(IMAGE)[0]
    raw = logits_of(51 / 255)
    if logits == Logits.NONE:
        np.testing.assert_allclose(answer, raw, rtol=1e-5)  # float32, one path
    elif logits == Logits.SIGMOID:
        # Both logits are far above zero: each class is there for sure.
        np.testing.assert_allclose(answer, 1, atol=1e-6)
    else:
        np.testing.assert_allclose(answer, (1, 0), atol=1e-6)
    for library in (Library.SAFETENSORS, Library.HUGGINGFACE):
        out = tmp_path / library
        written = exported(found, library, out)
        assert f"take{problem_type.IN_TORCH[logits]}" in written.code[-1]
        export.write(written, out)
        assert json.loads((out / "config.json").read_text())["problem_type"] == named
        assert foreign.load(str(out)).logits == logits


def exported(found, library, out):
    preprocessing = Preprocessing(
        ops=found.preprocess,
        mean=found.model.mean,
        std=found.model.std,
        image_size_px=found.image_size_px,
    )
    return export.export(
        *(found.model, found.variables, preprocessing, 3, ("a", "b")),
        *(found.logits, library, str(out)),
    )


def test_what_cannot_be_said_is_refused():
    for logits in (Logits.SIGMOID, Logits.NONE):
        with pytest.raises(ValueError, match="classifiers of torchvision mean softmax"):
            problem_type.write(logits, Library.TORCHVISION)
    assert problem_type.write(Logits.SOFTMAX, Library.TORCHVISION)
    assert problem_type.write(None, Library.TORCHVISION) == {}
    for library in Library:
        if library != Library.TORCHVISION:
            assert problem_type.write(Logits.SIGMOID, library)
    with pytest.raises(ValueError, match='"ranking" in config.json is not read'):
        problem_type.read({"problem_type": "ranking"}, 3, "x")
    with pytest.raises(ValueError, match="probability is always 1"):
        problem_type.read({"problem_type": "single_label_classification"}, 1, "x")


@pytest.mark.parametrize(("outputs", "logits"), [(1, Logits.NONE), (2, Logits.SOFTMAX)])
def test_what_no_file_says_is_assumed_and_said(outputs, logits):
    found = problem_type.read({}, outputs, "x")
    assert found.logits == logits
    (said,) = found.assumptions
    assert said.about == About.LOGITS
    assert "multi_label_classification" in said.words


def test_placeholders_are_no_names_of_classes(tmp_path):
    labels = {"0": "LABEL_0", "1": "LABEL_1"}
    folder = write_gray_resnet(tmp_path / "weights", LEVELS, id2label=labels)
    found = foreign.load(str(folder))
    assert found.class_names == ()
    assert About.CLASSES in {each.about for each in found.assumptions}
    labels["1"] = "dog"
    folder = write_gray_resnet(tmp_path / "named", LEVELS, id2label=labels)
    assert foreign.load(str(folder)).class_names == ("LABEL_0", "dog")


def test_a_regression_is_never_read_as_classes(tmp_path):
    folder = write_gray_resnet(
        tmp_path / "weights", (0.5,), label_names=["age"], problem_type="regression"
    )
    run = load.load(folder, log=lambda _: None)
    assert run.config.objective.logits == Logits.NONE
    numbers = big_vision_lite.load(folder).predict(np.repeat(IMAGE, 2, 0))
    found = predict.Predictions(files=("a", "b"), errors={"b": "no"}, numbers=numbers)
    rows = predict.table_of(found, run.class_names)
    assert rows[0] == ["file", "age", "error"] and float(rows[1][1]) == numbers[0, 0]
    context = evaluations.make_context(
        "val",
        run.config,
        mesh=run.mesh,
        workdir=epath.Path(tmp_path),
        class_names=run.class_names,
        num_steps=1,
        abstract_state=run.state,
        untrained_state=lambda: None,
        log=print,
    )
    with pytest.raises(ValueError, match="numbers .* no classes"):
        Classification(source=run.config.data.source, batch_size=1).prepare(context)
