import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import rows, start

from big_vision_lite import trees
from big_vision_lite.models.distilled import Distilled, Queue, resized
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.distillation import (
    Distance,
    FeatureDistillation,
    LogitDistillation,
    QueueDistillation,
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


def test_a_distillation_token_learns_from_teachers_and_the_class_token_from_labels():
    by_token, by_class = (R.normal(0, 2, (4, 5)).astype(np.float32) for _ in range(2))
    parts = {
        "distillation_logits": jnp.asarray(by_token),
        "class_logits": jnp.asarray(by_class),
    }
    objective = LogitDistillation(target=Target.HARD, label_weight=0.5)
    losses, _ = run(objective, teachers=(FIRST,), **parts)
    hard = -np.log(softmax(by_token))[np.arange(4), FIRST.argmax(axis=1)]
    known = -np.log(softmax(by_class))[np.arange(4), LABELS]
    np.testing.assert_allclose(losses, (hard + known) / 2, rtol=1e-5)
    with pytest.raises(ValueError, match=r"label_weight=0.5.*distillation_token=false"):
        run(LogitDistillation(), teachers=(FIRST,), **parts)


def test_standardised_features_are_compared_by_their_mean_square():
    adapted, standard = R.normal(0, 1, (2, 4, 3)).astype(np.float32)
    given = {"adapted_0": jnp.asarray(adapted), "standard_0": jnp.asarray(standard)}
    objective = FeatureDistillation(distance=Distance.PHI_S)
    losses, metrics = run(objective, teachers=(FIRST,), **given)
    expected = ((adapted - standard) ** 2).mean(axis=1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["distance_teacher_0"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="model.standardise_steps=50"):
        run(objective, teachers=(FIRST,), adapted_0=jnp.asarray(adapted))


def lengths_one(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_neighbours_in_the_queue_are_pseudo_classes():
    adapted = R.normal(0, 1, (4, 3)).astype(np.float32)
    queue = lengths_one(R.normal(0, 1, (6, 3)).astype(np.float32))
    queue[5] = 0
    given = {
        "adapted_0": jnp.asarray(adapted),
        "queue_0": jnp.asarray(queue),
        "queue_0_filled": jnp.asarray(5),
    }
    losses, metrics = run(QueueDistillation(), teachers=(FIRST,), **given)
    expected, entropies = [], []
    for mine, theirs in zip(
        lengths_one(adapted), lengths_one(FIRST[:, :3]), strict=True
    ):
        p = np.array([np.exp(theirs @ queue[j] / 0.07) for j in range(5)])
        q = np.array([np.exp(mine @ queue[j] / 0.07) for j in range(5)])
        p, q = p / p.sum(), q / q.sum()
        expected.append(-(p * np.log(q)).sum())
        entropies.append(-(p * np.log(p)).sum())
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["teacher_entropy"], entropies, atol=1e-4)
    assert np.isfinite(run(QueueDistillation(), teachers=(FIRST,), **given | {
        "queue_0_filled": jnp.asarray(0)})[0]).all()  # fmt: skip
    with pytest.raises(ValueError, match="model.queue_length=8192"):
        run(QueueDistillation(), teachers=(FIRST,), adapted_0=jnp.asarray(adapted))
    with pytest.raises(ValueError, match=r"QueueDistillation compares .*adaptors=true"):
        run(QueueDistillation(), teachers=(FIRST,), queue_0=jnp.asarray(queue))
    with pytest.raises(ValueError, match=r"temperature=0.0\) must be above 0"):
        QueueDistillation(temperature=0.0)


def test_the_queue_holds_the_last_images_the_newest_first():
    module, variables = Queue(length=5), {}
    batches = R.normal(0, 1, (3, 2, 4)).astype(np.float32)
    for count, batch in enumerate(batches, 1):
        (rows, filled), variables = module.apply(
            variables, jnp.asarray(batch), True, mutable=["queues"]
        )
        assert filled == min(5, 2 * count)
        np.testing.assert_array_equal(rows[:2], batch)
    newest = np.concatenate([*batches[2], *batches[1], batches[0][0]]).reshape(5, 4)
    np.testing.assert_array_equal(rows, newest)
    (read, filled), _ = module.apply(
        variables, jnp.asarray(batches[0]), False, mutable=["queues"]
    )
    np.testing.assert_array_equal(read, newest)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("kind", ["queue", "phi_s"])
def test_what_is_kept_of_the_teachers_is_global_over_devices(kind, devices):
    fields = {"queue": {"queue_length": 40}, "phi_s": {"standardise_steps": 2}}[kind]
    model = Distilled(
        student=vit(), teachers=(vit(),), adaptors=True, adaptor_width=4, **fields
    )
    objective = FeatureDistillation(distance=Distance.PHI_S)
    if kind == "queue":
        objective = QueueDistillation()
    found = []
    frozen = ("teachers_.*",)
    for count in (1, devices):
        # As a function: equal arguments of `start` share a step, and are hashed.
        loss = objective.__call__
        run = start(model, objective=loss, devices=count, freeze=frozen)
        metrics = run.advance(*(rows(seed=seed) for seed in range(3)))
        kept = trees.flatten(jax.device_get(run.state.collections))
        found.append(([m["loss"] for m in metrics], kept))
    (one, first), (other, second) = found
    np.testing.assert_allclose(other, one, rtol=2e-4)
    for name, value in first.items():
        if not name.endswith("kernel"):  # eigenvectors have no sign of their own
            np.testing.assert_allclose(second[name], value, atol=1e-5, err_msg=name)


def test_a_model_that_keeps_something_of_its_teachers_takes_whole_batches():
    model = Distilled(student=vit(), teachers=(vit(),), queue_length=4)
    with pytest.raises(ValueError, match=r"keeps queues.*micro_batches=1"):
        start(model, freeze=("teachers_.*",), micro_batches=2)


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


def test_teachers_see_the_size_and_range_that_they_want_and_give_no_gradient():
    # Other patches, so another number of tokens, and another range of values.
    second = vit(patch_size=16, mean=(10.0, 20.0, 30.0), std=(5.0,))
    model = Distilled(
        student=vit(),
        teachers=(vit(), second),
        teacher_size_px=(8, 32),
        adaptors=True,
        adaptor_width=4,
    )
    images = jnp.asarray(R.integers(0, 256, (2, 8, 8, 3)), jnp.uint8)
    assert model.notes({"image": images}) == [
        "teachers_1 sees the images of 8 x 8 px as 32 x 32 px (model.teacher_size_px)."
    ]
    variables = jax.jit(model.init)(KEY, images)

    def loss(params):
        found = model.apply({"params": params}, images)
        return sum(found[f"teacher_{i}"]["pooled"].sum() for i in range(2))

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    assert not any(np.any(x) for x in jax.tree.leaves(gradients))
    found = jax.jit(model.apply)(variables, images)
    alone = jax.jit(second.apply)(
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
    with pytest.raises(ValueError, match="queue_length=-1 is negative"):
        Distilled(student=vit(), teachers=(vit(),), queue_length=-1)
