"""Views of one image, padded rows, and batches of whatever keys there are."""

import itertools

import cv2
import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from big_vision_lite.data import ops, pipeline
from big_vision_lite.data.host_batch import HostBatch
from big_vision_lite.data.sources import InMemory
from big_vision_lite.recipes import serialize
from big_vision_lite.runtime import layout

VIEWS = ops.Views(
    views=(
        ops.View(name="global", ops=(ops.RandomResizedCrop(size_px=16),), count=2),
        ops.View(
            name="local",
            ops=(
                ops.RandomResizedCrop(size_px=8, width_px=6, area_max=0.3),
                ops.Invert(),
            ),
            count=6,
        ),
        ops.View(name="whole"),
    )
)


def rng(seed=0):
    return np.random.default_rng(seed)


def photo(side=24, seed=0):
    return rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def test_views_are_the_chains_run_one_after_the_other():
    image, generator = photo(), rng(5)
    result = VIEWS({"image": image, "label": 4, "number": 7}, rng(5))
    assert set(result) == {"label", "number", "global", "local", "whole"}
    crop, small = ops.RandomResizedCrop(size_px=16), VIEWS.views[1].ops[0]
    for view in result["global"]:
        np.testing.assert_array_equal(view, crop({"image": image}, generator)["image"])
    for view in result["local"]:
        expected = 255 - small({"image": image}, generator)["image"]
        np.testing.assert_array_equal(view, expected)
    np.testing.assert_array_equal(result["whole"], image[None])
    assert result["global"].shape == (2, 16, 16, 3)
    assert result["local"].shape == (6, 8, 6, 3)
    assert all(result[key].dtype == np.uint8 for key in ("global", "local", "whole"))


def test_views_are_a_function_of_example_and_generator_and_differ():
    example = {"image": photo(), "label": 4}
    one, two, other = (VIEWS(example, rng(seed)) for seed in (1, 1, 2))
    for key in ("global", "local"):
        np.testing.assert_array_equal(one[key], two[key])
        assert not np.array_equal(one[key], other[key])
        assert len({view.tobytes() for view in one[key]}) == len(one[key])
    assert set(example) == {"image", "label"}


def test_what_belongs_to_the_pixels_goes_or_stays_with_the_image():
    example = {"image": photo(), "mask": photo()[..., 0], "boxes": np.zeros((1, 4))}
    example["boxes"] = example["boxes"].astype(np.float32)
    view = ops.View(name="view", ops=(ops.RandomCrop(size_px=8),))
    assert set(ops.Views(views=(view,))(example, rng())) == {"view"}
    kept = ops.Views(views=(view,), keep_image=True)(example, rng())
    assert set(kept) == {"view", *example}
    assert all(kept[key] is value for key, value in example.items())


def test_ops_that_write_into_the_example_do_not_reach_the_next_view():
    def spoils(example, rng):
        assert "seen" not in example
        example["seen"] = 1
        return example

    view = ops.View(name="view", ops=(spoils,), count=3)
    result = ops.Views(views=(view,))({"image": photo()}, rng())
    assert set(result) == {"view"} and len(result["view"]) == 3


def test_views_of_one_name_are_stacked_in_their_order():
    plain, mirrored = ops.View(name="a"), ops.View(name="a", ops=(ops.Invert(),))
    example = {"image": photo()}
    views = ops.Views(views=(plain, mirrored, plain))(example, rng())["a"]
    wanted = [photo(), 255 - photo(), photo()]
    np.testing.assert_array_equal(views, np.stack(wanted))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ops.View(name="a", count=0), "'a': count=0"),
        (lambda: ops.View(name="a", ops=(ops.Invert,)), "with the parentheses"),
        (lambda: ops.Views(views=()), "at least one View"),
        (
            lambda: ops.Views(views=(ops.View(name="label"),))(
                {"image": photo(), "label": 1}, rng()
            ),
            r"would overwrite \['label'\]",
        ),
        (
            lambda: ops.Views(views=(ops.View(name="a"),))({"image": b"1"}, rng()),
            r"Views needs a uint8 image .*Decode\(\)",
        ),
        (
            lambda: ops.Views(
                views=(ops.View(name="a", ops=(ops.Keep(keys=("label",)),)),)
            )({"image": photo(), "label": 1}, rng()),
            'View needs the key "image"',
        ),
    ],
)
def test_impossible_views_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_views_of_several_sizes_are_refused():
    sizes = itertools.cycle((4, 5))

    def grows(example, rng):
        return ops.Resize(size_px=next(sizes))(example, rng)

    views = ops.Views(views=(ops.View(name="a", ops=(grows,), count=2),))
    with pytest.raises(ValueError, match="several sizes, 4x4x3, 5x5x3: end its ops"):
        views({"image": photo()}, rng())


