import numpy as np
import pytest

from big_vision_lite.evaluators.average_precision import (
    average_precision,
    mean_average_precision,
)

RNG = np.random.default_rng(0)
SCORES = np.float32(np.round(RNG.normal(0, 1, (40, 4)), 1))
LABELS = np.float32(RNG.random((40, 4)) < (0.5, 0.1, 0.9, 0.3))


def by_thresholds(scores, positive):
    """Scikit-learn's definition, a threshold at a time: sum of (R - R before) * P."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        chosen = scores >= threshold
        recall = positive[chosen].sum() / positive.sum()
        total += (recall - before) * positive[chosen].mean()
        before = recall
    return total


def test_average_precision_equals_the_sum_over_thresholds():
    for c in range(4):
        positive = LABELS[:, c] > 0
        expected = by_thresholds(SCORES[:, c], positive)
        assert average_precision(SCORES[:, c], positive) == pytest.approx(expected)
    metrics = pytest.importorskip("sklearn.metrics")
    expected = metrics.average_precision_score(LABELS, SCORES)
    found = mean_average_precision(SCORES, LABELS, "abcd", print)
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_order_of_images_with_equal_scores_does_not_matter():
    scores, positive = np.float32([1, 0, 0, 0]), np.array([True, True, False, False])
    for order in ((0, 1, 2, 3), (0, 3, 2, 1), (2, 1, 0, 3)):
        found = average_precision(scores[list(order)], positive[list(order)])
        assert found == pytest.approx(0.5 * 1 + 0.5 * 0.5)


def test_classes_without_an_image_are_left_out_and_named():
    labels, messages = LABELS.copy(), []
    labels[:, 1] = 0
    found = mean_average_precision(SCORES, labels, "abcd", messages.append)
    rest = [0, 2, 3]
    expected = mean_average_precision(SCORES[:, rest], LABELS[:, rest], "acd", print)
    assert found == expected and "1 of 4 classes, which no image has: b" in messages[0]
    assert mean_average_precision(SCORES, 0 * LABELS, "abcd", messages.append) is None
