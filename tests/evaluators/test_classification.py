"""Every image counts once, for the right class, on any number of devices."""

import contextlib
import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_context import (
    Damaged,
    Network,
    Pixels,
    make_context,
    make_mesh,
    make_state,
    score_images,
)

from big_vision_lite.config import MatchClasses
from big_vision_lite.data.ops import Decode
from big_vision_lite.data.sources import Digits, InMemory
from big_vision_lite.evaluators import per_class
from big_vision_lite.evaluators.average_precision import mean_average_precision
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.objectives.classification import (
    SigmoidClassification,
    SoftmaxClassification,
)
from big_vision_lite.runs.class_pairs import class_table
from big_vision_lite.training import step as step_lib
from big_vision_lite.types import Logits

NAMES = tuple("abcdefg")


def evaluate(tmp_path, source, *, devices=1, batch_size=8, model=None, **context):
    """Runs the evaluator on images whose pixels are the logits."""
    with prepared(tmp_path, source, devices, batch_size, model, context) as (run, at):
        return run(at)


@contextlib.contextmanager
def prepared(tmp_path, source, devices=1, batch_size=8, model=None, context=None):
    context = dict(context or {})
    match_classes = context.pop("match_classes", MatchClasses.BY_NAME)
    duplicates = context.pop("duplicates", None)
    model = model or Pixels()
    mesh = make_mesh(devices)
    shape = np.shape(source[0]["image"])
    if not isinstance(source[0]["image"], np.ndarray):
        shape = (1, 1, len(NAMES))
    with jax.set_mesh(mesh):
        state = make_state(model, mesh, shape, step=context.pop("step", 4))
        made = make_context(
            tmp_path,
            mesh,
            model,
            context.pop("class_names", source.class_names),
            image_shape=shape,
            **context,
        )
        evaluator = Classification(
            source=source,
            batch_size=batch_size,
            match_classes=match_classes,
            duplicates=duplicates,
        )
        yield evaluator.prepare(made), state


