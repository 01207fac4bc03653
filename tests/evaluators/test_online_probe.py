"""Neighbours, a linear model and the rank of features, beside their controls."""

import jax
import numpy as np
import pytest
from evaluation_context import (
    Damaged,
    Network,
    Pixels,
    make_context,
    make_mesh,
    make_state,
)

from big_vision_lite.data.ops import Decode
from big_vision_lite.data.sources import Digits, InMemory
from big_vision_lite.evaluators.fewshot import L2_GRID
from big_vision_lite.evaluators.knn import knn_accuracy, rankme, unit
from big_vision_lite.evaluators.online_probe import OnlineProbe
from big_vision_lite.evaluators.ridge import Ridge

RNG = np.random.default_rng(0)


def test_neighbours_vote_as_a_loop_says():
    known, asked = RNG.normal(0, 1, (60, 5)), RNG.normal(0, 1, (40, 5))
    labels, truth = RNG.integers(0, 4, 60), RNG.integers(0, 4, 40)
    for neighbours in (1, 7, 100):
        correct = 0
        for x, y in zip(asked, truth, strict=True):
            cosine = [x @ k / np.linalg.norm(x) / np.linalg.norm(k) for k in known]
            votes = np.zeros(4)
            for index in np.argsort(cosine)[::-1][:neighbours]:
                votes[labels[index]] += np.exp(cosine[index] / 0.07)
            correct += votes.argmax() == y
        found = knn_accuracy(known, labels, asked, truth, 4, neighbours)
        assert found == correct / 40


def test_rankme_counts_directions():
    assert rankme(np.ones((50, 8))) == pytest.approx(1, abs=1e-3)
    assert rankme(np.zeros((50, 8))) == 1
    assert rankme(np.eye(8)) == pytest.approx(8, abs=1e-3)
    values = np.array([3.0, 1.0])
    shares = values / 4
    matrix = np.zeros((9, 5))
    matrix[0, 0], matrix[1, 1] = values
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert rankme(matrix) == pytest.approx(expected, rel=1e-4)


def test_a_zero_vector_is_no_division_by_zero():
    assert np.isfinite(unit(np.zeros((2, 3)))).all()


def evaluate(workdir, evaluator, *, model=None, devices=1, **context):
    model, mesh = model or Pixels(), make_mesh(devices)
    with jax.set_mesh(mesh):
        state = make_state(model, mesh, (8, 8, 1))
        made = make_context(workdir, mesh, model, **context)
        return evaluator.prepare(made)(state)


POOL, TEST = Digits(split="train"), Digits(split="test")


def probe(**fields):
    return OnlineProbe(**{"train": POOL, "test": TEST, "batch_size": 128} | fields)


def arrays(source):
    examples = [source[index] for index in range(len(source))]
    images = np.stack([e["image"].reshape(-1) for e in examples])
    return images.astype(np.float32), np.array([e["label"] for e in examples])


def test_scores_are_those_of_the_features_by_hand(tmp_path):
    found = evaluate(tmp_path, probe(controls=False))
    (x, y), (test_x, test_y) = arrays(POOL), arrays(TEST)
    expected = knn_accuracy(x, y, test_x, test_y, 10)
    assert found["knn/accuracy"] == pytest.approx(expected, abs=0.003)
    assert found["rankme"] == pytest.approx(rankme(x), rel=0.01)
    best = max(Ridge(x, y, 10).accuracies(test_x, test_y, L2_GRID))
    assert best - 0.02 < found["linear/accuracy"] <= best
    assert found["unreadable"] == 0


def test_controls_stand_beside_and_the_pixels_control_is_the_pixels(tmp_path):
    found = evaluate(tmp_path, probe(), model=Network())
    pixels = evaluate(tmp_path / "pixels", probe(controls=False))
    for name in ("knn", "linear"):
        control = found[f"{name}/control_raw_pixels"]
        assert control == pytest.approx(pixels[f"{name}/accuracy"], abs=0.004)
        assert 0.3 < found[f"{name}/control_untrained"] < 1
    assert (tmp_path / "val_controls.json").exists()


def test_eight_devices_give_the_scores_of_one(tmp_path):
    one, eight = (evaluate(tmp_path, probe(controls=False), devices=n) for n in (1, 8))
    assert one == eight


def test_classes_are_matched_by_name_and_bad_images_counted(tmp_path):
    images, labels = arrays(TEST)
    turned = InMemory(
        images.astype(np.uint8).reshape(-1, 8, 8, 1), 9 - labels, tuple("9876543210")
    )
    straight = evaluate(tmp_path, probe(controls=False))
    assert evaluate(tmp_path, probe(controls=False, test=turned)) == straight


def test_what_cannot_be_probed_is_said_before_any_step(tmp_path):
    with pytest.raises(ValueError, match="neighbours=0.*at least 1"):
        probe(neighbours=0)
    several = InMemory(np.zeros((2, 8, 8, 1), np.uint8), np.eye(2, dtype=int), "ab")
    with pytest.raises(ValueError, match="several labels an image"):
        evaluate(tmp_path, probe(train=several, test=several))
    with pytest.raises(ValueError, match='output="polled" is no output'):
        evaluate(tmp_path, probe(output="polled"), model=Network())


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    few = InMemory(*(x[:64] for x in arrays_as_images(POOL)), POOL.class_names)
    damaged = Damaged(few, bad=(3, 5))
    evaluator = probe(train=damaged, controls=False)
    found = evaluate(tmp_path, evaluator, ops=(Decode(channels=1),))
    assert found["unreadable"] == 2


def arrays_as_images(source):
    images, labels = arrays(source)
    return images.astype(np.uint8).reshape(-1, 8, 8, 1), labels
