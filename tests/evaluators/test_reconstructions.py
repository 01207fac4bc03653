"""Pictures show what was seen, what was predicted and what was there."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from evaluation_context import Network, make_context, make_mesh, make_state
from flax import linen as nn

from big_vision_lite.data.sources import InMemory
from big_vision_lite.evaluators.reconstructions import HIDDEN_GREY, Reconstructions
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.objectives.reconstruction import MaskedReconstruction
from big_vision_lite.runs.picture_grid import write_grid
from big_vision_lite.types import Model

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (11, 8, 8, 1)).astype(np.uint8)
SOURCE = InMemory(IMAGES, np.zeros(11, np.int32), ("a", "b"))


class HalfBlind(nn.Module, Model):
    """Hides the two lower patches of four; predicts `offset` above the truth."""

    offset: float = 0.1
    mean = (100.0,)
    std = (50.0,)

    @nn.compact
    def __call__(self, image, train=False):
        self.param("unused", nn.initializers.zeros, (8, 8))
        scaled = (image.astype(jnp.float32) - 100) / 50
        patches = scaled.reshape(-1, 2, 4, 2, 4, 1).swapaxes(2, 3).reshape(-1, 4, 16)
        masked = jnp.broadcast_to(jnp.arange(4) >= 2, patches.shape[:2])
        return {
            "image": scaled,
            "patches": patches,
            "masked": masked,
            "reconstruction": patches + self.offset,
            "pooled": patches.mean(axis=1),
        }


def evaluate(workdir, evaluator, *, devices=1, model=None, objective=None):
    model, mesh = model or HalfBlind(), make_mesh(devices)
    with jax.set_mesh(mesh):
        state = make_state(model, mesh, (8, 8, 1))
        objective = objective or MaskedReconstruction(norm_pix=False)
        made = make_context(workdir, mesh, model, objective=objective)
        return evaluator.prepare(made)(state)


@pytest.mark.parametrize("devices", [1, 8])
def test_pixels_of_the_sheet_are_those_of_the_images(tmp_path, devices):
    found = evaluate(
        tmp_path,
        Reconstructions(source=SOURCE, count=10, batch_size=8),
        devices=devices,
    )
    assert found["examples"] == 11
    assert found["rmse"] == pytest.approx(0.1 * 50, rel=1e-4)
    sheet = cv2.imread(str(tmp_path / "val/step_00000004.png"), cv2.IMREAD_GRAYSCALE)
    assert sheet.shape == (5 * 10, 6 * 10)
    for index in range(10):
        row, column = divmod(3 * index, 6)
        seen, filled, whole = (
            sheet[10 * row :, 10 * (column + k) :][:8, :8] for k in range(3)
        )
        image = IMAGES[index, :, :, 0]
        np.testing.assert_array_equal(whole, image)
        np.testing.assert_array_equal(seen[:4], image[:4])
        assert (seen[4:] == HIDDEN_GREY).all()
        np.testing.assert_array_equal(filled[:4], image[:4])
        expected = np.clip(image[4:].astype(int) + 5, 0, 255)
        np.testing.assert_array_equal(filled[4:], expected)


def test_with_norm_pix_the_prediction_is_in_units_of_its_patch(tmp_path):
    evaluator = Reconstructions(source=SOURCE, batch_size=8)
    objective = MaskedReconstruction()
    found = evaluate(tmp_path, evaluator, objective=objective)
    errors = []
    for image in IMAGES[:, :, :, 0].astype(np.float64):
        x = (image - 100) / 50
        parts = [x[4:, :4].ravel(), x[4:, 4:].ravel()]
        wrong = [
            (p + 0.1) * np.sqrt(p.var(ddof=1) + 1e-6) + p.mean() - p for p in parts
        ]
        errors.append(np.mean(np.square(wrong)) * 50**2)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean(errors)), rel=1e-4)


def test_what_cannot_be_drawn_is_said(tmp_path):
    with pytest.raises(ValueError, match="count=0.* draws nothing"):
        Reconstructions(source=SOURCE, count=0)
    with pytest.raises(ValueError, match="the objective is SoftmaxClassification"):
        evaluate(
            tmp_path,
            Reconstructions(source=SOURCE),
            model=Network(),
            objective=SoftmaxClassification(),
        )


def test_a_grid_of_colours_keeps_them(tmp_path):
    images = RNG.integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    write_grid(images, epath.Path(tmp_path / "x.png"), columns=2)
    sheet = cv2.imread(str(tmp_path / "x.png"))[..., ::-1]
    assert sheet.shape == (12, 14, 3)
    np.testing.assert_array_equal(sheet[6:10, :5], images[2])