def per_class_table(tmp_path):
    with (tmp_path / "val_per_class.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def source():
    rng = np.random.default_rng(0)
    scores = np.stack([rng.permutation(256)[: len(NAMES)] for _ in range(29)])
    return InMemory(score_images(scores), rng.integers(0, 7, 29), NAMES)


def by_hand(source, names=None, label_smoothing=0.0):
    names = names or source.class_names
    given = [source[index] for index in range(29)]
    logits = np.stack([e["image"].reshape(-1) for e in given]) / np.float64(32)
    labels = np.array([names.index(source.class_names[e["label"]]) for e in given])
    order = np.argsort(-logits, axis=1)
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    of_label = log_softmax[np.arange(29), labels]
    recalls = [np.mean(order[labels == c, 0] == c) for c in range(7) if c in labels]
    smooth = label_smoothing * log_softmax.mean(axis=1)
    return {
        "accuracy": np.mean(order[:, 0] == labels),
        "balanced_accuracy": np.mean(recalls),
        "accuracy_top5": np.mean((order[:, :5] == labels[:, None]).any(axis=1)),
        "loss": -np.mean((1 - label_smoothing) * of_label + smooth),
        "examples": 29.0,
        "unreadable": 0.0,
    }


@pytest.mark.parametrize("batch_size", [8, 16, 32])
def test_scores_equal_those_counted_by_hand_whatever_the_padding(
    tmp_path, source, batch_size
):
    found = evaluate(tmp_path, source, batch_size=batch_size)
    assert found == pytest.approx(by_hand(source), rel=1e-6)
    assert found["accuracy"] == by_hand(source)["accuracy"]


def test_eight_devices_give_the_scores_of_one_to_the_last_bit(tmp_path, source):
    one = evaluate(tmp_path, source, devices=1)
    assert evaluate(tmp_path, source, devices=8) == one
    assert evaluate(tmp_path, source, devices=2, batch_size=16) == one


def test_the_loss_is_the_objective_s_own(tmp_path, source):
    plain = evaluate(tmp_path, source)
    smooth = SoftmaxClassification(label_smoothing=0.2)
    smoothed = evaluate(tmp_path, source, objective=smooth)
    assert smoothed == pytest.approx(by_hand(source, label_smoothing=0.2), rel=1e-6)
    assert smoothed["loss"] != plain["loss"]


def test_the_averaged_parameters_are_scored_when_there_are_any(tmp_path, source):
    mesh = make_mesh(1)
    with jax.set_mesh(mesh):
        model = Pixels()
        context = make_context(tmp_path, mesh, model, NAMES, image_shape=(1, 1, 7))
        run = Classification(source=source, batch_size=8).prepare(context)
        shape = (1, 1, 7)
        online = run(make_state(model, mesh, shape))
        average = run(make_state(model, mesh, shape, ema={"gain": jnp.float32(-1)}))
    assert online["accuracy"] == by_hand(source)["accuracy"]
    assert average["accuracy"] != online["accuracy"]


def test_classes_are_matched_by_name_not_by_number(tmp_path, source):
    model_names = NAMES[::-1]
    found = evaluate(tmp_path, source, class_names=model_names)
    assert found == pytest.approx(by_hand(source, model_names), rel=1e-6)
    assert found["accuracy"] != by_hand(source)["accuracy"]
    # The table names the model's classes, with the counts of the source's.
    counts = {row["class"]: int(row["count"]) for row in per_class_table(tmp_path)}
    labels = [NAMES[source[i]["label"]] for i in range(29)]
    assert counts == {name: labels.count(name) for name in NAMES}


def test_missing_classes_are_said_and_keep_the_indices_of_training(tmp_path):
    images = score_images(np.eye(7)[[6, 6, 2]] * 200)
    source = InMemory(images, np.array([1, 1, 0]), ("c", "g"))
    messages = []
    found = evaluate(tmp_path, source, class_names=NAMES, messages=messages)
    assert found["accuracy"] == 1.0
    assert messages == [
        "val has 2 of the 7 train classes (missing: a, b, d, e, f) - indices follow "
        "train."
    ]


def test_a_class_the_model_does_not_know_stops_at_once(tmp_path):
    source = InMemory(score_images([[1, 2]]), np.array([0]), ("a", "zebra"))
    with pytest.raises(ValueError, match="1 classes unknown to train: zebra"):
        evaluate(tmp_path, source, class_names=NAMES)


def test_the_same_classes_under_other_names_are_taken_in_order_where_asked(
    tmp_path, source
):
    """Hugging Face says "tench, Tinca tinca" where a data set says "n01440764"."""
    theirs = tuple(f"{name}, {name}" for name in NAMES)
    option = "--config.evaluators.val.match_classes=in_order"
    with pytest.raises(ValueError, match=f"7 classes unknown .*{option}"):
        evaluate(tmp_path, source, class_names=theirs)
    with pytest.raises(ValueError, match=f"of the same name .*{option}"):
        evaluate(tmp_path, source, class_names=("crane", "crane", *theirs[2:]))
    in_order = MatchClasses.IN_ORDER
    found = evaluate(tmp_path, source, class_names=theirs, match_classes=in_order)
    assert found == pytest.approx(by_hand(source), rel=1e-6)
    with pytest.raises(ValueError, match="val has 7 classes, train 3.*by_name"):
        evaluate(tmp_path, source, class_names=theirs[:3], match_classes=in_order)


def test_two_classes_of_one_name_are_refused_unless_the_order_is_the_same():
    twice = ("crane", "crane", "dog")
    assert class_table(twice, twice, name="val", ours_is="train").is_identity
    with pytest.raises(ValueError, match="train has classes of the same name .crane"):
        class_table(("dog", "crane"), twice, name="val", ours_is="train")


def test_an_image_with_several_labels_is_correct_if_any_is_predicted(tmp_path):
    top = np.array([0, 1, 2, 3])
    labels = np.zeros((4, 7), np.int32)
    labels[0, [0, 5]] = labels[1, [2, 1]] = labels[2, [3, 4]] = 1  # the last has none
    scores = np.eye(7)[top] * 100 + np.arange(7)
    source = InMemory(score_images(scores), labels, NAMES)
    found = evaluate(tmp_path, source, objective=SigmoidClassification())
    logits = scores[:3].astype(np.uint8) / 32
    loss = np.log1p(np.exp(-np.where(labels[:3] > 0, logits, -logits))).sum(axis=1)
    assert found["accuracy"] == 2 / 3
    assert found["accuracy_top5"] == 1.0
    assert found["examples"] == 3.0
    assert found["loss"] == pytest.approx(loss.mean(), rel=1e-6)
    # The last image is one of no class; "g" has no image and is left out.
    expected = mean_average_precision(scores, labels, NAMES, print)
    assert found["mean_average_precision"] == pytest.approx(expected) and expected < 1
    rows = {row["class"]: row for row in per_class_table(tmp_path)}
    assert [rows[n]["count"] for n in NAMES] == ["1", "1", "1", "1", "1", "1", "0"]
    assert [rows[n]["correct"] for n in NAMES] == ["1", "1", "0", "0", "0", "0", "0"]
    assert rows["g"]["accuracy"] == ""
    # Classes in another order change nothing.
    again = evaluate(
        tmp_path,
        InMemory(score_images(scores), labels[:, ::-1], NAMES[::-1]),
        objective=SigmoidClassification(),
        class_names=NAMES,
    )
    assert again == found


class Tagged:
    """Images of `source` whose labels, 0 and 1, are written as tags: ids from the last.

    They are at most `most`, padded with -1.
    """

    def __init__(self, source, most):
        self.source, self.most = source, most
        self.class_names, self.fingerprint = source.class_names, source.fingerprint

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        example = self.source[index]
        ids = np.flatnonzero(example["label"])[::-1]
        example["label"] = np.full(self.most, -1, np.int32)
        example["label"][: len(ids)] = ids
        return example

    def name(self, index):
        return self.source.name(index)


@pytest.mark.parametrize("order", [1, -1], ids=["same classes", "another order"])
def test_tags_are_scored_as_dense_labels_are(tmp_path, order):
    rng = np.random.default_rng(2)
    scores = np.stack([rng.permutation(256)[: len(NAMES)] for _ in range(19)])
    labels = rng.integers(0, 4, (19, 7)) == 0
    labels[4] = False
    dense = InMemory(score_images(scores), labels[:, ::order] * 1, NAMES[::order])
    objective = SoftmaxClassification(share_labels=True)
    fields = dict(objective=objective, class_names=NAMES)
    expected = evaluate(tmp_path / "dense", dense, **fields)
    found = evaluate(tmp_path / "tags", Tagged(dense, 9), **fields)
    assert expected.pop("mean_average_precision") > 0
    assert found == expected and found["examples"] < 19
    assert per_class_table(tmp_path / "tags") == per_class_table(tmp_path / "dense")


def of_duplicates(path, *rows, columns="place,image,training_image,likeness"):
    path.write_text("\n".join((columns, *rows)) + "\n")
    return str(path)


def test_the_lower_bound_counts_images_with_a_duplicate_wrong(tmp_path):
    scores = np.eye(7)[[0, 1, 2, 3, 4]] * 200
    source = InMemory(score_images(scores), np.array([0, 1, 2, 3, 0]), NAMES)
    place = "evaluators.val.source"
    path = of_duplicates(
        tmp_path / "same.csv",
        *(f"{place},image {i} of an array,x,1.0" for i in (1, 4)),
        "evaluators.other.source,image 2 of an array,x,1.0",
    )
    found = evaluate(tmp_path, source, devices=2, duplicates=path)
    # Image 4 is wrong anyway.
    assert found["accuracy"] == 4 / 5 and found["lower_bound_accuracy"] == 3 / 5
    assert found["with_duplicate"] == 2
    path = of_duplicates(tmp_path / "none.csv", f"{place},,,")
    found = evaluate(tmp_path, source, duplicates=path)
    assert found["lower_bound_accuracy"] == found["accuracy"]


@pytest.mark.parametrize(
    "rows, columns, words",
    [
        (("evaluators.val.source,photo.jpg,x,1",), None, "names 1 images that its set"),
        (("evaluators.test.source,,,",), None, "says nothing of evaluators.val.source"),
        ((), "image,other", "does not begin with the columns place,image"),
    ],
)
def test_a_file_of_other_duplicates_is_refused(tmp_path, source, rows, columns, words):
    columns = {} if columns is None else {"columns": columns}
    path = of_duplicates(tmp_path / "same.csv", *rows, **columns)
    with pytest.raises(ValueError, match=words):
        evaluate(tmp_path, source, duplicates=path)


def test_a_missing_file_of_duplicates_says_how_it_is_made(tmp_path, source):
    with pytest.raises(
        FileNotFoundError, match="python tools/find_duplicates.py --conf"
    ):
        evaluate(tmp_path, source, duplicates=str(tmp_path / "none.csv"))


def test_the_table_adds_up_and_is_continued_after_a_kill(tmp_path, source):
    for step in (2, 4, 6):
        found = evaluate(tmp_path, source, step=step)
    before = (tmp_path / "val_per_class.csv").read_bytes()
    rows = per_class_table(tmp_path)
    assert [row["step"] for row in rows] == ["2"] * 7 + ["4"] * 7 + ["6"] * 7
    last = rows[-7:]
    assert sum(int(row["count"]) for row in last) == 29
    assert sum(int(row["correct"]) for row in last) / 29 == found["accuracy"]
    for step in (4, 6):  # killed and restored before step 4
        evaluate(tmp_path, source, step=step)
    assert (tmp_path / "val_per_class.csv").read_bytes() == before


def test_unreadable_images_are_counted_and_not_scored(tmp_path):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 255, (20, 1, 7, 1), np.uint8)
    clean = InMemory(images, rng.integers(0, 7, 20), NAMES)
    bad = (3, 8, 19)
    messages = []
    found = evaluate(
        tmp_path,
        Damaged(clean, bad),
        ops=(Decode(channels=1),),
        messages=messages,
    )
    kept = [i for i in range(20) if i not in bad]
    rest = InMemory(images[kept], np.array([clean[i]["label"] for i in kept]), NAMES)
    expected = evaluate(tmp_path, rest)
    assert found == expected | {"unreadable": 3.0}
    assert "3 of 20 examples are unreadable" in messages[0]


