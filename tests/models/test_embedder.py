import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite.models.embedder import Embedder, Projector, unit
from big_vision_lite.models.vit import ViT

IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)), jnp.uint8)


def embedder(**fields) -> Embedder:
    encoder = ViT(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=4)
    projector = Projector(hidden=(12,), features=5)
    return Embedder(**{"encoder": encoder, "projector": projector} | fields)


def test_scores_are_cosines_with_unit_prototypes():
    model = embedder(prototypes=7)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    found = jax.jit(model.apply)(variables, IMAGES)
    z = np.asarray(found["embedding"], np.float64)
    w = np.asarray(variables["params"]["prototypes"], np.float64)
    w = w / np.linalg.norm(w, axis=0)
    expected = z @ w / np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(found["scores"], expected, atol=1e-5)
    assert found["embedding"].shape == (6, 5) and "scores" in found
    assert "scores" not in embedder().apply(
        embedder().init(jax.random.key(0), IMAGES), IMAGES
    )


def test_a_centre_moves_in_training_alone():
    model = embedder(prototypes=7, centre_momentum=0.75)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    mean = jnp.asarray(np.random.default_rng(1).normal(0, 1, 7), jnp.float32)
    for train in (False, True):
        _, changed = model.apply(
            variables,
            means={"centre": mean},
            train=train,
            method="observe",
            mutable=["centres"],
        )
        expected = 0.25 * mean if train else np.zeros(7)
        np.testing.assert_allclose(changed["centres"]["centre"], expected, atol=1e-6)


def test_views_stand_in_for_an_image_that_is_not_there():
    views = jnp.zeros((4, 2, 8, 8, 3), jnp.uint8).at[:, 0].set(3)
    found = embedder().inputs({"views": views, "label": jnp.zeros(4)})
    assert found["image"].shape == (4, 8, 8, 3) and np.all(found["image"] == 3)
    image = jnp.ones((4, 8, 8, 3), jnp.uint8)
    assert embedder().inputs({"views": views, "image": image})["image"] is image
    with pytest.raises(ValueError, match="neither an image nor views"):
        embedder().inputs({"label": jnp.zeros(4)})


def test_a_zero_vector_has_a_finite_unit_and_gradient():
    assert not np.any(unit(jnp.zeros((2, 3))))
    gradient = jax.grad(lambda x: unit(x).sum())(jnp.zeros((2, 3)))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prototypes": 1}, "use 0 for none, or many"),
        ({"centre_momentum": 0.9}, "give prototypes=K"),
        ({"prototypes": 4, "centre_momentum": 1.5}, "centre_momentum"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        embedder(**fields)


def test_patches_have_a_head_of_their_own_and_learned_tokens_in_their_place():
    vit = ViT(width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=4, mask_token=True)
    head = Projector(hidden=(6,), features=5, batch_norm=False)
    model = embedder(encoder=vit, patch_projector=head, patch_prototypes=3)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    apply = jax.jit(model.apply)
    nothing = jnp.zeros((6, 4), bool)
    whole = apply(variables, IMAGES)
    same = apply(variables, IMAGES, replaced=nothing)
    np.testing.assert_allclose(same["grid"], whole["grid"], atol=1e-6)
    second = nothing.at[:, 1].set(True)
    hidden = apply(variables, IMAGES, replaced=second)
    other = apply(variables, IMAGES.at[:, :4, 4:].add(99), replaced=second)
    np.testing.assert_array_equal(hidden["grid"], other["grid"])
    tokens = whole["grid"].reshape(6, 4, 8)
    scores = model.apply(variables, tokens, method="score_patches")["scores"]
    assert scores.shape == (6, 4, 3) and np.abs(scores).max() <= 1 + 1e-6


def test_patches_without_a_head_or_a_token_are_refused():
    variables = jax.jit(embedder().init)(jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match=r"give it patch_prototypes=K"):
        embedder().apply(variables, jnp.zeros((6, 4, 8)), method="score_patches")
    with pytest.raises(ValueError, match=r"encoder\.mask_token=True"):
        embedder().apply(variables, IMAGES, replaced=jnp.zeros((6, 4), bool))
    with pytest.raises(ValueError, match="give both, or neither"):
        embedder(patch_prototypes=3)
