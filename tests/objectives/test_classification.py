import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.objectives.classification import (
    SigmoidClassification,
    SoftmaxClassification,
)
from big_vision_lite.types import Objective

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (4, 5)).astype(np.float32)
CLASSES = np.array([1, 0, 4, 4], np.int32)
SOFT = RNG.dirichlet(np.ones(5), 4).astype(np.float32)
SEVERAL = np.array(
    [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], np.float32
)


def run(objective, labels, logits=LOGITS):
    images = jnp.zeros((len(logits), 2, 2, 1), jnp.uint8)

    def forward(image):
        assert image is images
        return {"logits": jnp.asarray(logits)}

    batch = {"image": images, "label": jnp.asarray(labels)}
    losses, metrics = objective(forward, batch, jax.random.key(0))
    assert losses.shape == metrics["accuracy"].shape == (len(logits),)
    assert losses.dtype == metrics["accuracy"].dtype == jnp.float32
    return np.asarray(losses), np.asarray(metrics["accuracy"])


def one_hot(labels):
    return np.eye(5)[labels] if labels.ndim == 1 else labels.astype(np.float64)


@pytest.mark.parametrize("labels", [CLASSES, SOFT], ids=["int", "float"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_loss_equals_a_double_loop(labels, smoothing):
    losses, _ = run(SoftmaxClassification(label_smoothing=smoothing), labels)
    for b, logits in enumerate(LOGITS.astype(np.float64)):
        expected = 0.0
        for c in range(5):
            target = one_hot(labels)[b, c] * (1 - smoothing) + smoothing / 5
            expected -= target * np.log(np.exp(logits[c]) / np.exp(logits).sum())
        assert losses[b] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("labels", [CLASSES, SEVERAL], ids=["int", "several"])
def test_sigmoid_loss_is_summed_over_classes(labels):
    losses, _ = run(SigmoidClassification(), labels)
    for b, logits in enumerate(LOGITS.astype(np.float64)):
        expected = 0.0
        for c in range(5):
            p = 1 / (1 + np.exp(-logits[c]))
            expected -= np.log(p if one_hot(labels)[b, c] else 1 - p)
        assert losses[b] == pytest.approx(expected, rel=1e-5)


def test_a_bias_of_minus_log_c_starts_a_sigmoid_loss_at_one_class_an_image():
    classes = 1000

    def start(bias):
        head = Classifier(num_classes=classes, bias_init=bias)
        outputs, _ = head.init_with_output(jax.random.key(0), jnp.ones((1, 4)))
        (loss,), _ = run(SigmoidClassification(), np.array([3]), outputs["logits"])
        probabilities = SigmoidClassification().logits.outputs(outputs["logits"])
        return loss, probabilities.sum()

    loss, expected = start(-np.log(classes))
    assert -np.log(classes) == pytest.approx(-6.9, abs=0.01)  # as published configs say
    assert expected == pytest.approx(1, abs=0.002)
    # log(1 + C) for the class that is there, log(1 + 1 / C) for each that is not.
    by_hand = np.log1p(classes) + (classes - 1) * np.log1p(1 / classes)
    assert loss == pytest.approx(by_hand, rel=1e-5) and loss < 8
    # Without it half of all classes: almost a hundred times the loss.
    loss, expected = start(0.0)
    assert expected == 500 and loss == pytest.approx(classes * np.log(2), rel=1e-5)


def test_accuracy_is_right_for_one_label_several_and_none():
    best = LOGITS.argmax(-1)
    _, accuracy = run(SoftmaxClassification(), CLASSES)
    np.testing.assert_array_equal(accuracy, best == CLASSES)
    _, accuracy = run(SigmoidClassification(), SEVERAL)
    np.testing.assert_array_equal(accuracy, SEVERAL[np.arange(4), best])


def test_bfloat16_logits_and_extreme_ones_give_finite_float32_losses():
    extreme = jnp.asarray([[1e4, -1e4, 0.0, 0.0, 0.0]] * 2, jnp.bfloat16)
    labels = np.array([0, 1], np.int32)
    for objective in (SoftmaxClassification(), SigmoidClassification()):
        losses, _ = run(objective, labels, extreme)
        assert np.isfinite(losses).all() and losses[0] < 3 and losses[1] > 1e4


def test_the_gradient_of_softmax_is_probability_minus_label():
    def loss(logits):
        forward = lambda image: {"logits": logits}  # noqa: E731
        batch = {"image": jnp.zeros((4, 1, 1, 1)), "label": jnp.asarray(CLASSES)}
        return SoftmaxClassification()(forward, batch, jax.random.key(0))[0].sum()

    gradient = jax.grad(loss)(jnp.asarray(LOGITS))
    expected = jax.nn.softmax(LOGITS) - one_hot(CLASSES)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_objectives_are_what_the_loop_calls():
    assert isinstance(SoftmaxClassification(), Objective)
    assert isinstance(SigmoidClassification(), Objective)


def test_wrong_use_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="0 <= label_smoothing < 1"):
        SoftmaxClassification(label_smoothing=1.0)
    with pytest.raises(ValueError, match="head.num_classes=3"):
        run(SoftmaxClassification(), SOFT[:, :3])


WEIGHTS = (0.5, 2.0, 0.0, 1.0, 3.25)


@pytest.mark.parametrize("labels", [CLASSES, SOFT], ids=["int", "float"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_softmax_equals_pytorch_s_sum_of_terms(labels, smoothing):
    objective = SoftmaxClassification(label_smoothing=smoothing, class_weights=WEIGHTS)
    losses, _ = run(objective, labels)
    for b, logits in enumerate(LOGITS.astype(np.float64)):
        expected = 0.0
        for c in range(5):
            target = one_hot(labels)[b, c] * (1 - smoothing) + smoothing / 5
            log_p = logits[c] - np.log(np.exp(logits).sum())
            expected -= WEIGHTS[c] * target * log_p
        assert losses[b] == pytest.approx(expected, rel=1e-5)


def test_weighted_sigmoid_weighs_the_classes_that_are_there():
    losses, _ = run(SigmoidClassification(class_weights=WEIGHTS), SEVERAL)
    for b, logits in enumerate(LOGITS.astype(np.float64)):
        p = 1 / (1 + np.exp(-logits))
        present = (SEVERAL[b] * np.array(WEIGHTS) * np.log(p)).sum()
        absent = ((1 - SEVERAL[b]) * np.log(1 - p)).sum()
        assert losses[b] == pytest.approx(-present - absent, rel=1e-5)


def test_weights_of_one_change_no_bit():
    ones = (1.0,) * 5
    for kind, labels in (
        (SoftmaxClassification, SOFT),
        (SigmoidClassification, CLASSES),
    ):
        plain, weighted = (
            run(kind(), labels)[0],
            run(kind(class_weights=ones), labels)[0],
        )
        np.testing.assert_array_equal(plain, weighted)


def test_balanced_weights_give_every_class_the_same_sum():
    counts = np.array([1, 40, 9, 50])
    softmax = SoftmaxClassification.balanced(counts, "abcd")
    weights = np.array(softmax.class_weights)
    np.testing.assert_allclose(weights * counts, 25)
    assert (weights * counts).sum() / 100 == pytest.approx(1)  # the mean of an image
    sigmoid = SigmoidClassification.balanced(counts, "abcd", 100)
    np.testing.assert_allclose(np.array(sigmoid.class_weights) * counts, 100 - counts)


def test_wrong_weights_are_said():
    with pytest.raises(ValueError, match="class_weights has 5 numbers for 4 classes"):
        weighted = SoftmaxClassification(class_weights=WEIGHTS)
        run(weighted, CLASSES % 4, LOGITS[:, :4])
    for weights in ((-1.0, 1.0), (float("nan"),), (float("inf"), 1.0), (0.0, 0.0)):
        for kind in (SoftmaxClassification, SigmoidClassification):
            with pytest.raises(ValueError, match="weights are finite numbers from 0"):
                kind(class_weights=weights)
    with pytest.raises(ValueError, match="No training image has b, so no weight"):
        SoftmaxClassification.balanced(np.array([3, 0]), "ab")
    with pytest.raises(ValueError, match="All 3 training images have a"):
        SigmoidClassification.balanced(np.array([3, 1]), "ab", 3)


def test_shared_labels_equal_a_loop_and_an_image_without_any_has_no_loss():
    objective = SoftmaxClassification(share_labels=True, label_smoothing=0.1)
    losses, _ = run(objective, SEVERAL)
    for b, logits in enumerate(LOGITS.astype(np.float64)):
        log_p = logits - np.log(np.exp(logits).sum())
        count = SEVERAL[b].sum()
        target = 0.9 * SEVERAL[b] / max(count, 1) + (count > 0) * 0.1 / 5
        assert losses[b] == pytest.approx(-(target * log_p).sum(), rel=1e-5)
    assert losses[1] == 0
    # One label an image is what it is without sharing.
    one, _ = run(SoftmaxClassification(share_labels=True), CLASSES)
    np.testing.assert_array_equal(one, run(SoftmaxClassification(), CLASSES)[0])


# SEVERAL as tags: in another order, padded between.
TAGS = np.array(
    [[3, -1, 0, -1, -1], [-1, -1, -1, -1, -1], [1, 2, 3, -1, -1], [4, 3, 2, 1, 0]],
    np.int32,
)


@pytest.mark.parametrize(
    "objective",
    [
        SoftmaxClassification(share_labels=True),
        SoftmaxClassification(share_labels=True, label_smoothing=0.1),
        SoftmaxClassification(share_labels=True, class_weights=WEIGHTS),
        SigmoidClassification(),
        SigmoidClassification(class_weights=WEIGHTS),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_tags_give_the_loss_of_dense_labels_and_none_weigh_nothing(objective):
    sparse, dense = run(objective, TAGS), run(objective, SEVERAL)
    there = SEVERAL.any(axis=1)
    np.testing.assert_array_equal(sparse[0][there], dense[0][there])
    np.testing.assert_array_equal(sparse[1], dense[1])
    assert sparse[0][1] == 0 and (sparse[0][there] > 0).all()


def test_a_tag_named_twice_counts_once_and_the_unlabelled_are_counted():
    twice = np.array([[3, 0, 3], [-1, -1, -1], [2, 1, 3], [0, 0, 0]], np.int32)
    once = np.array([[3, 0, -1], [-1, -1, -1], [2, 1, 3], [0, -1, -1]], np.int32)
    for objective in (
        SoftmaxClassification(share_labels=True),
        SigmoidClassification(),
    ):
        np.testing.assert_array_equal(run(objective, twice)[0], run(objective, once)[0])
        batch = {"image": jnp.zeros((4, 1, 1, 1)), "label": jnp.asarray(twice)}
        forward = lambda image: {"logits": jnp.asarray(LOGITS)}  # noqa: E731
        _, metrics = objective(forward, batch, jax.random.key(0))
        np.testing.assert_array_equal(metrics["unlabelled"], [0, 1, 0, 0])


def test_tags_need_an_objective_that_takes_several():
    with pytest.raises(ValueError, match=r"share_labels=True\), which gives each of k"):
        run(SoftmaxClassification(), TAGS)


@pytest.mark.parametrize(
    "objective",
    [SoftmaxClassification(share_labels=True), SigmoidClassification()],
    ids=lambda objective: type(objective).__name__,
)
def test_tags_of_many_classes_need_no_more_memory_than_dense_labels(objective):
    size, most, classes = 8, 16, 17_000

    def loss(logits, label):
        batch = {"image": jnp.zeros((size, 1)), "label": label}
        forward = lambda image: {"logits": logits}  # noqa: E731
        return objective(forward, batch, jax.random.key(0))[0].mean()

    logits = jax.ShapeDtypeStruct((size, classes), jnp.float32)
    labels = jax.ShapeDtypeStruct((size, most), jnp.int32), logits
    tags, dense = (
        jax.jit(jax.value_and_grad(loss)).lower(logits, label).compile()
        for label in labels
    )
    needed = [c.memory_analysis().temp_size_in_bytes for c in (tags, dense)]
    # Dense labels are an argument besides.
    assert needed[0] <= needed[1] + 4 * size * classes