def test_a_set_without_a_readable_image_has_no_score(tmp_path):
    images = np.zeros((4, 1, 7, 1), np.uint8)
    source = Damaged(InMemory(images, np.zeros(4, int), NAMES), (0, 1, 2, 3))
    with pytest.raises(ValueError, match=r"not one of 4 images|do not decode"):
        evaluate(tmp_path, source, ops=(Decode(channels=1),))


def test_a_head_of_another_size_or_none_is_named(tmp_path, source):
    """And before the first step, not at the first evaluation after many."""
    eight = {"class_names": (*NAMES, "h")}
    with (
        pytest.raises(ValueError, match="7 logits, but there are 8 classes"),
        prepared(tmp_path, source, context=eight),
    ):
        pass
    with (
        pytest.raises(ValueError, match="val: the model gives pooled, no .logits.. It"),
        prepared(tmp_path, source, model=Pixels(has_head=False)),
    ):
        pass


def test_images_without_labels_are_refused_before_the_first_step(tmp_path):
    images = np.zeros((4, 1, 1, 7), np.uint8)

    class Unlabelled(InMemory):
        def __getitem__(self, index):
            return {"image": super().__getitem__(index)["image"]}

    source = Unlabelled(images, np.zeros(4, int), NAMES)
    with (
        pytest.raises(ValueError, match="has no label, only image; give a set wi"),
        prepared(tmp_path, source),
    ):
        pass


