"""What a model does not give is said by name, wherever it is asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_context import (
    Network,
    Pixels,
    make_context,
    make_mesh,
    make_state,
)

from big_vision_lite.data.sources.arrays import InMemory
from big_vision_lite.evaluators.loss import Loss
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.training.forward import BoundModel, MissingOutput, Outputs
from big_vision_lite.training.program import CountingForward, trace_objective
from big_vision_lite.types import Objective

IMAGES = jnp.zeros((8, 8, 8, 1), jnp.uint8)
SET = InMemory(np.asarray(IMAGES), np.zeros(8, int), ("a", "b"))


def bound(model):
    params = model.init(jax.random.key(0), IMAGES)["params"]
    return BoundModel(model, params, {})


@dataclasses.dataclass(kw_only=True)
class Asks(Objective):
    """An objective that asks for one output, and from the batch for one key."""

    output: str = "logits"
    key: str = "label"

    def __call__(self, forward, batch, rng):
        found = forward(image=batch["image"])[self.output]
        return found.mean(axis=-1) * batch[self.key], {}


MEANT = [
    ("logit", r'gives logits, pooled, no "logit"\. Did you mean "logits"\?'),
    ("Pooled", r'gives logits, pooled, no "Pooled"\. Did you mean "pooled"\?'),
    ("grid", r'gives logits, pooled, no "grid"\.'),
]


@pytest.mark.parametrize("output, message", MEANT)
def test_a_missing_output_is_named_beside_those_there_are(output, message):
    with pytest.raises(MissingOutput, match=message):
        bound(Network())(image=IMAGES)[output]


@pytest.mark.parametrize("output, message", MEANT)
def test_evaluation_and_training_say_so_before_the_first_step(
    tmp_path, output, message
):
    mesh, model, objective = make_mesh(1), Network(), Asks(output=output)
    with jax.set_mesh(mesh):
        context = make_context(tmp_path, mesh, model, "ab", objective=objective)
        with pytest.raises(ValueError, match=f"val: the model {message}"):
            Loss(source=SET, batch_size=8).prepare(context)
        state = jax.eval_shape(lambda: make_state(model, mesh, (8, 8, 1)))
    batch = {"image": IMAGES, "label": jnp.zeros(8, jnp.int32)}
    with pytest.raises(ValueError, match=f"Asks: the model {message}"):
        trace_objective(CountingForward(model, state), objective, batch)


def test_a_model_without_a_head_is_told_to_get_one():
    forward = bound(Pixels(has_head=False))
    batch = {"image": IMAGES, "label": jnp.zeros(8, jnp.int32)}
    with pytest.raises(ValueError, match='gives pooled, no "logits". It has no head'):
        SoftmaxClassification()(forward, batch, jax.random.key(0))


def test_a_misspelt_key_of_the_batch_blames_the_batch(tmp_path):
    mesh, objective = make_mesh(1), Asks(key="labels")
    with jax.set_mesh(mesh):
        context = make_context(tmp_path, mesh, Network(), "ab", objective=objective)
        with pytest.raises(ValueError, match='labels.* Did you mean "label"'):
            Loss(source=SET, batch_size=8).prepare(context)


def test_outputs_are_a_dict_to_python_and_to_jax():
    outputs = bound(Network())(image=IMAGES)
    assert outputs.get("logit") is None and "logit" not in outputs
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree))(outputs)
    assert isinstance(doubled, Outputs) and sorted(doubled) == ["logits", "pooled"]
    np.testing.assert_array_equal(doubled["logits"], 2 * outputs["logits"])
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(doubled)
    ]
    assert paths == ["['logits']", "['pooled']"]
