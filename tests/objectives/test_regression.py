import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite.objectives.regression import Regression, RegressionLoss
from big_vision_lite.types import Objective

RNG = np.random.default_rng(0)
TARGETS = np.float32(RNG.normal((170, -0.002), (9, 0.001), (12, 2)))
LOGITS = np.float32(RNG.normal(0, 2, (12, 2)))
NAMES = ("height (cm)", "drift")


def run(objective, target=TARGETS, logits=LOGITS):
    images = jnp.zeros((len(logits), 2, 2, 1), jnp.uint8)

    def forward(image):
        assert image is images
        return {"logits": jnp.asarray(logits)}

    batch = {"image": images, "target": jnp.asarray(target)}
    return objective(forward, batch, jax.random.key(0))


def by_hand(difference, loss):
    if loss == RegressionLoss.SQUARED:
        return difference * difference
    if loss == RegressionLoss.ABSOLUTE:
        return abs(difference)
    if abs(difference) <= 1:
        return difference * difference / 2
    return abs(difference) - 0.5


@pytest.mark.parametrize("loss", RegressionLoss)
def test_the_loss_equals_a_loop_over_standardised_targets(loss):
    objective = Regression.fitted(TARGETS, NAMES, loss)
    assert isinstance(objective, Objective)
    losses, metrics = run(objective)
    exact = TARGETS.astype(np.float64)
    standard = (exact - exact.mean(axis=0)) / exact.std(axis=0)
    expected = [
        sum(by_hand(float(x - z), loss) for x, z in zip(row, wanted, strict=True)) / 2
        for row, wanted in zip(LOGITS, standard, strict=True)
    ]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(
        metrics["absolute_error"], np.abs(LOGITS - standard).mean(axis=1), rtol=1e-4
    )
    assert losses.shape == (12,) and losses.dtype == jnp.float32


def test_no_output_at_all_costs_one_and_predicts_the_mean():
    """A squared loss is in units of the training targets' variance, whatever it is."""
    objective = Regression.fitted(TARGETS, NAMES)
    losses, _ = run(objective, logits=0 * LOGITS)
    np.testing.assert_allclose(np.mean(losses), 1, rtol=1e-4)
    mean = TARGETS.astype(np.float64).mean(axis=0)
    found = objective.predictions(jnp.zeros((1, 2)))
    np.testing.assert_allclose(found[0], mean, rtol=1e-6)


def test_predictions_of_standardised_targets_are_the_targets():
    objective = Regression.fitted(TARGETS, NAMES)
    exact = TARGETS.astype(np.float64)
    logits = jnp.float32((exact - exact.mean(axis=0)) / exact.std(axis=0))
    np.testing.assert_allclose(objective.predictions(logits), TARGETS, rtol=1e-6)


def test_the_unit_of_a_target_changes_no_loss():
    other = TARGETS * np.float32([0.01, 1000])
    for loss in RegressionLoss:
        one = run(Regression.fitted(TARGETS, NAMES, loss))[0]
        two = run(Regression.fitted(other, NAMES, loss), other)[0]
        # Both are rounded to float32 before they are standardised.
        np.testing.assert_allclose(one, two, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    "column, message",
    [
        ([3.0] * 12, r"a \(3 to 3\) do not differ"),
        ([0.0] * 12, "do not differ"),
        # Seconds since 1970: float32 keeps steps of 128.
        (1.7e9 + np.arange(12) * 60, "only in digits that float32 does not keep"),
    ],
)
def test_targets_without_anything_to_learn_are_refused(column, message):
    with pytest.raises(ValueError, match=message):
        Regression.fitted(np.float32(column)[:, None], ("a",))


def test_what_does_not_fit_is_refused_with_what_to_type():
    with pytest.raises(ValueError, match="2 names, 1 values of mean and 2 of std"):
        Regression(names=("a", "b"), mean=(0.0,), std=(1.0, 1.0))
    for std in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="finite numbers, std above 0"):
            Regression(names=("a",), mean=(0.0,), std=(std,))
    objective = Regression.fitted(TARGETS, NAMES)
    with pytest.raises(ValueError, match="3 outputs for 2 targets.*num_classes=2"):
        run(objective, logits=np.zeros((12, 3), np.float32))
    with pytest.raises(ValueError, match=r"shape \(12, 1\), and the objective 2 names"):
        run(objective, TARGETS[:, :1])
    batch = {"image": jnp.zeros((1, 2, 2, 1)), "label": jnp.zeros(1, int)}
    with pytest.raises(ValueError, match="needs a target.*has image, label; give a so"):
        objective(lambda image: {"logits": 0}, batch, jax.random.key(0))
