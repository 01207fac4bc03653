"""Text transformer, two towers, captioner: who sees whom, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite import trees
from big_vision_lite.models.captioner import Captioner
from big_vision_lite.models.text_transformer import TextPooling, TextTransformer
from big_vision_lite.models.two_tower import TwoTower
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.captioning import Captioning

KEY = jax.random.key(0)
IMAGE = jax.random.randint(KEY, (2, 8, 8, 3), 0, 256).astype(jnp.uint8)
IDS = jnp.asarray([[3, 9, 1, 0], [2, 2, 9, 4]], jnp.int32)


def vit(**fields):
    return ViT(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=4, **fields)


def text(**fields):
    small = dict(vocabulary=10, width=16, depth=2, mlp_dim=32, num_heads=2, length=4)
    return TextTransformer(**small | fields)


def moved(params):
    """Parameters none of which is zero or the same in all places."""
    r = np.random.default_rng(7)
    noise = lambda x: np.float32(0.3) * r.standard_normal(x.shape, np.float32)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(x + noise(x)), params)


def run(model, ids, **changes):
    params = moved(jax.jit(model.init)(KEY, ids)["params"])
    return jax.jit(model.clone(**changes).apply)({"params": params}, ids)


def test_a_token_sees_those_before_it_or_all():
    later = IDS.at[:, 3].set(5)
    for causal in (True, False):
        model = text(causal=causal)
        first, second = (run(model, ids)["tokens"] for ids in (IDS, later))
        same = np.isclose(first, second, atol=1e-6).all(axis=(0, 2))
        assert same.tolist() == ([True] * 3 + [False] if causal else [False] * 4)


@pytest.mark.parametrize("pooling", TextPooling)
def test_pooling_takes_the_tokens_it_names(pooling):
    outputs = run(text(pooling=pooling), IDS)
    tokens, pooled = np.asarray(outputs["tokens"]), np.asarray(outputs["pooled"])
    assert pooled.shape == (2, 16) and pooled.dtype == np.float32
    expected = {
        TextPooling.LAST: tokens[:, -1],
        # Of equal ids the first: 9 stands at 1 and at 2.
        TextPooling.LARGEST_ID: np.stack([tokens[0, 1], tokens[1, 2]]),
        TextPooling.AVERAGE: tokens.mean(axis=1),
    }
    if pooling in expected:
        np.testing.assert_allclose(pooled, expected[pooling], atol=1e-6)


def test_ids_beyond_the_vocabulary_are_not_a_number():
    outputs = run(text(), IDS.at[1, 0].set(10))
    assert np.isfinite(outputs["pooled"][0]).all()
    assert np.isnan(outputs["pooled"][1]).any()


def test_texts_that_do_not_fit_and_other_fields_are_refused():
    with pytest.raises(ValueError, match="at most length=4 tokens and got 5"):
        run(text(), jnp.zeros((1, 5), jnp.int32))
    with pytest.raises(ValueError, match="width=16 does not divide over num_heads=3"):
        text(num_heads=3)
    with pytest.raises(ValueError, match="vocabulary=0: must be at least 1"):
        text(vocabulary=0)


def towers(**fields):
    given = dict(image_tower=vit(), text_tower=text(), features=6)
    return TwoTower(**given | fields)


def test_two_towers_give_unit_vectors_and_begin_where_they_are_told():
    model = towers(temperature=5.0, bias=-3.0)
    variables = jax.jit(model.init)(KEY, IMAGE)
    outputs = jax.jit(model.apply)(variables, IMAGE, IDS)
    for name in ("image_embedding", "text_embedding"):
        length = np.linalg.norm(outputs[name], axis=1)
        np.testing.assert_allclose(length, 1, rtol=1e-5)
    assert outputs["temperature"] == pytest.approx(5.0) and outputs["bias"] == -3
    assert variables["params"]["log_temperature"] == pytest.approx(np.log(5))
    # Each tower alone gives the same.
    alone = jax.jit(model.apply)(variables, text=IDS)
    assert "image_embedding" not in alone and "pooled" not in alone
    np.testing.assert_allclose(
        alone["text_embedding"], outputs["text_embedding"], atol=1e-6
    )
    alone = jax.jit(model.apply)(variables, IMAGE)
    np.testing.assert_allclose(
        alone["image_embedding"], outputs["image_embedding"], atol=1e-6
    )


@pytest.mark.slow
def test_images_alone_make_all_parameters_and_each_gets_a_gradient():
    model = towers()
    params = jax.jit(model.init)(KEY, IMAGE)["params"]
    both = jax.jit(model.init)(KEY, IMAGE, IDS)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, both)

    def loss(params):
        outputs = model.apply({"params": params}, IMAGE, IDS)
        logits = outputs["image_embedding"] @ outputs["text_embedding"].T
        return jnp.sin(logits * outputs["temperature"] + outputs["bias"]).sum()

    gradients = trees.flatten(jax.jit(jax.grad(loss))(moved(params)))
    # The softmax of attention does not depend on what is added to all its keys.
    still = [n for n, g in gradients.items() if not np.any(g) and "key/bias" not in n]
    assert not still


def test_without_bias_and_above_its_limit_the_temperature_is_that_of_clip():
    model = towers(temperature=1 / 0.07, temperature_max=100.0, bias=None)
    params = dict(jax.jit(model.init)(KEY, IMAGE)["params"])
    assert "bias" not in params
    params["log_temperature"] = jnp.float32(6.0)
    outputs = jax.jit(model.apply)({"params": params}, IMAGE)
    assert outputs["temperature"] == pytest.approx(100) and "bias" not in outputs


def test_towers_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="gives 16 values and features=6; use feat"):
        towers(project_image=False).init(KEY, IMAGE)
    plain = towers(project_image=False, features=16)
    params = jax.jit(plain.init)(KEY, IMAGE)["params"]
    assert "image_projection" not in params and "text_projection" in params
    with pytest.raises(ValueError, match="temperature=200.0 must be above 0 and at"):
        towers(temperature=200.0, temperature_max=100.0)


def captioner(**fields):
    return Captioner(encoder=vit(), vocabulary=10, length=4, decoder_depth=2, **fields)


@functools.cache
def made(model):
    """(parameters, the captioner as one program)."""
    given = {"params": KEY, "mask": KEY}
    params = moved(jax.jit(model.init)(given, IMAGE, IDS)["params"])
    return params, jax.jit(model.apply)


def captions(model, ids, image=IMAGE):
    params, apply = made(model)
    return apply({"params": params}, image, ids, rngs={"mask": KEY})


def test_a_caption_is_predicted_from_the_image_and_the_ids_before():
    model = captioner(parallel_prediction=0.0)
    logits = captions(model, IDS)["token_logits"]
    assert logits.shape == (2, 4, 10)
    for place in range(4):
        other = captions(model, IDS.at[:, place].set(7))["token_logits"]
        same = np.isclose(logits, other, atol=1e-6).all(axis=(0, 2))
        assert same.tolist() == [n <= place for n in range(4)]
    other = captions(model, IDS, IMAGE[::-1])["token_logits"]
    assert not np.isclose(logits, other, atol=1e-6).all(axis=2).any()


def test_in_parallel_no_id_of_the_caption_is_seen():
    model = captioner(parallel_prediction=1.0)
    outputs, other = captions(model, IDS), captions(model, (IDS + 1) % 10)
    np.testing.assert_array_equal(outputs["token_logits"], other["token_logits"])
    assert outputs["parallel"].all()


@pytest.mark.slow
def test_the_share_in_parallel_is_drawn_for_each_caption():
    ids = jnp.tile(IDS, (200, 1))
    model = captioner(parallel_prediction=0.75)
    parallel = captions(model, ids, jnp.tile(IMAGE, (200, 1, 1, 1)))["parallel"]
    # Three deviations of 400 draws.
    assert 0.685 < np.mean(parallel) < 0.815
    with pytest.raises(ValueError, match="is a share of the examples; use 0.75"):
        captioner(parallel_prediction=1.5)


def test_captioning_equals_a_loop_over_ids_that_are_no_padding():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3, 4, 10))
    ids = np.array([[3, 9, 1, 0], [2, 2, 9, 4], [0, 0, 0, 0]])

    def forward(*, image, text):
        return {
            "token_logits": jnp.asarray(logits, jnp.float32),
            "pooled": jnp.ones((3, 2)),
            "parallel": jnp.zeros(3, bool),
        }

    batch = {"image": IMAGE, "text": jnp.asarray(ids, jnp.int32)}
    losses, metrics = Captioning()(forward, batch, KEY)
    for i in range(3):
        places = [n for n in range(4) if ids[i, n]]
        by_hand = [
            np.log(np.exp(logits[i, n]).sum()) - logits[i, n, ids[i, n]] for n in places
        ]
        right = [logits[i, n].argmax() == ids[i, n] for n in places]
        assert losses[i] == pytest.approx(np.mean(by_hand) if places else 0, rel=1e-5)
        accuracy = np.mean(right) if places else 0
        assert metrics["id_accuracy"][i] == pytest.approx(accuracy)
    with pytest.raises(ValueError, match=r"shape \(3, 1, 4\); one caption"):
        Captioning()(forward, {**batch, "text": batch["text"][:, None]}, KEY)


@pytest.mark.slow
def test_every_parameter_of_the_captioner_gets_a_gradient_and_decodes_no_bias():
    model = captioner(parallel_prediction=0.5)
    params = moved(jax.jit(model.init)({"params": KEY, "mask": KEY}, IMAGE)["params"])
    assert not [
        n
        for n in trees.names(params)
        if "decoder" in n and "attention/" in n and n.endswith("bias")
    ]

    def loss(params):
        found = jax.jit(model.apply)({"params": params}, IMAGE, IDS, rngs={"mask": KEY})
        return jnp.sin(found["token_logits"]).sum()

    gradients = trees.flatten(jax.jit(jax.grad(loss))(params))
    still = [n for n, g in gradients.items() if not np.any(g) and "key/bias" not in n]
    assert not still