def test_top5_needs_more_than_five_classes(tmp_path):
    source = InMemory(score_images(np.eye(5) * 9), np.arange(5), tuple("abcde"))
    found = evaluate(tmp_path, source)
    assert "accuracy_top5" not in found and found["accuracy"] == 1.0


def test_the_model_runs_once_though_loss_and_scores_ask_for_it(tmp_path):
    mesh, model = make_mesh(1), Network()
    flops = {}

    def measuring(function):
        step = step_lib.make_eval_step(model, function)

        def counted(state, batch, ordinal=0):
            if isinstance(state.step, jax.core.Tracer):
                return step(state, batch)
            whole = jax.jit(lambda images: step(state, images))
            cost = whole.lower(batch).compile().cost_analysis()
            flops["evaluator"] = cost["flops"]
            return step(state, batch)

        return counted

    with jax.set_mesh(mesh):
        state = make_state(model, mesh, (8, 8, 1))
        context = make_context(tmp_path, mesh, model, tuple("0123456789"))
        context.make_eval_step = measuring
        evaluator = Classification(source=Digits(split="test"), batch_size=128)
        evaluator.prepare(context)(state)
    once = 2 * 128 * (64 * 48 + 48 * 10)
    assert once < flops["evaluator"] < 1.5 * once


def test_digits_are_scored_alike_on_one_and_eight_devices(tmp_path):
    found = []
    for devices in (1, 8):
        mesh, model = make_mesh(devices), Network()
        with jax.set_mesh(mesh):
            state = make_state(model, mesh, (8, 8, 1))
            context = make_context(tmp_path, mesh, model, tuple("0123456789"))
            source = Digits(split="test")
            run = Classification(source=source, batch_size=128).prepare(context)
            found.append(run(state))
    assert found[0]["examples"] == 359.0
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[1]["accuracy"] == found[0]["accuracy"]


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"every_steps": -1}])
def test_impossible_numbers_are_refused(fields):
    with pytest.raises(ValueError, match="batch_size starts at 1"):
        Classification(source=Digits(split="test"), **fields)


