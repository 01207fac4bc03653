"""RandAugment, op by op against plain loops over pixels."""

import math

import numpy as np
import pytest

from big_vision_lite.data.ops import randaugment
from big_vision_lite.data.ops.randaugment import OPS, RandAugment

# 8 rows, 9 columns: dark, bright and colourful pixels, no two rows alike.
IMAGE = np.random.default_rng(7).integers(0, 256, (8, 9, 3), dtype=np.uint8)
NARROW = (IMAGE // 4 + 60).astype(np.uint8)


def rng(seed=0):
    return np.random.default_rng(seed)


def run(op, image, magnitude, generator=None):
    before = image.copy()
    out = getattr(randaugment, op)(image, magnitude, generator or rng())
    np.testing.assert_array_equal(image, before)
    assert out.shape == image.shape and out.dtype == np.uint8
    return out


def per_value(image, function):
    """Applies a function of one value to every value, in a loop."""
    out = np.empty_like(image)
    for at, value in np.ndenumerate(image):
        out[at] = int(min(max(function(int(value)), 0), 255))
    return out


def blended(degenerate, image, magnitude):
    factor = 0.18 * magnitude + 0.1
    mixed = degenerate + factor * (image.astype(float) - degenerate)
    # A hair above, so that exact integers survive the truncation.
    return np.clip(np.floor(mixed + 1e-6), 0, 255)


MAGNITUDES = [0, 5, 10, 15, 20]


@pytest.mark.parametrize("image", [IMAGE, NARROW], ids=["wide", "narrow"])
def test_auto_contrast_stretches_every_channel(image):
    expected = np.empty_like(image)
    for c in range(3):
        low, high = int(image[..., c].min()), int(image[..., c].max())
        for at, value in np.ndenumerate(image[..., c]):
            expected[(*at, c)] = int(255 / (high - low) * (int(value) - low) + 1e-4)
    out = run("auto_contrast", image, 10)
    # float32 may fall just below an integer, which truncation makes a whole step.
    np.testing.assert_allclose(out, expected, atol=1)
    assert (out == expected).mean() > 0.9
    flat = np.full((4, 4, 3), 9, np.uint8)
    np.testing.assert_array_equal(run("auto_contrast", flat, 10), flat)


def test_equalize_flattens_the_histogram_as_pil_does():
    image = np.random.default_rng(1).integers(40, 90, (40, 30, 3), dtype=np.uint8)
    expected = np.empty_like(image)
    for c in range(3):
        counts = [0] * 256
        for value in image[..., c].ravel():
            counts[value] += 1
        last = [n for n in counts if n][-1]
        step = (sum(counts) - last) // 255
        assert step > 0
        table, below = [], step // 2
        for n in counts:
            table.append(min(below // step, 255))
            below += n
        for at, value in np.ndenumerate(image[..., c]):
            expected[(*at, c)] = table[value]
    np.testing.assert_array_equal(run("equalize", image, 10), expected)
    # Too few pixels for a step of one: unchanged.
    np.testing.assert_array_equal(run("equalize", IMAGE, 10), IMAGE)


def test_invert_takes_values_from_255():
    np.testing.assert_array_equal(
        run("invert", IMAGE, 0), per_value(IMAGE, lambda v: 255 - v)
    )


@pytest.mark.parametrize(
    "magnitude, bits", [(0, 1), (2, 1), (5, 2), (10, 4), (15, 6), (20, 8), (25, 1)]
)
def test_posterize_keeps_the_first_bits(magnitude, bits):
    # int(0.4 M) bits; 0 and more than 8 are one bit in TensorFlow 2.21.
    step = 2 ** (8 - bits)
    expected = per_value(IMAGE, lambda v: v // step * step)
    np.testing.assert_array_equal(run("posterize", IMAGE, magnitude), expected)


@pytest.mark.parametrize(
    "magnitude, threshold", [(0, 0), (5, 128), (9, 230), (10, 0), (15, 128), (20, 0)]
)
def test_solarize_inverts_from_a_threshold_that_wraps_at_256(magnitude, threshold):
    expected = per_value(IMAGE, lambda v: v if v < threshold else 255 - v)
    np.testing.assert_array_equal(run("solarize", IMAGE, magnitude), expected)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_solarize_add_brightens_the_dark_half(magnitude):
    addition = 11 * magnitude
    expected = per_value(IMAGE, lambda v: v + addition if v < 128 else v)
    np.testing.assert_array_equal(run("solarize_add", IMAGE, magnitude), expected)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_color_blends_with_gray(magnitude):
    gray = np.empty((8, 9, 1))
    for row in range(8):
        for column in range(9):
            red, green, blue = (IMAGE[row, column] / 255).tolist()
            value = 0.2989 * red + 0.587 * green + 0.114 * blue
            gray[row, column] = int(value * 255.5)
    expected = blended(gray, IMAGE, magnitude)
    np.testing.assert_array_equal(run("color", IMAGE, magnitude), expected)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("shape", [(8, 9), (224, 224), (300, 300)])
def test_contrast_blends_with_the_number_of_pixels_over_256(magnitude, shape):
    image = np.resize(IMAGE, (*shape, 3))
    mean = int(min(shape[0] * shape[1] / 256, 255))
    assert mean == {8: 0, 224: 196, 300: 255}[shape[0]]
    out = run("contrast", image, magnitude)
    expected = blended(float(mean), image, magnitude)
    # float32 may fall just below an integer, as TensorFlow's does.
    np.testing.assert_allclose(out, expected, atol=1)
    assert (out == expected).mean() > 0.9


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_brightness_blends_with_black(magnitude):
    out = run("brightness", IMAGE, magnitude)
    expected = blended(0.0, IMAGE, magnitude)
    np.testing.assert_allclose(out, expected, atol=1)
    assert (out == expected).mean() > 0.9


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_sharpness_blends_with_a_smoothed_image_but_for_the_border(magnitude):
    smooth = IMAGE.astype(float)
    for row in range(1, 7):
        for column in range(1, 8):
            around = IMAGE[row - 1 : row + 2, column - 1 : column + 2].astype(int)
            total = around.sum((0, 1)) + 4 * around[1, 1]
            smooth[row, column] = total // 13
    expected = blended(smooth, IMAGE, magnitude)
    np.testing.assert_array_equal(run("sharpness", IMAGE, magnitude), expected)


def looked_up(image, source):
    """Reads each pixel at the nearest of its source (x, y); 128 from outside.

    Also says where the source lies clear of a tie between two pixels.
    """
    out = np.empty_like(image)
    clear = np.empty(image.shape[:2], bool)
    for row in range(image.shape[0]):
        for column in range(image.shape[1]):
            x, y = source(column, row)
            at = math.floor(y + 0.5), math.floor(x + 0.5)
            inside = 0 <= at[0] < image.shape[0] and 0 <= at[1] < image.shape[1]
            out[row, column] = image[at] if inside else 128
            fractions = abs(x % 1 - 0.5), abs(y % 1 - 0.5)
            clear[row, column] = min(fractions) > 0.01
    return out, clear


@pytest.mark.parametrize("seed, sign", [(2, 1), (0, -1)])
@pytest.mark.parametrize("op", ["rotate", "shear_x", "shear_y"])
@pytest.mark.parametrize("magnitude", [0, 3, 10, 20])
def test_warps_read_the_nearest_pixel_either_way(op, magnitude, seed, sign):
    assert (rng(seed).random() < 0.5) == (sign > 0)
    image = np.resize(IMAGE, (31, 37, 3))
    angle = sign * math.radians(3 * magnitude)
    shear = sign * 0.03 * magnitude
    middle_x, middle_y = 18, 15

    def source(x, y):
        if op == "shear_x":
            return x + shear * y, y
        if op == "shear_y":
            return x, y + shear * x
        x, y = x - middle_x, y - middle_y
        turned_x = math.cos(angle) * x - math.sin(angle) * y
        turned_y = math.sin(angle) * x + math.cos(angle) * y
        return turned_x + middle_x, turned_y + middle_y

    expected, clear = looked_up(image, source)
    out = run(op, image, magnitude, rng(seed))
    np.testing.assert_array_equal(out[clear], expected[clear])
    assert clear.mean() > 0.85  # shear 0.3 ties in every tenth row or column
    assert (magnitude == 0) == np.array_equal(out, image)


@pytest.mark.parametrize("seed, sign", [(2, 1), (0, -1)])
def test_translations_shift_by_ten_pixels_a_step(seed, sign):
    image = np.resize(IMAGE, (31, 37, 3))
    for op, axis in (("translate_y", 0), ("translate_x", 1)):
        expected = np.full_like(image, 128)
        inside = [slice(None), slice(None)]
        source = [slice(None), slice(None)]
        inside[axis] = slice(None, -20) if sign > 0 else slice(20, None)
        source[axis] = slice(20, None) if sign > 0 else slice(None, -20)
        expected[tuple(inside)] = image[tuple(source)]
        np.testing.assert_array_equal(run(op, image, 2, rng(seed)), expected)
        # 100 pixels: nothing is left.
        np.testing.assert_array_equal(run(op, image, 10, rng(seed)), image * 0 + 128)


def test_cutout_fills_a_square_around_any_pixel():
    image = np.zeros((31, 37, 3), np.uint8)
    centres = set()
    for seed in range(300):
        filled = run("cutout", image, 1, rng(seed))[..., 0] == 128
        rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
        assert filled.sum() == len(rows) * len(columns)
        assert 4 <= len(rows) <= 8 and 4 <= len(columns) <= 8  # twice int(0.4 * 10)
        if len(rows) == len(columns) == 8:
            centres.add((rows[0] + 4, columns[0] + 4))
    assert len(centres) > 100
    np.testing.assert_array_equal(run("cutout", IMAGE, 0), IMAGE)


# The op as a whole


def apply(op, image, seed=0):
    return op({"image": image, "label": 2}, rng(seed))["image"]


def test_sixteen_ops_are_drawn_alike():
    assert len(OPS) == len(set(OPS)) == 16
    image = np.random.default_rng(3).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    op = RandAugment(num_layers=1, magnitude=3)
    outputs = [apply(op, image, seed).tobytes() for seed in range(1600)]
    inverted = sum(out == (255 - image).tobytes() for out in outputs)
    assert 60 < inverted < 140  # 100, with 4 standard deviations of 9.7


def test_layers_apply_one_after_the_other():
    for seed in range(30):
        generator = rng(seed)
        expected = IMAGE
        for _ in range(3):
            expected = OPS[generator.integers(16)](expected, 9, generator)
        out = apply(RandAugment(num_layers=3, magnitude=9), IMAGE, seed)
        np.testing.assert_array_equal(out, expected)


def test_magnitude_zero_is_not_nothing():
    op = RandAugment(num_layers=1, magnitude=0)
    changed = [not np.array_equal(apply(op, IMAGE, seed), IMAGE) for seed in range(800)]
    # AutoContrast, Invert, Posterize, Solarize, Color, Contrast, Brightness, Sharpness;
    # Equalize has too few pixels here, the others move or add nothing.
    assert 0.42 < np.mean(changed) < 0.58


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 3), (1, 40, 3), (3, 3, 3)])
@pytest.mark.parametrize("magnitude", [0, 10, 30])
def test_every_op_takes_tiny_images_and_is_deterministic(shape, magnitude):
    image = rng(5).integers(0, 256, shape, dtype=np.uint8)
    for op in OPS:
        out = run(op.__name__, image, magnitude, rng(1))
        np.testing.assert_array_equal(out, run(op.__name__, image, magnitude, rng(1)))


def test_every_op_takes_a_crop_that_is_a_view():
    view = np.resize(IMAGE, (40, 50, 3))[3:30, 5:44]
    assert not view.flags.c_contiguous
    for op in OPS:
        out = run(op.__name__, view, 7, rng(1))
        np.testing.assert_array_equal(out, run(op.__name__, view.copy(), 7, rng(1)))


def test_label_and_input_stay():
    example = {"image": IMAGE, "label": 2}
    result = RandAugment()(example, rng())
    assert example["image"] is IMAGE and result["label"] == 2


def test_gray_images_and_impossible_fields_are_refused():
    with pytest.raises(ValueError, match=r"1 channel: put ToRgb\(\)"):
        apply(RandAugment(), IMAGE[..., :1])
    with pytest.raises(ValueError, match=r"put Decode\(\)"):
        apply(RandAugment(), b"bytes")
    with pytest.raises(ValueError, match="num_layers=0"):
        RandAugment(num_layers=0)
    with pytest.raises(ValueError, match="magnitude=-1"):
        RandAugment(magnitude=-1)
