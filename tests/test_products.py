"""Products with a gradient of their own: what Flax and JAX compute without them."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite.models.products import dot_general, product


@pytest.mark.parametrize("keep_x", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(3, 8), (8, 3)])
def test_the_gradient_of_a_product_is_that_of_matmul(inputs, outputs, keep_x):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 5, inputs)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(2, 4, 5, outputs)), jnp.float32)
    found, expected = (
        jax.value_and_grad(lambda x, k, f=f: (f(x, k) * weights).sum(), (0, 1))(
            x, kernel
        )
        for f in (lambda x, k: product(x, k, keep_x), jnp.matmul)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "keep_x", "transposes"),
    [
        ((64, 256), True, False),
        ((256, 64), True, False),
        ((256, 64), False, False),
        # The narrow x alone: what it is made of need not be kept.
        ((64, 256), False, True),
    ],
)
def test_the_gradient_of_a_kernel_multiplies_what_is_there(kernel, keep_x, transposes):
    def loss(kernel, x, weights):
        return (product(x, kernel, keep_x) * weights).sum()

    rows = (2, 14, 14)
    shapes = (kernel, (*rows, kernel[0]), (*rows, kernel[1]))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(jax.grad(loss)).lower(*args).compile().as_text()
    assert bool(re.search(r"\} (copy|transpose)\(", text)) == transposes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("features", "axis"), [((2, 6), -1), (5, (-2, -1)), (12, -1), (3, -1)]
)
def test_a_dense_layer_is_flaxs_own(features, axis, dtype):
    """Value, gradients and dtypes, of layers that widen, narrow, split and join."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 7, 2, 4)), jnp.float32)
    plain, ours = (
        nn.DenseGeneral(features, axis=axis, dtype=dtype, dot_general=function)
        for function in (None, dot_general)
    )
    params = plain.init(jax.random.key(0), x)

    def loss(layer, params, x):
        return jnp.sin(layer.apply(params, x)).astype(jnp.float32).sum()

    assert plain.apply(params, x).dtype == ours.apply(params, x).dtype == dtype
    expected, found = (
        jax.value_and_grad(loss, (1, 2))(layer, params, x) for layer in (plain, ours)
    )
    tolerance = 1e-5 if dtype == "float32" else 3e-2
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * abs(b).max())


@pytest.mark.parametrize(
    ("dimensions", "precision"),
    [
        ((((0,), (0,)), ((), ())), None),
        ((((2,), (1,)), ((0,), (0,))), None),
        ((((2,), (0,)), ((), ())), "highest"),
    ],
)
def test_other_products_are_refused(dimensions, precision):
    with pytest.raises(NotImplementedError, match="takes the last axes"):
        dot_general(jnp.ones((3, 4, 5)), jnp.ones((5, 3)), dimensions, precision)
