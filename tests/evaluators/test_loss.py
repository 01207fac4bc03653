import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_context import Network, make_context, make_mesh, make_state
from outside.masked_autoencoder import MaskedAutoencoder, Reconstruction

from big_vision_lite.data.sources.arrays import InMemory
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.evaluators.loss import Loss
from big_vision_lite.models.vit import ViT
from big_vision_lite.types import Objective

RNG = np.random.default_rng(0)
NAMES = tuple("0123456789")
IMAGES = RNG.integers(0, 256, (21, 8, 8, 1), np.uint8)
LABELS = RNG.integers(0, 10, 21)


def score(evaluator, tmp_path, model, devices=8, names=NAMES, step=4, **more):
    mesh = make_mesh(devices)
    with jax.set_mesh(mesh):
        context = make_context(tmp_path, mesh, model, names, **more)
        state = make_state(model, mesh, (8, 8, 1), step=step)
        return evaluator.prepare(context)(state)


def labelled(names=NAMES):
    return InMemory(IMAGES, LABELS, names)


def masked_autoencoder():
    vit = ViT(width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=2)
    return MaskedAutoencoder(encoder=vit, decoder_width=8)


def test_the_loss_of_a_classifier_is_the_one_that_classification_reports(tmp_path):
    found = score(Loss(source=labelled(), batch_size=8), tmp_path, Network())
    expected = score(
        Classification(source=labelled(), batch_size=8), tmp_path, Network()
    )
    assert found == {n: expected[n] for n in ("loss", "accuracy", "examples")} | {
        "unreadable": 0.0
    }


def test_labels_are_found_among_the_models_by_name(tmp_path):
    shuffled = InMemory(IMAGES, 9 - LABELS, NAMES[::-1])
    found, expected = (
        score(Loss(source=source, batch_size=8), tmp_path, Network())
        for source in (shuffled, labelled())
    )
    assert found == expected
    with pytest.raises(ValueError, match="classes unknown to train"):
        score(Loss(source=labelled(tuple("abcdefghij"))), tmp_path, Network())


def test_random_masks_are_the_same_in_every_evaluation_and_on_any_devices(tmp_path):
    source = InMemory(IMAGES)
    objective = Reconstruction(patch_size=2)

    def run(devices, **more):
        return score(
            Loss(source=source, batch_size=8),
            tmp_path,
            masked_autoencoder(),
            devices=devices,
            names=(),
            objective=objective,
            **more,
        )

    one, again, eight = run(1), run(1), run(8)
    assert one == again and one["examples"] == 21 and one["masked"] == 0.75
    np.testing.assert_allclose(one["loss"], eight["loss"], rtol=1e-6)
    # Another batch has other masks: the ordinal counts, not only the seed.
    small = score(
        Loss(source=source, batch_size=16),
        tmp_path,
        masked_autoencoder(),
        names=(),
        objective=objective,
    )
    assert small["loss"] != eight["loss"]


class Batchwise(Objective):
    """A loss of one value an example, and two metrics of the whole batch."""

    def __call__(self, forward, batch, rng):
        losses = batch["image"].astype(jnp.float32).mean(axis=(1, 2, 3))
        rows = jnp.where(batch["valid"], 1.0, 0.0).sum()
        return losses, {"rows": rows, "progress": forward.progress}


def test_numbers_of_a_batch_are_weighted_by_its_examples(tmp_path):
    found = score(
        Loss(source=labelled(), batch_size=16),
        tmp_path,
        Network(),
        objective=Batchwise(),
        step=3,
    )
    np.testing.assert_allclose(found["loss"], IMAGES.mean(), rtol=1e-6)
    # 16 rows in the first batch, 5 in the second.
    np.testing.assert_allclose(found["rows"], (16 * 16 + 5 * 5) / 21, rtol=1e-6)
    assert found["progress"] == 0.75  # 3 of the 4 steps of the context


def test_what_cannot_be_evaluated_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="batch_size starts at 1"):
        Loss(source=labelled(), batch_size=0)
    empty = InMemory(IMAGES[:1], LABELS[:1], NAMES)
    empty._images = IMAGES[:0]
    with pytest.raises(ValueError, match="val: its set has no images"):
        score(Loss(source=empty), tmp_path, Network())


class AsksForMask(Objective):
    def __call__(self, forward, batch, rng):
        return batch["mask"].mean(axis=(1, 2)), {}


def test_a_key_that_no_op_makes_is_named_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="val: .* asked for .mask., but what the ops"):
        score(
            Loss(source=labelled(), batch_size=8),
            tmp_path,
            Network(),
            objective=AsksForMask(),
        )
