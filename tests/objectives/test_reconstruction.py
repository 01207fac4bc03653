import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite.objectives.collapse import entropy, spread
from big_vision_lite.objectives.reconstruction import MaskedReconstruction

RNG = np.random.default_rng(0)
OUTPUTS = {
    "reconstruction": RNG.normal(0, 1, (5, 6, 12)).astype(np.float32),
    "patches": RNG.normal(0.3, 2, (5, 6, 12)).astype(np.float32),
    "masked": np.array([[1, 0, 1, 1, 0, 1]] * 4 + [[0, 0, 0, 0, 0, 1]], bool),
    "pooled": RNG.normal(1, 1, (5, 8)).astype(np.float32),
}


def run(objective, outputs):
    batch = {"image": jnp.zeros((5, 2, 2, 1))}
    given = {name: jnp.asarray(x) for name, x in outputs.items()}
    return objective(lambda image: given, batch, jax.random.key(0))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_equals_a_loop_over_hidden_patches(norm_pix):
    losses, _ = run(MaskedReconstruction(norm_pix=norm_pix), OUTPUTS)
    for b in range(5):
        errors = []
        for n in range(6):
            target = OUTPUTS["patches"][b, n].astype(np.float64)
            if norm_pix:
                variance = ((target - target.mean()) ** 2).sum() / (12 - 1)
                target = (target - target.mean()) / np.sqrt(variance + 1e-6)
            if OUTPUTS["masked"][b, n]:
                errors.append(((OUTPUTS["reconstruction"][b, n] - target) ** 2).mean())
        assert losses[b] == pytest.approx(np.mean(errors), rel=1e-5)


def test_the_mean_of_a_patch_costs_almost_one_and_the_truth_nothing():
    zeros = OUTPUTS | {"reconstruction": np.zeros((5, 6, 12), np.float32)}
    losses, _ = run(MaskedReconstruction(), zeros)
    np.testing.assert_allclose(losses, 11 / 12, rtol=1e-5)  # N - 1 below, N above
    patches = OUTPUTS["patches"]
    deviation = np.sqrt(patches.var(axis=-1, keepdims=True, ddof=1) + 1e-6)
    truth = (patches - patches.mean(axis=-1, keepdims=True)) / deviation
    outputs = OUTPUTS | {"reconstruction": truth.astype(np.float32)}
    losses, _ = run(MaskedReconstruction(), outputs)
    np.testing.assert_allclose(losses, 0, atol=1e-10)
    given = {name: jnp.asarray(x) for name, x in outputs.items()}
    np.testing.assert_allclose(
        MaskedReconstruction().patches(given), patches, atol=1e-5
    )
    plain = MaskedReconstruction(norm_pix=False)
    np.testing.assert_array_equal(plain.patches(given), truth.astype(np.float32))


def test_a_flat_patch_gives_a_finite_loss():
    flat = OUTPUTS | {"patches": np.full((5, 6, 12), 0.7, np.float32)}
    losses, _ = run(MaskedReconstruction(), flat)
    assert np.isfinite(losses).all()


def test_spread_tells_collapse_from_features():
    same = jnp.ones((64, 1)) * jnp.asarray(RNG.normal(0, 1, 16), jnp.float32)
    found = spread(same)
    assert found["feature_sd"] < 1e-3
    wide = jnp.asarray(RNG.normal(0, 1, (4096, 16)), jnp.float32)
    found = spread(wide)
    assert found["feature_sd"] == pytest.approx(1, abs=0.01)
    assert found["effective_rank"] == pytest.approx(16, rel=0.02)
    # Two directions, unequal: (3 + 1)^2 / (9 + 1) by the eigenvalues themselves.
    angles = RNG.uniform(0, 2 * np.pi, 9999)
    two = np.stack([np.cos(angles), np.sin(angles)] + [np.zeros(9999)] * 14, axis=1)
    assert spread(jnp.asarray(two, jnp.float32))["effective_rank"] == pytest.approx(
        2, rel=0.01
    )
    unit = np.asarray(wide) / np.linalg.norm(wide, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(np.cov(unit.T, bias=True))
    expected = values.sum() ** 2 / (values**2).sum()
    assert found["effective_rank"] == pytest.approx(expected, rel=1e-4)


def test_spread_has_no_gradient():
    gradient = jax.grad(lambda x: sum(spread(x).values()))(jnp.asarray(np.eye(4)))
    assert not np.any(gradient)


def test_entropy_is_that_of_the_formula():
    assert entropy(jnp.full(8, 1 / 8)) == pytest.approx(np.log(8), rel=1e-5)
    assert entropy(jnp.eye(4)[0]) == pytest.approx(0, abs=1e-6)
