import jax
import numpy as np
import pytest
from evaluation_context import Damaged, Network, make_context, make_mesh, make_state
from tables import table, write_table

from big_vision_lite.data.ops import Decode
from big_vision_lite.data.sources.arrays import InMemory
from big_vision_lite.evaluators.loss import Loss
from big_vision_lite.evaluators.regression import Regression, ranks
from big_vision_lite.evaluators.regression import score as score_rows
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.objectives.regression import Regression as Objective

RNG = np.random.default_rng(0)
TARGETS = np.float32(RNG.normal((170, -2), (9, 0.1), (41, 2)))
# With ties, as of a model that has learnt little.
PREDICTED = np.float32(np.round(TARGETS + RNG.normal(0, (5, 0.2), (41, 2)), 1))


def objective(names=("a", "b"), mean=(168.0, -2.05), std=(8.0, 0.2)):
    return Objective(names=names, mean=mean, std=std)


def test_scores_equal_those_of_scikit_learn_and_scipy():
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    found, undefined = score_rows(PREDICTED, TARGETS, objective())
    assert not undefined
    target, predicted = np.float64(TARGETS), np.float64(PREDICTED)
    constant = np.broadcast_to([168, -2.05], target.shape)
    expected = {}
    for suffix, guess in (("", predicted), ("_of_mean", constant)):
        arguments = {"y_true": target, "y_pred": guess, "multioutput": "raw_values"}
        expected[f"r2{suffix}"] = metrics.r2_score(**arguments)
        expected[f"mae{suffix}"] = metrics.mean_absolute_error(**arguments)
        expected[f"rmse{suffix}"] = np.sqrt(metrics.mean_squared_error(**arguments))
    expected["spearman"] = [
        stats.spearmanr(predicted[:, t], target[:, t]).statistic for t in (0, 1)
    ]
    named = {
        f"{kind}/{name}": value
        for kind, values in expected.items()
        for name, value in zip("ab", values, strict=True)
    }
    for kind, values in expected.items():
        if kind.startswith(("r2", "spearman")):
            named[kind] = np.mean(values)
        else:
            named[f"{kind}_in_std"] = np.mean(values / np.array([8, 0.2]))
    assert found == pytest.approx(named, rel=1e-12)
    one, _ = score_rows(
        PREDICTED[:, :1], TARGETS[:, :1], objective(("a",), (168.0,), (8.0,))
    )
    assert one == {n[:-2]: x for n, x in found.items() if n.endswith("/a")}


def test_ranks_equal_a_double_loop():
    values = np.array([3.0, 1, 3, 2, 3, 1])
    slow = [(values < x).sum() + ((values == x).sum() + 1) / 2 for x in values]
    np.testing.assert_array_equal(ranks(values), slow)


def test_what_is_not_defined_is_left_out_and_named():
    same = np.ones((5, 2), np.float32)
    same[:, 1] = TARGETS[:5, 1]
    found, undefined = score_rows(same, same, objective())
    assert undefined == ["r2/a", "r2_of_mean/a", "spearman/a"]
    assert found["r2"] == found["spearman"] == 1
    assert found["mae/a"] == 0 and "r2/a" not in found
    assert all(np.isfinite(list(found.values())))
    one, undefined = score_rows(PREDICTED[:1], TARGETS[:1], objective())
    assert "r2" not in one and "rmse/b" in one and len(undefined) == 6


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"))


def run(evaluator, workdir, fitted, devices=8, messages=None):
    mesh, model = make_mesh(devices), Network(num_classes=len(fitted.names))
    with jax.set_mesh(mesh):
        context = make_context(
            workdir,
            mesh,
            model,
            fitted.names,
            objective=fitted,
            messages=messages,
            ops=(Decode(channels=1),),
        )
        return evaluator.prepare(context)(make_state(model, mesh, (8, 8, 1)))


def test_targets_are_found_by_name_and_the_devices_do_not_count(path, tmp_path):
    source = table(path, "grey", "tilt", kind="numbers")
    fitted = Objective.fitted(source.targets, source.class_names)
    one, eight = (
        run(Regression(source=source, batch_size=8), tmp_path, fitted, devices)
        for devices in (1, 8)
    )
    # Products are added in another order.
    assert one == pytest.approx(eight, rel=1e-4)
    assert one["examples"] == 24
    # The mean of these very targets explains nothing of them.
    assert one["r2_of_mean"] == pytest.approx(0, abs=1e-6)
    assert one["rmse_of_mean_in_std"] == pytest.approx(1, rel=1e-6)
    other = table(path, "top", "tilt", "grey", kind="numbers")
    assert run(Regression(source=other, batch_size=8), tmp_path, fitted) == eight
    with pytest.raises(ValueError, match=r"no target tilt.*has grey.*label=\('grey'"):
        only = table(path, "grey", kind="numbers")
        run(Regression(source=only, batch_size=8), tmp_path, fitted)


def test_the_loss_is_that_of_the_right_targets_in_any_order(path, tmp_path):
    source = table(path, "grey", "tilt", kind="numbers")
    fitted = Objective.fitted(source.targets, source.class_names)
    swapped = table(path, "tilt", "grey", kind="numbers")
    found, other = (
        run(Loss(source=s, batch_size=8), tmp_path, fitted) for s in (source, swapped)
    )
    assert found == other
    with pytest.raises(ValueError, match="the model predicts grey, tilt; name all"):
        only = table(path, "tilt", kind="numbers")
        run(Loss(source=only, batch_size=8), tmp_path, fitted)


def test_unreadable_images_are_counted_and_named(path, tmp_path):
    source = table(path, "grey", kind="numbers")
    fitted = Objective.fitted(source.targets, source.class_names)
    messages = []
    evaluator = Regression(source=Damaged(source, (3, 5)), batch_size=8)
    found = run(evaluator, tmp_path, fitted, messages=messages)
    assert (found["examples"], found["unreadable"]) == (22, 2)
    assert any("2 of 24 examples are unreadable" in m for m in messages)


def test_what_cannot_be_scored_is_refused_before_the_first_step(path, tmp_path):
    source = table(path, "grey", kind="numbers")
    fitted = Objective.fitted(source.targets, source.class_names)
    with pytest.raises(ValueError, match="batch_size starts at 1"):
        Regression(source=source, batch_size=0)
    classes = InMemory(np.zeros((3, 8, 8), np.uint8), np.arange(3), ("grey", "b", "c"))
    with pytest.raises(ValueError, match="has no target, only image, label"):
        run(Regression(source=classes, batch_size=8), tmp_path, fitted)
    mesh = make_mesh(1)
    context = make_context(tmp_path, mesh, Network(), objective=SoftmaxClassification())
    with pytest.raises(ValueError, match="SoftmaxClassification, which predicts no"):
        Regression(source=source, batch_size=8).prepare(context)