def test_views_and_pad_survive_the_round_trip_through_json():
    for op in (VIEWS, ops.Pad(key="boxes", length=4, value=-1.0), ops.Keep()):
        again = serialize.from_json(serialize.to_json(op))
        assert again == op and type(again) is type(op)


# Rows that differ in number.


@pytest.mark.parametrize("length", [1, 3, 5])
@pytest.mark.parametrize("dtype, value", [(np.float32, 0.5), (np.int64, -1.0)])
def test_pad_equals_a_loop(length, dtype, value):
    rows = rng().integers(0, 9, (3, 4)).astype(dtype)
    expected = [rows[i] if i < 3 else np.full(4, value) for i in range(length)]
    op = ops.Pad(key="rows", length=length, value=value)
    result = op({"rows": rows, "label": 1}, rng())
    np.testing.assert_array_equal(result["rows"], expected)
    assert result["rows"].dtype == dtype and set(result) == {"rows", "label"}
    none = op({"rows": rows[:0]}, rng())["rows"]
    np.testing.assert_array_equal(none, np.full((length, 4), value, dtype))


@pytest.mark.parametrize(
    "op, rows, message",
    [
        (ops.Pad(key="b", length=2), np.ones(1), r'Pad: no "b" among'),
        (ops.Pad(key="a", length=2), [1, 2], '"a" is list; put an op'),
        (ops.Pad(key="a", length=2), np.array(["a"]), "array of numbers"),
        (ops.Pad(key="a", length=2, value=0.5), np.ones(1, int), "0.5 is no int64"),
        (
            ops.Pad(key="a", length=2, value=-1.0),
            np.ones(1, np.uint8),
            "-1 is no uint8",
        ),
        (ops.Pad(key="a", length=2, value=2.0), np.ones(1, bool), "2 is no bool"),
    ],
)
def test_pad_refuses_what_it_cannot_do(op, rows, message):
    with pytest.raises(ValueError, match=message):
        op({"a": rows}, rng())


def test_pad_needs_a_length():
    with pytest.raises(ValueError, match="length=0"):
        ops.Pad(key="a", length=0)


# Batches.


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[:8])
    return jax.sharding.Mesh(
        devices.reshape(-1, 2), layout.BATCH_AXES, axis_types=(AxisType.Auto,) * 2
    )


COUNT = 21


def scenes(**more):
    """Images with a mask, a varying number of boxes and a caption each; no label."""
    images = np.stack([photo(seed=seed) for seed in range(COUNT)])
    keys = {
        "mask": images[..., 0].astype(np.int32),
        "boxes": [
            np.full((number % 4, 4), number / 40, np.float32) for number in range(COUNT)
        ],
        "caption": [f"a photo of {number}" for number in range(COUNT)],
        "number": np.arange(COUNT),
    }
    return InMemory(images, keys={**keys, **more})


class Length:
    """Stands for a tokenising op: text becomes int32 numbers."""

    def __call__(self, example, rng):
        return example | {"caption": np.array([len(example["caption"])] * 2, np.int32)}


SCENE_OPS = (
    ops.Decode(),
    ops.RandomCrop(size_px=16),
    ops.Pad(key="boxes", length=2),
    Length(),
)


