"""Ops that make images worse on purpose."""

import numpy as np
import pytest

from big_vision_lite.data.ops.colour import RandomLowResolution


def worse(image: np.ndarray, side_min: int, seed: int = 0) -> np.ndarray:
    op = RandomLowResolution(side_min_px=side_min)
    return op({"image": image, "label": 0}, np.random.default_rng(seed))["image"]


def test_one_pixel_is_the_mean_everywhere():
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 16
    always_one = next(
        s for s in range(99) if np.random.default_rng(s).integers(1, 5) == 1
    )
    found = worse(image, 1, always_one)
    assert found.shape == image.shape and found.dtype == np.uint8
    assert (found == round(image.mean())).all()


def test_the_smallest_side_of_the_image_itself_changes_nothing():
    image = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    assert (worse(image, 6) == image).all()
    assert (worse(image, 60) == image).all(), "a larger side is the image's own"


def test_flat_images_stay_and_detail_goes():
    flat = np.full((8, 12, 1), 77, np.uint8)
    board = (np.indices((8, 12)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    spreads = []
    for seed in range(50):
        assert (worse(flat, 2, seed) == 77).all()
        spreads.append(worse(board, 2, seed).std())
    assert min(spreads) < 40 and max(spreads) > 120


def test_no_size_is_refused():
    with pytest.raises(ValueError, match="side_min_px=0 is no size"):
        RandomLowResolution(side_min_px=0)
