"""Distortions equal their formulas, happen as often as said, and leave others alone."""

import numpy as np
import pytest

from big_vision_lite.data.ops import ColorJitter, GaussianBlur, RandomGray, Solarize

RGB = np.random.default_rng(0).integers(0, 256, (12, 9, 3)).astype(np.uint8)
GRAY = RGB[:, :, :1]


class Fixed(np.random.Generator):
    """A generator whose uniform draws are the upper end, in the order of the fields."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def random(self):
        return 0.0

    def uniform(self, low, high):
        return high

    def permutation(self, count):
        return np.arange(count)


def run(op, image, rng=None):
    example = {"image": image, "label": 3}
    found = op(example, rng or Fixed())
    assert found["label"] == 3 and found["image"].dtype == np.uint8
    assert found["image"].shape == image.shape and example["image"] is image
    return found["image"].astype(int)


def luma(image):
    return image @ np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize("image", [RGB, GRAY], ids=["RGB", "gray"])
def test_brightness_contrast_and_offset_equal_their_formulas(image):
    wide = image.astype(np.float64)
    found = run(ColorJitter(brightness=0.5), image)
    np.testing.assert_allclose(found, np.clip(1.5 * wide, 0, 255), atol=0.51)
    mean = np.round((luma(wide) if image is RGB else wide).mean())
    found = run(ColorJitter(contrast=0.5), image)
    expected = np.clip(mean + 1.5 * (wide - mean), 0, 255)
    np.testing.assert_allclose(found, expected, atol=0.51)
    found = run(ColorJitter(offset=20.0), image)
    np.testing.assert_allclose(found, np.clip(wide + 20, 0, 255), atol=0.51)


def test_saturation_moves_away_from_gray_and_hue_turns_the_circle():
    wide = RGB.astype(np.float64)
    gray = luma(wide)[:, :, None]
    found = run(ColorJitter(saturation=0.5), RGB)
    expected = np.clip(gray + 1.5 * (wide - gray), 0, 255)
    np.testing.assert_allclose(found, expected, atol=1.1)
    # Half of the circle turns red into cyan.
    red = np.zeros((2, 2, 3), np.uint8)
    red[:, :, 0] = 200
    turned = run(ColorJitter(hue=0.5), red)
    np.testing.assert_allclose(turned[0, 0], [0, 200, 200], atol=2)
    # Gray has neither.
    op = ColorJitter(saturation=0.5, hue=0.5)
    np.testing.assert_array_equal(run(op, GRAY), GRAY)


def test_gray_blur_and_solarise_equal_their_formulas():
    np.testing.assert_allclose(
        run(RandomGray(), RGB), np.repeat(luma(RGB)[:, :, None], 3, axis=2), atol=0.6
    )
    np.testing.assert_array_equal(run(RandomGray(), GRAY), GRAY)
    expected = np.where(RGB >= 128, 255 - RGB.astype(int), RGB)
    np.testing.assert_array_equal(run(Solarize(), RGB), expected)
    point = np.zeros((21, 21, 1), np.uint8)
    point[10, 10] = 255
    found = run(GaussianBlur(sigma_min=1.5, sigma_max=1.5), point)[:, :, 0]
    x = np.arange(-4, 5)
    kernel = np.exp(-(x**2) / (2 * 1.5**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    np.testing.assert_allclose(found[6:15, 6:15], 255 * kernel, atol=1.1)


@pytest.mark.parametrize(
    "op",
    [
        ColorJitter(brightness=0.4, hue=0.1, probability=0.3),
        RandomGray(probability=0.3),
        GaussianBlur(probability=0.3, sigma_min=1.0),
        Solarize(probability=0.3),
    ],
    ids=lambda op: type(op).__name__,
)
def test_it_happens_as_often_as_said_and_by_the_generator_alone(op):
    rng = np.random.default_rng(1)
    changed = sum(np.any(run(op, RGB, rng) != RGB) for _ in range(400))
    assert 90 <= changed <= 150
    one, two = (run(op, RGB, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ColorJitter(brightness=-0.1), "brightness=-0.1: use >= 0"),
        (lambda: ColorJitter(hue=0.6), "hue=0.6 is a share of the circle"),
        (lambda: RandomGray(probability=1.2), "probability=1.2: use a number in 0..1"),
        (lambda: GaussianBlur(kernel_px=4), "odd kernel_px"),
        (lambda: GaussianBlur(sigma_min=0.0), "0 < sigma_min"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