def test_batches_hold_masks_boxes_tokens_and_no_label(mesh):
    stream = pipeline.Stream(source=scenes(), ops=SCENE_OPS, batch_size=8)
    with pipeline.open_batches(stream, 0, mesh) as batches:
        spec = batches.spec()
        batch = next(batches.starting_at(1))
    assert {key: (array.shape, array.dtype) for key, array in batch.items()} == {
        "image": ((8, 16, 16, 3), np.uint8),
        "mask": ((8, 16, 16), np.int32),
        "boxes": ((8, 2, 4), np.float32),
        "caption": ((8, 2), np.int32),
        "number": ((8,), np.int32),
    }
    assert {key: array.shape for key, array in spec.items()} == {
        key: array.shape for key, array in batch.items()
    }
    np.testing.assert_array_equal(batch["mask"], batch["image"][..., 0])


def test_evaluation_of_unlabelled_sources_counts_every_example_once(mesh):
    # Not one batch has an "image": a key of its own is enough.
    source, chain = scenes(), (*SCENE_OPS[2:], ops.Keep(keys=("number", "caption")))
    numbers = []
    for batch in pipeline.eval_batches(source, chain, 8, mesh):
        assert set(batch) == {"number", "caption", "valid"}
        valid = np.asarray(batch["valid"])
        numbers += np.asarray(batch["number"])[valid].tolist()
    assert numbers == list(range(COUNT))


def test_views_travel_in_batches(mesh):
    chain = (ops.Keep(keys=("image",)), VIEWS)
    stream = pipeline.Stream(source=scenes(), ops=chain, batch_size=8)
    with pipeline.open_batches(stream, 0, mesh) as batches:
        one, two = itertools.islice(batches.starting_at(3), 2)
    with pipeline.open_batches(stream, 0, mesh) as batches:
        again = next(batches.starting_at(4))
    assert {key: array.shape for key, array in one.items()} == {
        "global": (8, 2, 16, 16, 3),
        "local": (8, 6, 8, 6, 3),
        "whole": (8, 1, 24, 24, 3),
    }
    for key, array in two.items():
        np.testing.assert_array_equal(array, again[key])


@pytest.mark.parametrize(
    "example, message",
    [
        (
            {"image": photo(), "caption": "a cat", "label": 1},
            r'"caption" is str after the last op, .*tokenises text, or drop it: '
            r"Keep\(keys=\('image', 'label'\)\)",
        ),
        ({"image": photo(), "id": b"x"}, '"id" is bytes after the last op'),
        ({"image": photo(), "names": ["a"]}, '"names" is list after'),
        ({"image": photo(), "names": np.array(["a"])}, '"names" is ndarray after'),
        ({"image": photo(), "mask": b"\x89PNG"}, r'"mask" is bytes .*Decode\(\)'),
        ({"image": b"\x89PNG", "label": 1}, r'"image" is bytes .*Decode\(\)'),
        ({}, "no key left after the last op"),
    ],
)
def test_what_no_device_holds_is_refused_with_its_remedy(example, message):
    with pytest.raises(ValueError, match=message):
        HostBatch(1, range(2)).store(0, example)


def test_other_numbers_of_rows_say_pad():
    batch = HostBatch(1, range(2))
    batch.store(0, {"boxes": np.zeros((3, 4), np.float32)})
    with pytest.raises(ValueError, match=r'4 float32.*Pad\(key="boxes", length=...\)'):
        batch.store(1, {"boxes": np.zeros((2, 4), np.float32)})
    with pytest.raises(ValueError, match="the same shape and dtype"):
        batch.store(1, {"boxes": np.zeros((3, 5), np.float32)})


def test_a_caption_left_in_a_stream_is_refused_with_the_example(mesh):
    stream = pipeline.Stream(source=scenes(), ops=SCENE_OPS[:3], batch_size=8)
    with pipeline.open_batches(stream, 0, mesh) as batches:
        with pytest.raises(ValueError, match='image .* of an array: "caption" is str'):
            next(batches.starting_at(1))


# What a plan makes up.


def test_a_plan_shapes_views_of_a_photo_that_was_never_taken():
    from big_vision_lite.data import unopened

    preprocess = (ops.Decode(), ops.Resize(size_px=16))
    rows = unopened.rows((ops.Decode(), VIEWS), preprocess)
    assert rows["global"].shape == (1, 2, 16, 16, 3)
    assert unopened.seconds_an_image((ops.Decode(), VIEWS), preprocess, 0.01) > 0
    assert cv2.imdecode(np.frombuffer(unopened.photo(9, 9, 3), np.uint8), 1).size
