"""Mixup and CutMix against numpy, on one and on eight devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType

from big_vision_lite.data.ops.device import CutMix, Mixup, Partner, symmetric_beta
from big_vision_lite.runtime.layout import batch_sharding

CLASSES = 5


def batch_of(rows=8, float_labels=False, side=6):
    generator = np.random.default_rng(0)
    label = generator.integers(0, CLASSES, rows).astype(np.int32)
    if float_labels:
        label = generator.random((rows, CLASSES)).astype(np.float32)
        label /= label.sum(1, keepdims=True)
    return {
        "image": generator.integers(0, 256, (rows, side, side, 3), dtype=np.uint8),
        "label": label,
        "valid": np.arange(rows) < rows - 1,
        "index": np.arange(rows, dtype=np.int32),
    }


def jitted(op):
    # A dataclass that compares by value has no hash, which jax.jit asks for.
    return jax.jit(lambda batch, key: op(batch, key))


def one_hot(label):
    return np.eye(CLASSES, dtype=np.float32)[label] if label.ndim == 1 else label


def partner_of(rows, partner):
    if partner == Partner.ROLL:
        return np.stack([rows[i - 1] for i in range(len(rows))])
    return np.stack([rows[len(rows) - 1 - i] for i in range(len(rows))])


def share_of(mixed, image, other):
    """Solves mixed = share * image + (1 - share) * other for the share."""
    difference = image.astype(float) - other
    return ((mixed - other) * difference).sum() / (difference**2).sum()


def numpy_batch(batch):
    return {name: np.asarray(value) for name, value in batch.items()}


@pytest.mark.parametrize("partner", Partner)
@pytest.mark.parametrize("rows, float_labels", [(1, False), (7, True), (8, False)])
def test_mixup_equals_numpy(partner, rows, float_labels):
    batch = batch_of(rows, float_labels)
    op = Mixup(num_classes=CLASSES, alpha=0.4, partner=partner)
    mixed = numpy_batch(jitted(op)(batch, jax.random.key(3)))
    share = np.float32(
        jax.jit(symmetric_beta, static_argnums=1)(jax.random.key(3), 0.4)
    )
    share = max(share, 1 - share)
    for name, rows_of in (
        ("image", batch["image"]),
        ("label", one_hot(batch["label"])),
    ):
        plain = rows_of.astype(np.float32)
        expected = share * plain + (1 - share) * partner_of(plain, partner)
        assert mixed[name].dtype == np.float32
        np.testing.assert_allclose(mixed[name], expected, rtol=1e-5, atol=1e-5)


def test_mixup_folds_the_share_into_the_upper_half_unless_told_not_to():
    batch = batch_of()
    other = partner_of(batch["image"].astype(float), Partner.ROLL)

    def shares(**fields):
        mix = jitted(Mixup(num_classes=CLASSES, alpha=1.0, **fields))
        keys = [jax.random.key(seed) for seed in range(60)]
        images = [np.asarray(mix(batch, key)["image"]) for key in keys]
        return np.array([share_of(x, batch["image"], other) for x in images])

    folded, plain = shares(), shares(fold_lambda=False)
    assert folded.min() >= 0.5 and folded.max() <= 1
    assert plain.min() < 0.2 and plain.max() > 0.8
    np.testing.assert_allclose(folded, np.maximum(plain, 1 - plain), atol=1e-5)


@pytest.mark.parametrize("kind", [Mixup, CutMix])
@pytest.mark.parametrize("rows", [7, 8])
def test_by_default_no_row_meets_itself_and_no_two_rows_meet_twice(kind, rows):
    # Every row a class of its own: the mixed label says who met whom.
    batch = batch_of(rows, side=12) | {"label": np.arange(rows, dtype=np.int32)}

    def pairs(**fields):
        op = jitted(kind(num_classes=rows, alpha=4.0, **fields))
        label = np.asarray(op(batch, jax.random.key(1))["label"])
        assert ((label > 0).sum(axis=1) <= 2).all()
        return {tuple(np.flatnonzero(row)) for row in label}

    met = pairs()
    assert len(met) == rows and all(len(pair) == 2 for pair in met)
    assert met == {tuple(sorted((i, (i - 1) % rows))) for i in range(rows)}
    # Reversed, all pairs meet twice, and the middle row of an odd batch is alone.
    met = pairs(partner=Partner.REVERSE)
    assert len(met) == -(-rows // 2)
    assert sum(len(pair) == 1 for pair in met) == rows % 2


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 4.0])
def test_the_share_follows_the_beta_distribution(alpha):
    keys = jax.random.split(jax.random.key(0), 10_000)
    draw = jax.jit(jax.vmap(lambda key: symmetric_beta(key, alpha)))
    shares = np.asarray(draw(keys))
    assert 0 <= shares.min() and shares.max() <= 1
    # Not at the ends, where float32 rounds to 0 and 1.
    for at in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        expected = scipy.stats.beta.cdf(at, alpha, alpha)
        assert abs((shares <= at).mean() - expected) < 0.02  # 4 standard deviations


@pytest.mark.parametrize("partner", Partner)
def test_cutmix_pastes_one_rectangle_and_mixes_labels_by_its_area(partner):
    batch = batch_of(side=12)
    run = jitted(CutMix(num_classes=CLASSES, partner=partner))
    image, label = batch["image"].astype(np.float32), one_hot(batch["label"])
    other = partner_of(image, partner)
    for seed in range(8):
        mixed = numpy_batch(run(batch, jax.random.key(seed)))
        own = (mixed["image"] == image).all(-1)
        assert (own | (mixed["image"] == other).all(-1)).all()
        pasted = (~own).any(0)
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        # As many pixels as rows times columns, none left out: a rectangle.
        assert pasted.sum() == len(rows) * len(columns)
        assert (np.diff(rows) == 1).all() and (np.diff(columns) == 1).all()
        share = 1 - pasted.mean()
        expected = share * label + (1 - share) * partner_of(label, partner)
        np.testing.assert_allclose(mixed["label"], expected, atol=1e-6)


def test_cutmix_draws_areas_and_places_of_all_sizes():
    batch = batch_of(rows=2, side=32)
    keys = jax.random.split(jax.random.key(1), 300)
    op = CutMix(num_classes=CLASSES)
    labels = jax.jit(jax.vmap(lambda key: op(batch, key)["label"]))(keys)
    share = np.asarray(labels)[:, 0, batch["label"][0]]
    # alpha = 1: uniform but for what is cut off at the borders.
    assert share.min() < 0.3 and share.max() > 0.95
    assert 0.55 < share.mean() < 0.75


OPS = [
    Mixup(num_classes=CLASSES),
    Mixup(num_classes=CLASSES, partner=Partner.REVERSE, fold_lambda=False),
    CutMix(num_classes=CLASSES),
]


@pytest.mark.parametrize("op", OPS, ids=["mixup", "bit_mixup", "cutmix"])
def test_a_key_decides_label_rows_sum_to_one_other_keys_stay(op):
    batch = batch_of(float_labels=op is OPS[0])
    before = {name: value.copy() for name, value in batch.items()}
    run = jitted(op)
    images = set()
    for seed in (0, 1, 2, 3, 3, 2):
        mixed = run(batch, jax.random.key(seed))
        label = np.asarray(mixed["label"])
        assert label.shape == (8, CLASSES) and label.dtype == np.float32
        np.testing.assert_allclose(label.sum(1), 1, atol=1e-6)
        image = np.asarray(mixed["image"])
        images.add(image.tobytes())
        assert image.dtype == np.float32 and 0 <= image.min() and image.max() <= 255.001
        assert set(mixed) == set(batch)
        np.testing.assert_array_equal(mixed["valid"], batch["valid"])
        np.testing.assert_array_equal(mixed["index"], batch["index"])
    assert len(images) == 4  # a function of the key
    for name, value in batch.items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("kind", [Mixup, CutMix])
def test_alpha_zero_gives_the_plain_one_hot_batch(kind):
    batch = batch_of()
    mixed = jitted(kind(num_classes=CLASSES, alpha=0.0))(batch, jax.random.key(0))
    np.testing.assert_array_equal(mixed["image"], batch["image"])
    np.testing.assert_array_equal(mixed["label"], one_hot(batch["label"]))
    assert mixed["image"].dtype == jnp.float32


# Without labels, and with what cannot be mixed


@pytest.mark.parametrize("kind", [Mixup, CutMix])
def test_without_labels_images_are_mixed_as_with_them(kind):
    batch = batch_of()
    plain = {key: value for key, value in batch.items() if key != "label"}
    for seed in range(3):
        key = jax.random.key(seed)
        mixed = jitted(kind())(plain, key)
        with_labels = jitted(kind(num_classes=CLASSES))(batch, key)
        assert set(mixed) == set(plain)
        np.testing.assert_array_equal(mixed["image"], with_labels["image"])
        np.testing.assert_array_equal(mixed["index"], batch["index"])


@pytest.mark.parametrize("kind", [Mixup, CutMix])
def test_what_cannot_be_mixed_is_refused(kind):
    name, key = kind.__name__, jax.random.key(0)
    with pytest.raises(ValueError, match=rf"labels and no num_classes: .*{name}\(num"):
        kind()(batch_of(), key)
    for keys in (("mask",), ("boxes",), ("mask", "boxes")):
        batch = batch_of() | {other: np.zeros((8, 4)) for other in keys}
        with pytest.raises(ValueError, match=f"would leave {' and '.join(keys)} of"):
            kind(num_classes=CLASSES)(batch, key)
    targets = batch_of() | {"target": np.zeros((8, 2), np.float32)}
    with pytest.raises(ValueError, match='"target", the numbers of a regression'):
        kind(num_classes=CLASSES)(targets, key)
    with pytest.raises(ValueError, match='mixes "image", which is not among label'):
        kind(num_classes=CLASSES)({"label": np.zeros(2, int)}, key)


# Eight devices


def mesh_of(data, fsdp):
    return jax.make_mesh(
        (data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto)
    )


@pytest.mark.parametrize("op", OPS, ids=["mixup", "bit_mixup", "cutmix"])
@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
def test_eight_devices_give_the_batch_of_one_without_gathering_images(op, shape):
    batch = batch_of(rows=32, side=16)
    alone = numpy_batch(jitted(op)(batch, jax.random.key(2)))
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        spread = jax.device_put(batch, batch_sharding(mesh))
        compiled = jitted(op).lower(spread, jax.random.key(2)).compile()
        mixed = compiled(spread, jax.random.key(2))
    for name in batch:
        np.testing.assert_allclose(mixed[name], alone[name], rtol=1e-6, atol=1e-5)
    assert mixed["image"].sharding.is_equivalent_to(batch_sharding(mesh), 4)
    text = compiled.as_text()
    assert not re.search(r"all-gather|all-to-all|all-reduce", text)
    moved = [
        int(np.prod([int(side) for side in sides.split(",")]))
        for sides in re.findall(r"f32\[([\d,]+)\]\S* collective-permute", text)
    ]
    assert moved, "no row crossed a border"
    one_image = 16 * 16 * 3
    rows_moved = 1 if op.partner == Partner.ROLL else 4
    assert max(moved) <= rows_moved * one_image


# Mistakes


@pytest.mark.parametrize("kind", [Mixup, CutMix])
def test_impossible_fields_and_labels_are_refused(kind):
    with pytest.raises(ValueError, match="num_classes=0"):
        kind(num_classes=0)
    with pytest.raises(ValueError, match="alpha=-0.1"):
        kind(num_classes=3, alpha=-0.1)
    with pytest.raises(ValueError, match=r"\(8, 5\) do not fit num_classes=3"):
        kind(num_classes=3)(batch_of(float_labels=True), jax.random.key(0))
    tags = {**batch_of(), "label": jnp.zeros((8, 3), jnp.int32)}
    with pytest.raises(ValueError, match=r"\(8, 3\), the numbers of several tags"):
        kind(num_classes=3)(tags, jax.random.key(0))
