"""Few-shot scores by the published protocol, with their controls."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from evaluation_context import (
    Damaged,
    Network,
    Pixels,
    make_context,
    make_mesh,
    make_state,
)

from big_vision_lite.console import tables
from big_vision_lite.data.ops import CentralCrop, Decode, Resize, ResizeSmall
from big_vision_lite.data.sources import Digits, InMemory
from big_vision_lite.evaluators import features, fewshot, ridge
from big_vision_lite.evaluators.fewshot import FewShot, FewShotSet
from big_vision_lite.evaluators.ridge import Ridge, shuffled_classes

CONTROLS = ("control_raw_pixels", "control_untrained")


def chosen(labels, num_classes, seed, shots):
    lists = shuffled_classes(labels, num_classes, seed)
    return np.concatenate([images[:shots] for images in lists])


@pytest.fixture(scope="module")
def known():
    r = np.random.default_rng(0)
    means = r.standard_normal((5, 16))

    def draw(rows):
        labels = r.integers(0, 5, rows)
        return 0.5 * means[labels] + r.standard_normal((rows, 16)), labels

    train, test = draw(200), draw(400)
    return train, test


# float64 NumPy, computed apart from this program.
KNOWN = [
    (0, 1, 1024.0, 0.4000, [-0.578831, -0.576958, -0.601129, -0.590884, -0.591991]),
    (0, 5, 1024.0, 0.6050, [-0.586754, -0.577927, -0.618591, -0.618502, -0.585989]),
    (0, 10, 1024.0, 0.6750, [-0.563126, -0.572407, -0.630978, -0.645784, -0.581573]),
    (0, 10, 1.0, 0.6150, [0.127287, 0.077739, -1.63474, -1.233615, -0.336666]),
    (1, 10, 1024.0, 0.6325, [-0.578312, -0.564411, -0.628473, -0.651903, -0.57077]),
]


@pytest.mark.parametrize("seed, shots, l2, accuracy, scores", KNOWN)
def test_the_known_answer_of_the_protocol_to_all_its_digits(
    known, seed, shots, l2, accuracy, scores
):
    (x, y), (test_x, test_y) = known
    images = chosen(y, 5, seed, shots)
    classifier = Ridge(x[images], y[images], 5)
    np.testing.assert_allclose(classifier.scores(test_x, l2)[0], scores, atol=5.1e-7)
    assert classifier.accuracies(test_x, test_y, [l2])[0] == pytest.approx(accuracy)
    predicted = classifier.scores(test_x, l2).argmax(axis=1)
    assert np.mean(predicted == test_y) == pytest.approx(accuracy)


def test_the_first_image_chosen_is_the_published_one(known):
    (_, y), _ = known
    assert shuffled_classes(y, 5, 0)[0][0] == 102


@pytest.mark.parametrize("rows", [1, 3, 10, 30])
def test_primal_and_dual_are_one_solution(known, rows):
    (x, y), _ = known
    images = chosen(y, 5, 0, rows)
    design = np.concatenate([x[images], np.full((len(images), 1), 100.0)], axis=1)
    targets = np.where(y[images, None] == np.arange(5), 1.0, -1.0)
    for l2 in (2.0**-6, 1.0, 1024.0):
        weights = []
        for solve in (ridge.primal, ridge.dual):
            eigenvalues, left, right = solve(design, targets)
            weights.append(left @ (right / (eigenvalues + l2)[:, None]))
        # float64 eigenvalues are known to 1e-16 of the largest, the constant's.
        atol = 1e-15 * eigenvalues.max() / l2
        np.testing.assert_allclose(*weights, rtol=0, atol=atol)
        # And the textbook's: a dense solve.
        gram = design.T @ design + l2 * np.eye(design.shape[1])
        dense = np.linalg.solve(gram, design.T @ targets)
        np.testing.assert_allclose(weights[0], dense, rtol=0, atol=10 * atol)


def test_shots_are_nested_and_only_of_their_class(known):
    (_, y), _ = known
    for seed in range(3):
        for images, label in zip(shuffled_classes(y, 5, seed), range(5), strict=True):
            assert set(y[images]) == {label}
            assert len(images) == np.sum(y == label) == len(set(images))
        one, five = (set(chosen(y, 5, seed, k)) for k in (1, 5))
        assert one < five and len(five) == 25


def test_a_class_with_too_few_images_gives_all_it_has():
    y = np.array([0, 0, 0, 0, 2, 2])
    assert len(chosen(y, 4, 0, 3)) == 5


def test_many_penalties_at_once_equal_one_at_a_time_and_chunks_change_nothing(
    known, monkeypatch
):
    (x, y), (test_x, test_y) = known
    classifier = Ridge(x, y, 5)
    at_once = classifier.accuracies(test_x, test_y, fewshot.L2_GRID)
    single = [classifier.accuracies(test_x, test_y, [l2])[0] for l2 in fewshot.L2_GRID]
    monkeypatch.setattr(ridge, "CHUNK_ROWS", 7)
    chunked = classifier.accuracies(test_x, test_y, fewshot.L2_GRID)
    np.testing.assert_array_equal(at_once, single)
    np.testing.assert_array_equal(at_once, chunked)


def test_constant_features_harm_nobody(known):
    (x, y), (test_x, test_y) = known
    more = np.concatenate([x, np.full((len(x), 3), 0.1)], axis=1)
    other = np.concatenate([test_x, np.full((len(test_x), 3), 7.0)], axis=1)
    for images in (chosen(y, 5, 0, 1), chosen(y, 5, 0, 10)):  # dual and primal
        plain = Ridge(x[images], y[images], 5).scores(test_x, 1024.0)
        padded = Ridge(more[images], y[images], 5).scores(other, 1024.0)
        np.testing.assert_allclose(padded, plain, atol=1e-6)


def arrays(source):
    examples = [source[index] for index in range(len(source))]
    vectors = np.stack([e["image"].reshape(-1) for e in examples]).astype(np.float32)
    return vectors, np.array([e["label"] for e in examples])


def some_digits(split, count):
    vectors, labels = arrays(Digits(split=split))
    images = vectors[:count].reshape(-1, 8, 8, 1)
    return InMemory(images, labels[:count], tuple("0123456789"))


POOL, TEST = some_digits("train", 400), some_digits("test", 96)


def digits_set(**fields):
    return FewShotSet(**{"name": "digits", "train": POOL, "test": TEST} | fields)


def small(**fields):
    sets = fields.pop("sets", (digits_set(),))
    defaults = {"shots": (1, 5), "seeds": (0, 1, 2), "batch_size": 128}
    return FewShot(**{"sets": sets} | defaults | fields)


def evaluate(workdir, evaluator, *, model=None, devices=1, seed=0, **context):
    model = model or Pixels()
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        state = make_state(model, mesh, (8, 8, 1), seed=seed)
        made = make_context(workdir, mesh, model, **context)
        return evaluator.prepare(made)(state)


def test_scores_equal_the_protocol_applied_by_hand(tmp_path):
    found = evaluate(tmp_path, small(controls=False))
    (x, y), (test_x, test_y) = arrays(POOL), arrays(TEST)
    for shots in (1, 5):
        accuracies, on_validation, on_test = [], [], []
        for seed in range(3):
            lists = shuffled_classes(y, 10, seed)
            images = np.concatenate([of_class[:shots] for of_class in lists])
            held = np.concatenate([of_class[shots:][:25] for of_class in lists])
            assert not set(images) & set(held)
            classifier = Ridge(x[images], y[images], 10)
            accuracies += [classifier.accuracies(test_x, test_y, [1024.0])[0]]
            on_validation += [classifier.accuracies(x[held], y[held], fewshot.L2_GRID)]
            on_test += [classifier.accuracies(test_x, test_y, fewshot.L2_GRID)]
        mean = np.mean(on_validation, axis=0)
        best = len(mean) - 1 - mean[::-1].argmax()  # ties to the larger penalty
        expected = {
            "accuracy": np.mean(accuracies),
            "accuracy_sd": np.std(accuracies, ddof=1),
            "accuracy_l2_chosen": np.mean(on_test, axis=0)[best],
            "accuracy_l2_chosen_sd": np.std(on_test, axis=0, ddof=1)[best],
            "l2_chosen": fewshot.L2_GRID[best],
        }
        ours = {
            name.rpartition("/")[2]: value
            for name, value in found.items()
            if name.startswith(f"digits/{shots}_shot/")
        }
        assert ours == pytest.approx(expected, abs=1e-12)


def test_labels_of_the_test_set_do_not_choose_the_penalty(tmp_path):
    images, labels = arrays(TEST)
    names = tuple("0123456789")
    # Labels of another rule: every score on the test set changes, the choice must not.
    other = InMemory(images.reshape(-1, 8, 8, 1), (labels + 1) % 10, names)
    two = dataclasses.replace(digits_set(), test=other)
    first = evaluate(tmp_path, small(controls=False))
    second = evaluate(tmp_path, small(controls=False, sets=(two,)))
    for shots in (1, 5):
        name = f"digits/{shots}_shot"
        assert first[f"{name}/l2_chosen"] == second[f"{name}/l2_chosen"]
        assert first[f"{name}/accuracy"] > 2 * second[f"{name}/accuracy"]


def test_eight_devices_give_the_scores_of_one_to_the_last_bit(tmp_path):
    one, eight = (evaluate(tmp_path, small(controls=False), devices=n) for n in (1, 8))
    assert eight == one


def test_both_controls_stand_beside_every_score(tmp_path):
    found = evaluate(tmp_path, small())
    for shots in (1, 5):
        for kind in ("", "_l2_chosen"):
            for suffix in ("", "_sd"):
                names = ("accuracy", *CONTROLS)
                values = [
                    found[f"digits/{shots}_shot/{name}{kind}{suffix}"] for name in names
                ]
                # The model gives the pixels themselves, whatever its one number is.
                assert values == pytest.approx([values[0]] * 3, abs=1e-3)


def test_the_untrained_control_is_the_network_before_step_1(tmp_path):
    model = Network()
    fresh = evaluate(tmp_path / "fresh", small(controls=False), model=model)
    trained = evaluate(tmp_path / "run", small(), model=model, seed=1)
    for shots in (1, 5):
        name = f"digits/{shots}_shot"
        assert trained[f"{name}/control_untrained"] == fresh[f"{name}/accuracy"]
        assert trained[f"{name}/accuracy"] != fresh[f"{name}/accuracy"]


def test_controls_are_computed_once_a_run_and_again_when_the_protocol_changes(tmp_path):
    asked = []

    def untrained():
        asked.append(1)
        return make_state(Pixels(), make_mesh(1), (8, 8, 1), step=0)

    first = evaluate(tmp_path, small(), untrained=untrained)
    again = evaluate(tmp_path, small(), untrained=untrained)
    assert again == first and len(asked) == 1  # to the last bit, through JSON
    kept = json.loads((tmp_path / "val_controls.json").read_text())
    assert kept["protocol"]["seeds"] == [0, 1, 2] and kept["protocol"]["l2"] == 1024.0
    evaluate(tmp_path, small(seeds=(0, 1)), untrained=untrained)
    assert len(asked) == 2
    evaluate(
        tmp_path, small(seeds=(0, 1)), untrained=untrained, ops=(Resize(size_px=4),)
    )
    assert len(asked) == 3


def test_a_set_may_have_its_own_road_from_the_file(tmp_path):
    ops = (Decode(channels=1), Resize(size_px=4))
    own = evaluate(tmp_path, small(sets=(digits_set(preprocess=ops),), controls=False))
    assert own == evaluate(tmp_path, small(controls=False), ops=ops)
    assert own != evaluate(tmp_path, small(controls=False))


def test_test_labels_follow_the_class_names_of_the_pool(tmp_path):
    images, labels = arrays(TEST)
    names = tuple("9876543210")
    turned = InMemory(images.reshape(-1, 8, 8, 1), 9 - labels, names)
    few = dataclasses.replace(digits_set(), test=turned)
    found = evaluate(tmp_path, small(sets=(few,), controls=False))
    assert found == evaluate(tmp_path, small(controls=False))


def test_a_pool_without_images_left_chooses_no_penalty(tmp_path):
    rng = np.random.default_rng(0)
    pool = InMemory(rng.integers(0, 255, (6, 8, 8, 1)), np.arange(6) % 2, ("a", "b"))
    few = FewShotSet(name="tiny", train=pool, test=pool)
    found = evaluate(tmp_path, small(sets=(few,), shots=(1, 3), controls=False))
    assert "tiny/1_shot/accuracy_l2_chosen" in found
    assert "tiny/3_shot/accuracy_l2_chosen" not in found
    assert found["tiny/3_shot/accuracy"] > 0.5  # its own training images


def test_one_seed_has_no_spread(tmp_path):
    found = evaluate(tmp_path, small(seeds=(3,), controls=False))
    assert "digits/1_shot/accuracy" in found
    assert not [name for name in found if name.endswith("_sd")]


def test_several_labels_an_image_and_an_empty_set_are_refused(tmp_path):
    labels = np.eye(2, dtype=int)[[0, 1]]
    several = InMemory(np.zeros((2, 8, 8, 1), np.uint8), labels, ("a", "b"))
    few = FewShotSet(name="many", train=several, test=several)
    mesh = make_mesh(1)
    context = make_context(tmp_path, mesh, Pixels())
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="several labels an image"),
    ):
        small(sets=(few,)).prepare(context)  # before any step

    class Empty:
        class_names = ("a", "b")
        fingerprint = "x"

        def __len__(self):
            return 0

        def __getitem__(self, index):
            raise IndexError

        def name(self, index):
            return ""

    few = FewShotSet(name="none", train=several, test=Empty())
    with pytest.raises(ValueError, match="val: none test has no images; give a"):
        evaluate(tmp_path, small(sets=(few,)))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sets": ()}, "each with a name of its own"),
        ({"sets": (digits_set(), digits_set())}, "each with a name of its own"),
        ({"shots": (0, 5)}, "shots=.* must be at least 1"),
        ({"seeds": (1, 1)}, "seeds=.* must differ"),
        ({"l2": 0.0}, "l2=0.0 must be above 0"),
        ({"batch_size": 0}, "batch_size=0.: batch_size starts at 1"),
    ],
)
def test_impossible_protocols_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


@pytest.mark.parametrize("size, target", [(64, 32), (48, 32), (33, 32), (7, 7), (5, 1)])
def test_shrinking_keeps_every_pixel_s_share(size, target):
    weights = features.area_weights(size, target)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(axis=0), target / size, rtol=1e-6)


def test_shrinking_equals_the_means_of_blocks_and_leaves_small_images_alone():
    images = np.random.default_rng(0).random((2, 64, 96, 3), np.float32)
    small = features.shrink(jnp.asarray(images), 32)
    rows, columns = 21, 32  # the longer side becomes 32, the aspect stays
    assert small.shape == (2, rows, columns, 3)
    square = features.shrink(jnp.asarray(images[:, :, :64]), 32)
    blocks = images[:, :, :64].reshape(2, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(square, blocks, atol=1e-6)
    tiny = jnp.asarray(images[:, :8, :8])
    np.testing.assert_array_equal(features.shrink(tiny, 32), tiny)


def test_features_come_in_the_order_of_the_source_without_unreadable_rows(tmp_path):
    model, mesh = Pixels(), make_mesh(8)
    bad = (0, 63, 64, 95)  # first and last of a batch
    source = Damaged(TEST, bad)
    with jax.set_mesh(mesh):
        state = make_state(model, mesh, (8, 8, 1))
        context = make_context(tmp_path, mesh, model)
        step = context.make_eval_step(features.of_model(model))
        found = features.extract(
            context, step, state, source, (Decode(channels=1),), 64
        )
    assert found.unreadable == 4
    kept = np.setdiff1d(np.arange(96), bad)
    images, labels = arrays(TEST)
    np.testing.assert_array_equal(found.vectors, images[kept])
    np.testing.assert_array_equal(found.labels, labels[kept])
    # The slow way: one image at a time.
    for row in (0, 61, 62, 91):
        image = source[kept[row]]["image"][None]
        alone = model.apply({"params": {"gain": 1.0}}, image)
        np.testing.assert_array_equal(found.vectors[row], alone["pooled"][0])


def without(source, bad):
    images, labels = arrays(source)
    kept = np.setdiff1d(np.arange(len(labels)), bad)
    return InMemory(images[kept].reshape(-1, 8, 8, 1), labels[kept], source.class_names)


def test_unreadable_images_are_counted_said_once_and_as_if_not_there(tmp_path):
    pool, test = (3, 127, 128, 399), (0, 95)
    damaged = digits_set(train=Damaged(POOL, pool), test=Damaged(TEST, test))
    clean = digits_set(train=without(POOL, pool), test=without(TEST, test))
    messages = []
    found = evaluate(
        tmp_path / "damaged",
        small(sets=(damaged,)),
        ops=(Decode(channels=1),),
        messages=messages,
    )
    expected = evaluate(tmp_path / "clean", small(sets=(clean,)))
    assert expected["digits/unreadable"] == 0.0
    assert found == expected | {"digits/unreadable": 6.0}
    # Although the controls read the same images again.
    (said,) = [message for message in messages if "unreadable" in message]
    assert "4 of 400 training and 2 of 96 test images are unreadable" in said


def test_the_count_of_unreadable_images_is_a_line_only_where_there_are_some():
    scores = {"digits/5_shot/accuracy": 0.5, "digits/unreadable": 0.0}
    assert list(tables.format_scores(scores)) == ["digits/5_shot/accuracy"]
    scores["digits/unreadable"] = 6.0
    assert tables.format_scores(scores)["digits/unreadable"] == "6"
    (table,) = tables.score_tables(scores)
    assert table.splitlines() == [
        "Scores",
        "               accuracy",
        "digits/5_shot  50.0 %",
    ]


def test_the_natural_sets_are_those_of_big_vision(monkeypatch):
    # On Python 3.11 the run-time check of a protocol reads its properties, and so would
    # open sets that are not prepared here.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    names = [few.name for few in fewshot.natural_sets()]
    assert names == [
        "caltech101",
        "cars196",
        "cifar100",
        "dtd",
        "oxford_iiit_pet",
        "uc_merced",
    ]
    merced = fewshot.natural_sets()[-1]
    assert (merced.train.split, merced.test.split) == ("train[:1000]", "train[1000:]")
    example = {"image": np.zeros((300, 500, 3), np.uint8), "label": 0}
    for op in merced.preprocess:
        example = op(example, np.random.default_rng(0))
    assert example["image"].shape == (224, 224, 3)
    # Every call makes objects of its own: overrides must not reach other recipes.
    assert fewshot.natural_sets()[0] is not fewshot.natural_sets()[0]


def test_the_natural_sets_are_squeezed_to_squares_and_not_averaged(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def seen(image):
        """What every set makes of an image; there is one road for all six."""
        roads = [few.preprocess for few in fewshot.natural_sets()]
        assert all(road == roads[0] for road in roads)
        example = {"image": image, "label": 0}
        for op in roads[0]:
            example = op(example, np.random.default_rng(0))
        return example["image"]

    # Red counts columns, green rows: where each pixel of 224 in 256 comes from.
    image = np.zeros((150, 250, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(250), np.arange(150)[:, None]
    found, at = seen(image), np.arange(16, 240) + 0.5
    # OpenCV is within 0.8 of the exact value.
    exact = np.broadcast_to(at * 250 / 256 - 0.5, (224, 224))
    np.testing.assert_allclose(found[..., 0], exact, atol=0.8)
    exact = np.broadcast_to(at[:, None] * 150 / 256 - 0.5, (224, 224))
    np.testing.assert_allclose(found[..., 1], exact, atol=0.8)
    # After a resize of the short side the crop leaves out a quarter on each side.
    cut = {"image": image}
    for op in (ResizeSmall(size_px=256), CentralCrop(size_px=224)):
        cut = op(cut, np.random.default_rng(0))
    assert cut["image"][..., 0].min() > 50 > 20 > found[..., 0].min()
    # Two taps a side fall on the black ones of white, black, black, white.
    stripes = np.tile(np.array([255, 0, 0, 255], np.uint8), 256)
    assert not seen(np.broadcast_to(stripes[:, None], (256, 1024, 3)).copy()).any()


def test_the_probed_output_is_the_one_that_is_named(tmp_path):
    model = Network()
    pooled = evaluate(tmp_path, small(controls=False), model=model)
    assert evaluate(tmp_path, small(controls=False, output="pooled"), model=model) == (
        pooled
    )
    # A module by its name: here what comes before the nonlinearity.
    other = evaluate(tmp_path, small(controls=False, output="hidden"), model=model)
    assert other.keys() == pooled.keys() and other != pooled


@pytest.mark.parametrize("name", ["grid", "encoder/block_03"])
def test_positions_and_tokens_are_averaged(name):
    values = jax.random.normal(jax.random.key(0), (3, 4, 5, 8), jnp.bfloat16)

    def forward(image, capture=()):
        outputs = {"pooled": jnp.zeros((3, 8)), "grid": values}
        return outputs | {"captured": {n: values[:, 0] for n in capture}}

    batch = {"image": jnp.zeros((3, 2, 2, 1)), "label": jnp.arange(3)}
    function = features.of_model(Network(), name)
    vectors = function(forward, batch, jax.random.key(0))["vectors"]
    wide = np.asarray(values, np.float64)
    wide = wide.mean(axis=(1, 2)) if name == "grid" else wide[:, 0].mean(axis=1)
    np.testing.assert_allclose(vectors, wide, atol=1e-6)


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "poled",
            'val: output="poled" is no output of the model.* Did you mean "pooled"',
        ),
        ("encoder/block_99", "and no module"),
    ],
)
def test_an_output_that_is_not_there_is_refused_before_any_step(
    tmp_path, name, message
):
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path, small(controls=False, output=name), model=Network())


def test_more_shots_than_a_class_has_images_are_said(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 0, 0, 1, 1])
    pool = InMemory(rng.integers(0, 255, (6, 8, 8, 1)), labels, ("a", "b"))
    few = FewShotSet(name="tiny", train=pool, test=pool)
    said = []
    evaluate(
        tmp_path,
        small(sets=(few,), shots=(1, 2, 3, 5), controls=False),
        messages=said,
    )
    assert said[-2:] == [
        "val/tiny: 1 of 2 classes have fewer than 3 images, 3_shot takes all they "
        "have: b (2).",
        "val/tiny: 2 of 2 classes have fewer than 5 images, 5_shot takes all they "
        "have: a (4), b (2).",
    ]
    assert len([text for text in said if "fewer than" in text]) == 2
