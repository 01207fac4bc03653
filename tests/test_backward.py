"""The order of the backward pass: the same gradients, only where it helps."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from big_vision_lite.models import backward
from big_vision_lite.models.heads import Classifier
from big_vision_lite.models.layers import Remat
from big_vision_lite.models.mixer import MlpMixer
from big_vision_lite.models.vit import ViT

# What tests/test_flops.py counts is the memory that all this is for.


def vit(**fields) -> ViT:
    return tiny_runs.tiny_vit(depth=2, dropout=0.1, stochastic_depth=0.2, **fields)


def mixer(**fields) -> MlpMixer:
    return MlpMixer(
        width=16,
        depth=2,
        token_mlp_dim=8,
        channel_mlp_dim=24,
        patch_size=4,
        head=Classifier(num_classes=10),
        **fields,
    )


@pytest.fixture
def ordered(monkeypatch):
    """Lists the backward passes of blocks that were traced in order."""
    seen = []
    original = backward._backward

    def noted(vjp, gradient):
        seen.append(gradient.shape)
        return original(vjp, gradient)

    monkeypatch.setattr(backward, "_backward", noted)
    tiny_runs._parts.cache_clear()
    yield seen
    tiny_runs._parts.cache_clear()


def gradients(model, **options):
    run = tiny_runs.start(model, **options)
    run.advance(tiny_runs.rows())
    return tiny_runs.gradients(run.state)


@pytest.mark.parametrize(("model", "remat"), [(vit, Remat.FULL), (mixer, Remat.NONE)])
def test_gradients_do_not_depend_on_the_order(ordered, monkeypatch, model, remat):
    found = gradients(model(remat=remat))
    assert len(ordered) == 2
    tiny_runs._parts.cache_clear()
    monkeypatch.setattr(backward, "call_block", lambda block, x, train: block(x, train))
    expected = gradients(model(remat=remat))
    assert len(ordered) == 2
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        # Each first element would be fetched from wherever it lies.
        {"devices": 2},
        # The gradients of what is frozen would be computed for nothing.
        {"freeze": ("encoder/block_01/mlp/.*",)},
    ],
)
def test_where_it_would_cost_the_compiler_orders(ordered, options):
    gradients(vit(), **options)
    assert ordered == []


class OfTokens:
    """A loss of what a block gives, which `capture` collects beside the outputs."""

    def __call__(self, forward, batch, rng):
        captured = forward(image=batch["image"], capture=("encoder/block_00",))
        tokens = captured["captured"]["encoder/block_00"]
        return jnp.square(tokens).mean((1, 2)), {}


def test_what_is_captured_passes_its_gradient_on(ordered):
    found = gradients(vit(), objective=OfTokens())
    assert ordered == []
    assert np.abs(found["encoder/block_00/mlp/out/kernel"]).max() > 1e-4


def test_a_gradient_that_is_not_finite_stays_in_its_leaf_or_shows():
    """Infinity adds nothing to others; NaN may, the step is left out in any case."""
    params = {"a": jnp.array([jnp.inf, 1.0]), "b": jnp.array(-2.0)}
    of_params, of_x = backward._backward(lambda g: (params, g), jnp.array([3.0, -0.5]))
    assert of_params is params
    np.testing.assert_array_equal(of_x, [3.0, -0.5])
    of_x = backward._backward(lambda g: (jnp.array([jnp.nan]), g), jnp.ones(2))[1]
    assert jnp.isnan(of_x).all()


def test_the_context_ends():
    with backward.weights_first():
        with backward.weights_first(False):
            assert not backward._weights_first.get()
        assert backward._weights_first.get()
    assert not backward._weights_first.get()