@pytest.mark.parametrize("logits", [Logits.SIGMOID, Logits.SOFTMAX])
def test_balanced_scores_of_several_labels_equal_a_loop(logits):
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 5)) < 0.3).astype(np.float32)
    labels[:, 3], labels[:, 4] = 0, 1  # classes of no image, and of every one
    rows = {"label": labels, "ranking": rng.normal(0, 1, (40, 5))}
    found = per_class.balanced_scores(rows, 5, logits)
    if logits == Logits.SOFTMAX:
        assert found == {}
        return
    recalls, both = [], []
    for c in range(3):
        has = labels[:, c] == 1
        yes = 1 / (1 + np.exp(-rows["ranking"][:, c])) > 0.5
        recalls.append(np.mean(yes[has]))
        both.append((np.mean(yes[has]) + np.mean(~yes[~has])) / 2)
    assert found == pytest.approx(
        {"balanced_accuracy": np.mean(both), "mean_per_class_recall": np.mean(recalls)}
    )


def test_an_answer_that_is_always_the_largest_class_is_seen(tmp_path):
    images = score_images(np.eye(7)[[0] * 22] * 200)
    source = InMemory(images, np.array([0] * 20 + [1, 2]), NAMES)
    found = evaluate(tmp_path, source)
    assert found["accuracy"] == pytest.approx(20 / 22)
    assert found["balanced_accuracy"] == pytest.approx(1 / 3)
