"""Losses without labels give the numbers that numpy gave, apart from this program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_context import make_mesh

from big_vision_lite.objectives.contrastive import NTXent
from big_vision_lite.objectives.distillation import LogitDistillation
from big_vision_lite.objectives.regularised import LeJEPA, VICReg, sigreg
from big_vision_lite.objectives.self_distillation import (
    Balance,
    SelfDistillation,
    koleo,
    sinkhorn,
)
from big_vision_lite.runtime import layout

KEY = jax.random.key(0)
R = np.random.default_rng(0)
TEACHER, STUDENT = R.standard_normal((6, 4)), R.standard_normal((6, 4))
KOLEO = R.standard_normal((8, 5))
_ = R.standard_normal((2, 2, 6, 5))
POINTS, DIRECTIONS = R.standard_normal((64, 8)), R.standard_normal((8, 16))


def f32(x):
    return jnp.asarray(x, jnp.float32)


def everything(count):
    return jnp.ones(count, bool)


def test_sinkhorn_is_the_known_one():
    found = sinkhorn(f32(TEACHER) / 0.07, everything(6))
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(found[0], [0.999594, 0, 0.000403, 3e-6], atol=1e-5)
    columns = found.mean(axis=0)
    np.testing.assert_allclose(
        columns, [0.314271, 0.311733, 0.152912, 0.221084], atol=1e-5
    )
    loss = -(found * jax.nn.log_softmax(f32(STUDENT) / 0.1)).sum(axis=1).mean()
    assert loss == pytest.approx(10.458596, rel=1e-5)


def test_sinkhorn_takes_scores_that_overflow_and_leaves_padding_out():
    shifted = sinkhorn(f32(TEACHER) / 0.07 + 500, everything(6))
    known = sinkhorn(f32(TEACHER) / 0.07, everything(6))
    np.testing.assert_allclose(shifted, known, atol=1e-4)
    # Neither padding nor a row far above the others takes their digits.
    padded = jnp.concatenate([f32(TEACHER), jnp.full((2, 4), 9.0)]) / 0.07
    found = sinkhorn(padded, jnp.arange(8) < 6)
    np.testing.assert_allclose(found[:6], known, atol=1e-6)
    assert not np.any(found[6:])
    far = sinkhorn(f32(TEACHER).at[0].add(90) / 0.07, everything(6))
    np.testing.assert_allclose(far.sum(axis=1), 1, atol=1e-5)


def test_koleo_is_the_known_one():
    assert koleo(f32(KOLEO), everything(8)) == pytest.approx(0.423923, abs=1e-5)
    padded = jnp.concatenate([f32(KOLEO), f32(KOLEO[:2])])
    found = koleo(padded, jnp.arange(10) < 8)
    assert found == pytest.approx(0.423923, abs=1e-5)


def test_sigreg_is_the_known_one_and_large_when_all_is_one_point():
    directions = f32(DIRECTIONS / np.linalg.norm(DIRECTIONS, axis=0))
    z = f32(POINTS)[:, None, :]
    found = sigreg(z, directions, everything(64))
    assert found == pytest.approx(0.574365, rel=1e-5)
    same = jnp.broadcast_to(z[:1], z.shape)
    assert sigreg(same, directions, everything(64)) == pytest.approx(94.62, abs=0.005)
    padded = jnp.concatenate([z, 7 * z[:9]])
    found = sigreg(padded, directions, jnp.arange(73) < 64)
    assert found == pytest.approx(0.574365, rel=1e-5)


VIEWS = f32(np.random.default_rng(1).standard_normal((5, 2, 1, 1, 3)))


class Given:
    """A model whose outputs are functions of the views it is given."""

    progress = jnp.float32(0.5)

    def __init__(self, **outputs):
        self.outputs, self.observed = outputs, []

    def __call__(self, *, method=None, params="online", **inputs):
        if method == "observe":
            self.observed.append(inputs["means"]["centre"])
            return {}
        x = inputs["image"].reshape(len(inputs["image"]), -1)
        found = {name: function(x) for name, function in self.outputs.items()}
        if params == "ema":
            found["scores"] = 0.5 * found["scores"][:, ::-1]
        return {"pooled": x, "embedding": x, **found}


def run(objective, forward=None, views=VIEWS, **more):
    forward = forward or Given()
    batch = {"views": views, **more}
    losses, metrics = objective(forward, batch, jax.random.key(0))
    assert losses.shape == (len(views),) and losses.dtype == jnp.float32
    return np.asarray(losses), metrics


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_nt_xent_equals_a_double_loop():
    losses, metrics = run(NTXent(temperature=0.2))
    z = unit(np.asarray(VIEWS, np.float64).reshape(10, 3))
    retrieved = 0
    for b in range(5):
        by_hand = []
        for v in range(2):
            i, positive = 2 * b + v, 2 * b + 1 - v
            scores = {j: z[i] @ z[j] / 0.2 for j in range(10) if j != i}
            total = np.log(sum(np.exp(list(scores.values()))))
            by_hand.append(total - scores[positive])
            retrieved += max(scores, key=scores.get) == positive
        assert losses[b] == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert np.mean(metrics["retrieved"]) == pytest.approx(retrieved / 10)


def test_nt_xent_leaves_padding_out():
    alone, _ = run(NTXent())
    padded = jnp.concatenate([VIEWS, 3 * VIEWS[:2]])
    found, _ = run(NTXent(), views=padded, valid=jnp.arange(7) < 5)
    np.testing.assert_allclose(found[:5], alone, rtol=1e-5)


def test_vicreg_equals_its_formula():
    losses, _ = run(VICReg())
    z = np.asarray(VIEWS, np.float64).reshape(5, 2, 3)
    variance = covariance = 0
    for v in range(2):
        matrix = np.cov(z[:, v].T)
        variance += np.maximum(0, 1 - np.sqrt(np.diag(matrix) + 1e-4)).mean() / 2
        covariance += (matrix**2).sum() / 3 - (np.diag(matrix) ** 2).sum() / 3
    for b in range(5):
        invariance = ((z[b, 0] - z[b, 1]) ** 2).mean()
        expected = 25 * invariance + 25 * variance + covariance
        assert losses[b] == pytest.approx(expected, rel=1e-5)
    padded = jnp.concatenate([VIEWS, 3 * VIEWS[:2]])
    found, _ = run(VICReg(), views=padded, valid=jnp.arange(7) < 5)
    np.testing.assert_allclose(found[:5], losses, rtol=1e-5)


def test_lejepa_is_prediction_and_sigreg():
    losses, metrics = run(LeJEPA(weight=0.25, directions=32))
    z = np.asarray(VIEWS, np.float64).reshape(5, 2, 3)
    directions = np.asarray(jax.random.normal(jax.random.key(0), (3, 32)), np.float64)
    directions /= np.linalg.norm(directions, axis=0)
    t = np.linspace(0, 3, 17)
    total = []
    for v in range(2):
        for m in range(32):
            x = z[:, v] @ directions[:, m]
            real = np.cos(np.outer(t, x)).mean(axis=1) - np.exp(-(t**2) / 2)
            imaginary = np.sin(np.outer(t, x)).mean(axis=1)
            error = (real**2 + imaginary**2) * np.exp(-(t**2) / 2)
            total.append(5 * 2 * np.trapezoid(error, t))
    assert metrics["sigreg"] == pytest.approx(np.mean(total), rel=1e-4)
    for b in range(5):
        prediction = ((z[b] - z[b].mean(axis=0)) ** 2).mean()
        expected = 0.75 * prediction + 0.25 * np.mean(total)
        assert losses[b] == pytest.approx(expected, rel=1e-4)


def scores(x):
    return x @ f32([[1, 0, 2, -1], [0, 1, -1, 3], [1, 1, 0, 0]])


def test_self_distillation_is_the_mean_over_pairs_of_other_views():
    local = f32(np.random.default_rng(2).standard_normal((5, 3, 1, 1, 3)))
    objective = SelfDistillation(local_views="local", teacher_temperature=0.5)
    losses, metrics = run(objective, Given(scores=scores), local=local)
    flat = np.asarray(VIEWS, np.float64).reshape(10, 3)
    matrix = np.asarray(scores(jnp.eye(3)), np.float64)
    teacher = 0.5 * (flat @ matrix)[:, ::-1]
    targets = np.asarray(sinkhorn(f32(teacher / 0.5), everything(10)))
    targets = targets.reshape(5, 2, 4)
    views = np.concatenate([VIEWS, local], axis=1).reshape(5, 5, 3).astype(np.float64)
    for b in range(5):
        by_hand = []
        for g in range(2):
            for v in range(5):
                if g != v:
                    z = views[b, v] @ matrix / 0.1
                    log_shares = z - np.log(np.exp(z - z.max()).sum()) - z.max()
                    by_hand.append(-(targets[b, g] * log_shares).sum())
        assert len(by_hand) == 2 + 2 * 3
        assert losses[b] == pytest.approx(np.mean(by_hand), rel=1e-4)
    used = len(set(targets.argmax(axis=-1).ravel()))
    assert metrics["prototypes_used"] == used


def test_koleo_is_added_for_each_global_view():
    plain, _ = run(SelfDistillation(), Given(scores=scores))
    more, _ = run(SelfDistillation(koleo_weight=0.1), Given(scores=scores))
    pooled = VIEWS.reshape(5, 2, 3)
    apart = sum(koleo(pooled[:, v], everything(5)) for v in range(2))
    np.testing.assert_allclose(more - plain, 0.1 * float(apart), rtol=1e-3)


def test_a_centre_is_subtracted_and_observed_afterwards():
    centre = f32([0.1, 0.2, 0.3, 0.4])
    forward = Given(scores=scores, centre=lambda x: centre)
    objective = SelfDistillation(balance=Balance.CENTRE, teacher_temperature=0.5)
    losses, metrics = run(objective, forward)
    teacher = 0.5 * scores(VIEWS.reshape(10, 3))[:, ::-1]
    (observed,) = forward.observed
    np.testing.assert_allclose(observed, teacher.mean(axis=0), rtol=1e-5)
    targets = jax.nn.softmax((teacher - centre) / 0.5).reshape(5, 2, 4)
    log_shares = jax.nn.log_softmax(scores(VIEWS.reshape(10, 3)) / 0.1)
    log_shares = log_shares.reshape(5, 2, 4)
    for b in range(5):
        pairs = [-(targets[b, g] * log_shares[b, 1 - g]).sum() for g in range(2)]
        assert losses[b] == pytest.approx(np.mean(pairs), rel=1e-5)
    with pytest.raises(ValueError, match="centre_momentum=0.9, or balance=sinkhorn"):
        run(objective, Given(scores=scores))


def test_the_teacher_s_temperature_grows_over_its_part_of_the_run():
    objective = SelfDistillation(
        teacher_temperature=0.6, teacher_temperature_start=0.2, teacher_warmup=1.0
    )
    halfway, _ = run(objective, Given(scores=scores))
    fixed, _ = run(SelfDistillation(teacher_temperature=0.4), Given(scores=scores))
    np.testing.assert_allclose(halfway, fixed, rtol=1e-6)


def test_no_gradient_reaches_the_teacher():
    def loss(weight):
        def forward(*, params="online", **inputs):
            x = inputs["image"].reshape(10, 3)
            used = weight if params == "ema" else jax.lax.stop_gradient(weight)
            return {"scores": scores(x) * used, "pooled": x, "embedding": x}

        return run_traced(forward)

    def run_traced(forward):
        batch = {"views": VIEWS}
        losses, _ = SelfDistillation()(forward, batch, jax.random.key(0))
        return losses.mean()

    assert jax.grad(loss)(1.0) == 0


@pytest.mark.parametrize(
    "objective", [NTXent(), VICReg(), LeJEPA(), SelfDistillation()], ids=repr
)
def test_eight_devices_give_the_loss_of_one(objective):
    views = f32(np.random.default_rng(3).standard_normal((16, 2, 1, 1, 3)))
    forward = Given(scores=scores)

    def loss(views):
        losses, _ = objective(forward, {"views": views}, jax.random.key(0))
        return losses

    one = jax.jit(loss)(views)
    place = layout.batch_sharding(make_mesh(8))
    eight = jax.jit(loss)(jax.device_put(views, place))
    np.testing.assert_allclose(eight, one, rtol=2e-6)


@pytest.mark.parametrize(
    "objective", [NTXent(), VICReg(), LeJEPA(), SelfDistillation()], ids=repr
)
def test_views_that_are_not_there_are_asked_for(objective):
    forward = Given(scores=scores)
    with pytest.raises(ValueError, match='no views "views". Make them by an op'):
        objective(forward, {"image": jnp.zeros((4, 2, 2, 3))}, jax.random.key(0))
    with pytest.raises(ValueError, match="holds 1 views an image, and at least 2"):
        run(objective, forward, views=VIEWS[:, :1])


@pytest.mark.parametrize("objective", [NTXent(), SelfDistillation()], ids=repr)
def test_a_batch_of_one_image_is_refused(objective):
    with pytest.raises(ValueError, match="A batch of one image"):
        run(objective, Given(scores=scores), views=VIEWS[:1])


def test_numbers_that_mean_nothing_are_refused():
    for make in (
        lambda: NTXent(temperature=0.0),
        lambda: LeJEPA(weight=1.5),
        lambda: LeJEPA(views=()),
        lambda: SelfDistillation(teacher_temperature=0.0),
        lambda: SelfDistillation(teacher_warmup=0.0),
    ):
        with pytest.raises(ValueError, match=r"temperature|weight|views"):
            make()


def test_distillation_is_the_known_one():
    r = np.random.default_rng(0)
    for shape in ((6, 4), (6, 4), (8, 5), (2, 6, 5), (2, 6, 5), (64, 8), (8, 16)):
        r.standard_normal(shape)
    r.standard_normal((4, 3)), r.standard_normal((4, 3))
    r.uniform(0.5, 9, 50), r.uniform(0.5, 9, 50), r.standard_normal(8)
    teacher, student = r.standard_normal((3, 5)), r.standard_normal((3, 5))

    def forward(image):
        return {"logits": f32(student), "teacher_0": {"logits": f32(teacher)}}

    objective = LogitDistillation(temperature=2.0)
    losses, _ = objective(forward, {"image": jnp.zeros((3, 1, 1, 1))}, KEY)
    assert losses.mean() == pytest.approx(1.203911, rel=1e-5)
