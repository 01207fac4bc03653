import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_lite.models.distilled import Distilled, resized
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.distillation import (
    FeatureDistillation,
    LogitDistillation,
    Target,
)

R = np.random.default_rng(0)
STUDENT, FIRST, SECOND = (R.normal(0, 2, (4, 5)).astype(np.float32) for _ in range(3))
LABELS = np.array([0, 4, 2, 2], np.int32)
KEY = jax.random.key(0)


def run(objective, teachers=(FIRST, SECOND), **outputs):
    given = {"logits": jnp.asarray(STUDENT), **outputs}
    for index, logits in enumerate(teachers):
        given[f"teacher_{index}"] = {
            "logits": jnp.asarray(logits),
            "pooled": jnp.asarray(logits[:, :3]),
        }
    batch = {"image": jnp.zeros((4, 1, 1, 1)), "label": jnp.asarray(LABELS)}
    return objective(lambda image: given, batch, KEY)


def softmax(x):
    x = np.exp(x.astype(np.float64))
    return x / x.sum(axis=-1, keepdims=True)


def test_soft_targets_are_the_mean_of_the_teachers_probabilities():
    losses, metrics = run(LogitDistillation(temperature=2.0))
    target = (softmax(FIRST / 2) + softmax(SECOND / 2)) / 2
    log_p = np.log(softmax(STUDENT / 2))
    expected = 4 * (target * (np.log(target) - log_p)).sum(axis=1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    agree = STUDENT.argmax(axis=1) == target.argmax(axis=1)
    np.testing.assert_array_equal(metrics["agreement"], agree)


def test_hard_targets_and_labels_are_mixed_as_said():
    objective = LogitDistillation(target=Target.HARD, label_weight=0.25)
    losses, metrics = run(objective, teachers=(FIRST,))
    log_p = np.log(softmax(STUDENT))
    hard = -log_p[np.arange(4), FIRST.argmax(axis=1)]
    known = -log_p[np.arange(4), LABELS]
    np.testing.assert_allclose(losses, 0.75 * hard + 0.25 * known, rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], STUDENT.argmax(1) == LABELS)


def test_a_teacher_that_agrees_costs_nothing():
    losses, _ = run(LogitDistillation(), teachers=(STUDENT,))
    np.testing.assert_allclose(losses, 0, atol=1e-6)


def test_features_are_compared_by_their_cosine():
    adapted = R.normal(0, 1, (4, 3)).astype(np.float32)
    losses, metrics = run(
        FeatureDistillation(),
        adapted_0=jnp.asarray(adapted),
        adapted_1=jnp.asarray(SECOND[:, :3]),
    )
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    first = 1 - (unit(adapted) * unit(FIRST[:, :3])).sum(axis=1)
    np.testing.assert_allclose(metrics["distance_teacher_0"], first, atol=1e-6)
    np.testing.assert_allclose(metrics["distance_teacher_1"], 0, atol=1e-6)
    np.testing.assert_allclose(losses, first / 2, atol=1e-6)


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match=r"no teachers; distillation takes"):
        run(LogitDistillation(), teachers=())
    with pytest.raises(ValueError, match="teacher_0 has 4 classes, the student 5"):
        run(LogitDistillation(), teachers=(FIRST[:, :4],))
    with pytest.raises(ValueError, match=r"adaptors=true"):
        run(FeatureDistillation())
    for fields in ({"temperature": 0.0}, {"label_weight": 1.5}):
        with pytest.raises(ValueError, match="above 0, the weight in 0..1"):
            LogitDistillation(**fields)


def vit(**fields):
    return ViT(width=8, depth=1, mlp_dim=8, num_heads=1, **{"patch_size": 4} | fields)


def test_teachers_see_the_size_that_they_want_and_give_no_gradient():
    model = Distilled(
        student=vit(),
        teachers=(vit(), vit(patch_size=16)),
        teacher_size_px=(8, 32),
        adaptors=True,
        adaptor_width=4,
    )
    images = jnp.asarray(R.integers(0, 256, (2, 8, 8, 3)), jnp.uint8)
    variables = jax.jit(model.init)(KEY, images)

    def loss(params):
        found = model.apply({"params": params}, images)
        return sum(found[f"teacher_{i}"]["pooled"].sum() for i in range(2))

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    assert not any(np.any(x) for x in jax.tree.leaves(gradients))
    found = jax.jit(model.apply)(variables, images)
    alone = jax.jit(vit(patch_size=16).apply)(
        {"params": variables["params"]["teachers_1"]}, resized(images, 32)
    )
    second = found["teacher_1"]["pooled"]
    np.testing.assert_allclose(second, alone["pooled"], atol=1e-6)
    assert found["adapted_1"].shape == (2, 8)


def test_teachers_are_there_and_each_has_a_size():
    with pytest.raises(ValueError, match="has no teachers; give teachers="):
        Distilled(student=vit(), teachers=())
    with pytest.raises(ValueError, match="another length than the 1 teachers"):
        Distilled(student=vit(), teachers=(vit(),), teacher_size_px=(8, 9))
