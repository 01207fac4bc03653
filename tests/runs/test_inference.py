"""`big_vision_lite.load`: arrays in, the numbers of predict and training out."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import shapes_run

import big_vision_lite
from big_vision_lite import predict
from big_vision_lite.data.ops import Decode
from big_vision_lite.data.sources.files import ImageFiles

NOTHING = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model():
    run = shapes_run.shared()[1]
    return big_vision_lite.load(run, allowed_modules=[shapes_run.MODULE], batch_size=8)


@pytest.fixture(scope="module")
def files():
    return ImageFiles(str(shapes_run.shared()[0] / "val"))


@pytest.fixture(scope="module")
def encoded(files):
    return [files[index]["image"] for index in range(len(files))]


@pytest.fixture(scope="module")
def pixels(encoded):
    """The same images as arrays, of 24 px; one of them is larger."""
    images = [Decode()({"image": x}, NOTHING)["image"] for x in encoded]
    images[3] = np.repeat(np.repeat(images[3], 2, 0), 3, 1)
    return images


def test_the_numbers_are_those_of_predict(model, files, encoded):
    run = shapes_run.load_run(shapes_run.shared()[1])
    found = predict.predict(run, files, top=3, embed=True, batch_size=8)
    np.testing.assert_allclose(model.features(encoded), found.features, atol=1e-6)
    probabilities = model.predict(encoded)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)
    order = np.argsort(-probabilities)
    np.testing.assert_array_equal(order, found.classes)
    np.testing.assert_allclose(
        np.take_along_axis(probabilities, order, -1), found.probabilities, atol=1e-6
    )
    assert model.class_names == shapes_run.CLASSES


def test_arrays_of_any_sizes_and_the_bytes_of_their_files_are_the_same(model, encoded):
    decoded = [Decode()({"image": x}, NOTHING)["image"] for x in encoded]
    wanted = model.features(encoded)
    np.testing.assert_array_equal(model.features(decoded), wanted)
    np.testing.assert_array_equal(model.features(np.stack(decoded)), wanted)
    mixed = [encoded[0], decoded[1], *encoded[2:]]
    np.testing.assert_array_equal(model.features(mixed), wanted)


def test_a_row_depends_on_its_image_alone(model, pixels):
    whole = model.predict(pixels)
    for images in (pixels[3:4], pixels[:5], pixels[3:20]):
        first = next(i for i, x in enumerate(pixels) if x is images[0])
        np.testing.assert_allclose(
            model.predict(images), whole[first : first + len(images)], atol=1e-6
        )
    gray = np.full((5, 7), 128, np.uint8)
    np.testing.assert_allclose(
        model.predict([gray]), model.predict([np.dstack([gray] * 3)]), atol=1e-6
    )


def test_a_second_call_compiles_nothing_and_changes_no_image(model, pixels, caplog):
    before = [image.copy() for image in pixels]
    model.features(pixels)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        model.features(pixels[::-1])
    assert "Compiling" not in caplog.text
    for old, image in zip(before, pixels, strict=True):
        np.testing.assert_array_equal(old, image)


IMAGE = np.zeros((4, 4, 3), np.uint8)
WRONG = {
    "one image": (IMAGE, r"shape \(4, 4, 3\); expected .* Put one image in a list"),
    "a path": ("cat.jpg", "images is one str"),
    "nothing": ([], "images is empty"),
    "floats": (
        np.zeros((2, 4, 4, 3), np.float32),
        r"images\[0\] is float32 \(4, 4, 3\); expected uint8 .* np.uint8",
    ),
    "paths": ([IMAGE, "cat.jpg"], r"images\[1\] is str; expected uint8"),
    "no pixels": ([np.zeros((0, 4, 3), np.uint8)], r"images\[0\] is uint8 \(0, 4, 3\)"),
    "two channels": (
        [IMAGE, np.zeros((4, 4, 2), np.uint8)],
        r"images\[1\] cannot be read: .*1, 3 or 4 channels",
    ),
    "no image files": ([b"abc"] * 2, r"Not one of 2 images .*images\[0\]: not a JPEG"),
    "no image file": ([b"abc"], r"images\[0\] cannot be read: not a JPEG"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_image_is_named(model, case):
    images, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        model.features(images)


def test_a_path_to_nothing_and_a_batch_of_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        big_vision_lite.load(str(tmp_path))
    with pytest.raises(ValueError, match="batch_size=0 is no number of images"):
        big_vision_lite.load(str(tmp_path), batch_size=0)


def test_importing_the_package_does_not_import_jax():
    code = "import big_vision_lite, sys; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
