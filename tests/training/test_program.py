"""What a recipe becomes before anything is compiled, and what is refused there."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from outside.masked_autoencoder import MaskedAutoencoder, Reconstruction
from outside.self_distillation import SelfDistillation, Student
from tiny_runs import rows, tiny_vit

from big_vision_lite import train
from big_vision_lite.config import TrainConfig
from big_vision_lite.data.ops import Decode
from big_vision_lite.data.ops.device import Mixup
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import Digits, ImageFolder
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SigmoidClassification
from big_vision_lite.recipes import command_line
from big_vision_lite.runtime import sharding
from big_vision_lite.schedules import Average, Constant
from big_vision_lite.training import program
from big_vision_lite.training.optimizers import AdamW
from big_vision_lite.types import Model, Objective

HEAD = "--config.model.head.num_classes=10"
MIXUP = "'--config.data.device_ops[0].num_classes=10'"


class Embedding(Objective):
    """An objective without classes: every image to the origin."""

    def __call__(self, forward, batch, rng):
        return (forward(image=batch["image"])["pooled"] ** 2).sum(-1), {}


def build(head, mixup=None, objective=None, batch=None) -> program.Program:
    ops = () if mixup is None else (Mixup(alpha=0.2, num_classes=mixup),)
    config = TrainConfig(
        num_steps=1,
        model=tiny_vit(head=head),
        objective=objective or SigmoidClassification(),
        data=Stream(source=Digits(), device_ops=ops, batch_size=32),
        preprocess=(Decode(channels=1),),
        optimizer=AdamW(schedule=Constant(peak=0.1)),
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        spec = jax.eval_shape(lambda: batch or rows())
        return program.build(config, mesh, spec)


@pytest.mark.parametrize(
    ("head", "mixup", "wrong"),
    [(5, None, ["head"]), (12, None, ["head"]), (12, 12, ["head", "mixup"])]
    + [(10, 12, ["mixup"])],
)
def test_a_head_that_does_not_fit_the_classes_is_refused(head, mixup, wrong):
    """Narrower or wider: labels would go missing, or outputs stand for nothing."""
    with pytest.raises(ValueError) as caught:
        build(Classifier(num_classes=head), mixup)
    found = [f"{head} logits"]
    found += [f"model.head.num_classes={head}"] * ("head" in wrong)
    found += ["data.device_ops[0].num_classes=12"] * ("mixup" in wrong)
    options = " ".join({"head": HEAD, "mixup": MIXUP}[name] for name in wrong)
    assert str(caught.value) == (
        "data.source has 10 classes (0, 1, 2, 3, 4, ...), the model and its labels "
        f"have {', '.join(found)}; every class needs one logit. Use {options}, or the "
        "recipe's own argument for the number of classes, if it takes one."
    )


def test_a_head_that_fits_or_none_at_all_is_taken():
    assert build(Classifier(num_classes=10), mixup=10).flops_per_step > 0
    several = rows() | {"label": np.eye(10, dtype=np.float32)[np.arange(32) % 10]}
    assert build(Classifier(num_classes=10), batch=several).flops_per_step > 0
    assert build(None, objective=Embedding()).flops_per_step > 0


def test_the_command_line_says_it_before_any_step(tmp_path, capsys):
    recipe = f"--config={pathlib.Path(__file__).parents[1]}/recipes/digits_spread.py"
    command = ["train", recipe, f"--workdir={tmp_path}"]
    narrow = "--config.model.head.num_classes=9"
    assert command_line.run(train.main, [*command, narrow]) == 1
    shown = capsys.readouterr()
    assert "data.source has 10 classes" in shown.err and HEAD in shown.err
    assert "loss" not in shown.out
    assert not list((tmp_path / "checkpoints").iterdir())


SIZE = 8
ENCODER = dict(width=16, depth=2, mlp_dim=32, num_heads=2, patch_size=2)


def accounted(model, objective, *, freeze=(), ema=None, views=False) -> int:
    """The FLOPs of a step on 32 images of 8 px."""
    config = TrainConfig(
        num_steps=1,
        model=model,
        objective=objective,
        data=Stream(source=Digits(), batch_size=32),
        preprocess=(Decode(channels=1),),
        optimizer=AdamW(schedule=Constant(peak=0.1)),
        freeze=freeze,
        ema=ema,
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    batch = rows() | ({"views": rows()["image"][:, None]} if views else {})
    if views:
        batch["views"] = np.repeat(batch["views"], 2, axis=1)
    with jax.set_mesh(mesh):
        spec = jax.eval_shape(lambda: batch)
        return program.build(config, mesh, spec).flops_per_step


def products(tokens: int) -> int:
    """FLOPs of two blocks on one image: projections, attention, MLP."""
    width, hidden = ENCODER["width"], ENCODER["mlp_dim"]
    dense = 4 * width * width + 2 * width * hidden
    return 2 * 2 * (tokens * dense + 2 * tokens * tokens * width)


def notes(source, objective=None, head=None) -> tuple[str, ...]:
    model = ViT(**ENCODER, head=head)
    if objective is None:
        model = MaskedAutoencoder(encoder=model, decoder_width=16)
    config = TrainConfig(
        num_steps=1,
        model=model,
        objective=objective or Reconstruction(patch_size=2),
        data=Stream(source=source, batch_size=32),
        preprocess=(Decode(channels=1),),
        optimizer=AdamW(schedule=Constant(peak=0.1)),
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        spec = jax.eval_shape(rows)
        return program.build(config, mesh, spec).notes


def test_labels_that_an_objective_ignores_are_said(tmp_path):
    (said,) = notes(Digits())
    assert said == (
        "labels of data.source are read but Reconstruction does not use them."
    )
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(20):
            (tmp_path / name / f"{index}.png").write_bytes(b"")
    (said,) = notes(ImageFolder(path=str(tmp_path)))
    assert "; --config.data.source.labels=false leaves them out." in said
    # Used, or the classes of a head, or not there.
    head = Classifier(num_classes=10)
    assert not notes(Digits(), SigmoidClassification(), head)
    unlabelled = ImageFolder(path=str(tmp_path), labels=False)
    assert not notes(unlabelled)


PATCHES = (SIZE // 2) ** 2
EMBEDDING = 2 * PATCHES * 4 * ENCODER["width"]
HEAD_FLOPS = 2 * ENCODER["width"] * 10


def test_a_masked_model_costs_what_it_sees():
    masked = MaskedAutoencoder(encoder=ViT(**ENCODER), decoder_width=16)
    tokens = PATCHES // 4
    decoder = products(PATCHES) // 2 + 2 * (
        tokens * 16 * 16 + PATCHES * 16 * 4  # narrow, pixels
    )
    expected = 3 * 32 * (EMBEDDING + products(tokens) + decoder)
    # Tokens are picked by a product with zeros and ones, which have no gradient.
    expected += 2 * 32 * 2 * tokens * PATCHES * 16
    assert accounted(masked, Reconstruction(patch_size=2)) == expected


def test_frozen_parameters_cost_forward_alone():
    model = ViT(**ENCODER, head=Classifier(num_classes=10))
    body = EMBEDDING + products(PATCHES)
    whole = accounted(model, SigmoidClassification())
    assert whole == 3 * 32 * (body + HEAD_FLOPS)
    probe = accounted(model, SigmoidClassification(), freeze=("(?!head/).*",))
    # Of the head nothing below it is trained: the convention counts 3 all the same.
    assert probe == 32 * (body + 3 * HEAD_FLOPS)
    # A frozen head still hands the gradient down: one product more.
    below = accounted(model, SigmoidClassification(), freeze=("head/.*",))
    assert below == 32 * (3 * body + 2 * HEAD_FLOPS)


def test_an_averaged_teacher_costs_forward_alone():
    student = Student(encoder=ViT(**ENCODER), prototypes=10)
    found = accounted(student, SelfDistillation(), ema=Average(start=0.9), views=True)
    assert found == (3 + 1) * 32 * (EMBEDDING + products(PATCHES) + HEAD_FLOPS)


class Crops(nn.Module, Model):
    """One dense layer on each of a list of images."""

    def inputs(self, batch):
        return {"image": [batch["image"]]}

    @nn.compact
    def __call__(self, image, *, train=False):
        flat = [x.reshape(len(x), -1).astype(jnp.float32) for x in image]
        return {"pooled": nn.Dense(4, name="dense")(jnp.concatenate(flat))}


class OfCrops(Objective):
    def __call__(self, forward, batch, rng):
        pooled = forward(image=[batch["image"], batch["image"]])["pooled"]
        return jnp.square(pooled).sum(axis=-1).reshape(2, -1).sum(axis=0), {}


def test_images_in_a_list_cost_what_they_cost_alone():
    assert accounted(Crops(), OfCrops()) == 3 * 2 * 32 * 2 * 64 * 4
