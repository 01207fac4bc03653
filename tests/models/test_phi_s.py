import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite.models.phi_s import PhiS, hadamard, standardiser

SIZES = (768, 1024, 1152, 1280, 1536)


@pytest.mark.parametrize(
    "size", [1, 2, 4, 12, 20, 24, 192, 384, 640, 1408, 2048, *SIZES]
)
def test_rows_of_a_hadamard_matrix_are_orthogonal(size):
    matrix = hadamard(size)
    assert matrix.dtype == np.int8 and set(np.unique(matrix)) <= {-1, 1}
    # Exact in float64, and quicker than integers.
    product = matrix.astype(np.float64) @ matrix.T.astype(np.float64)
    np.testing.assert_array_equal(product, size * np.eye(size))


def test_a_size_without_a_matrix_names_the_nearest_and_the_way_out():
    with pytest.raises(ValueError, match=r"size 6 .*nearest size is 4.*distance=cos"):
        hadamard(6)
    with pytest.raises(ValueError, match=r"92 dimensions; the nearest size is 88"):
        hadamard(92)


def sample(count, size, seed=0):
    """Features far from 0, correlated, of scales from 0.1 to 10."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, size)) * np.geomspace(0.1, 10, size)
    turn = np.linalg.qr(rng.standard_normal((size, size)))[0]
    return (mixed @ turn + 5).astype(np.float32)


def variances(x, covariance):
    kernel = np.asarray(standardiser(jnp.asarray(covariance), hadamard(x.shape[1])))
    y = (x - x.mean(axis=0)).astype(np.float64) @ kernel.astype(np.float64)
    return y, kernel


@pytest.mark.parametrize(
    "size",
    [24, 192, *(pytest.param(size, marks=pytest.mark.slow) for size in SIZES)],
)
def test_every_dimension_has_variance_one_and_the_shape_stays(size):
    x = sample(2 * size, size).astype(np.float64)
    covariance = np.cov(x.T, bias=True).astype(np.float32)
    y, kernel = variances(x, covariance)
    np.testing.assert_allclose(y.var(axis=0), 1, atol=1e-5)
    # One scale for all: a turn keeps the proportions of distances.
    factor = size / np.trace(covariance)
    np.testing.assert_allclose(kernel @ kernel.T, factor * np.eye(size), atol=1e-4)


def stepped(batches, sample_steps):
    module, variables = PhiS(sample_steps=sample_steps), None
    for batch in batches:
        batch = jnp.asarray(batch)
        if variables is None:
            variables = module.init(jax.random.key(0), batch, False)
        y, changed = module.apply(variables, batch, True, mutable=["standards"])
        variables = variables | changed
    return y, variables, functools.partial(module.apply, variables)


def test_the_sample_is_the_first_batches_and_no_later_ones():
    x = sample(96, 12)
    batches = x.reshape(6, 16, 12)
    _, variables, apply = stepped(batches[:4], sample_steps=4)
    seen = x[:64].astype(np.float64)
    standards = variables["standards"]
    assert standards["steps"] == 4
    np.testing.assert_allclose(standards["mean"], seen.mean(axis=0), rtol=1e-5)
    covariance = np.cov(seen.T, bias=True)
    np.testing.assert_allclose(standards["covariance"], covariance, atol=1e-3)
    y = apply(jnp.asarray(x[:64]), False)
    np.testing.assert_allclose(np.var(y, axis=0), 1, atol=1e-5)
    _, later, _ = stepped(batches, sample_steps=4)
    for name, value in standards.items():
        np.testing.assert_array_equal(later["standards"][name], value)


def test_before_the_sample_is_complete_features_are_scaled_and_not_turned():
    x = sample(16, 12)
    y, variables, _ = stepped([x], sample_steps=4)
    kernel = np.asarray(variables["standards"]["kernel"])
    np.testing.assert_allclose(kernel, kernel[0, 0] * np.eye(12), atol=1e-7)
    np.testing.assert_allclose(np.var(y, axis=0).mean(), 1, rtol=1e-5)


def test_no_gradient_reaches_the_features():
    x, module = jnp.asarray(sample(8, 4)), PhiS(sample_steps=2)
    variables = module.init(jax.random.key(0), x, False)

    def loss(x):
        return module.apply(variables, x, True, mutable=["standards"])[0].sum()

    assert not np.any(jax.grad(loss)(x))
