"""What an evaluator gets from its context: rows and sums of what is valid, only."""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_context import Damaged, Network, make_context, make_mesh, make_state

import big_vision_lite
from big_vision_lite.data.ops import Decode
from big_vision_lite.data.sources.arrays import InMemory
from big_vision_lite.runs.scores import check_fields
from big_vision_lite.types import Source

NAMES = tuple("0123456789")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (21, 8, 8, 1), np.uint8)
LABELS = RNG.integers(0, 10, 21)
SOURCE = InMemory(IMAGES, LABELS, NAMES)


def sums(tmp_path, function, *, source=SOURCE, devices=1, batch_size=8, check=True):
    mesh, model = make_mesh(devices), Network()
    ops = (Decode(channels=1),) if isinstance(source, Damaged) else ()
    with jax.set_mesh(mesh):
        context = make_context(tmp_path, mesh, model, NAMES, ops=ops)
        step = context.make_eval_step(function)
        where = (source, ops, batch_size)
        if check:
            context.check_step(step, *where)
        return context.sums(step, make_state(model, mesh, (8, 8, 1)), *where)


def rows(forward, batch, rng):
    """Of padding, which is zeros, the logarithm is not finite and the label a class."""
    label = jax.nn.one_hot(batch["label"], 10, dtype=jnp.int8)
    pixels = batch["image"].astype(jnp.float32).sum(axis=(1, 2, 3))
    logits = forward(image=batch["image"])["logits"]
    return {
        "counts": label,
        "pairs": label[:, :, None] * label[:, None, :],
        "labelled": batch["label"] >= 0,
        "log": jnp.log(pixels),
        "half": pixels.astype(jnp.bfloat16),
        "logits": logits,
    }


@pytest.mark.parametrize("devices, batch_size", [(1, 8), (1, 21), (8, 8), (8, 32)])
def test_sums_take_every_example_once_whatever_the_padding(
    tmp_path, devices, batch_size
):
    found = sums(tmp_path, rows, devices=devices, batch_size=batch_size)
    counts = np.bincount(LABELS, minlength=10)
    pixels = IMAGES.sum(axis=(1, 2, 3), dtype=np.float64)
    np.testing.assert_array_equal(found["counts"], counts)
    np.testing.assert_array_equal(found["pairs"], np.diag(counts))
    assert found["labelled"] == found["examples"] == 21
    np.testing.assert_allclose(found["log"], np.log(pixels).sum(), rtol=1e-6)
    # Rounded to bfloat16 (8 bits) is the row, not the sum.
    np.testing.assert_allclose(found["half"], pixels.sum(), rtol=2**-9)
    one = sums(tmp_path, rows, batch_size=21)
    np.testing.assert_allclose(found["logits"], one["logits"], rtol=1e-5)


def test_sums_leave_unreadable_images_out(tmp_path):
    bad = (0, 3, 20)
    found = sums(tmp_path, rows, source=Damaged(SOURCE, bad))
    kept = np.delete(LABELS, bad)
    assert found["examples"] == 18
    np.testing.assert_array_equal(found["counts"], np.bincount(kept, minlength=10))


def test_counts_of_many_batches_do_not_overflow(tmp_path):
    def large(forward, batch, rng):
        return {"pixels": jnp.full(len(batch["label"]), 2**28, jnp.int32)}

    found = sums(tmp_path, large, batch_size=4)
    assert found["pixels"] == 21 * 2**28 > np.iinfo(np.int32).max


@pytest.mark.parametrize(
    "output, shape",
    [
        (lambda label: jnp.bincount(label, length=10), r"\(10,\)"),
        (lambda label: (label > 0).sum(), r"\(\)"),
        (lambda label: jax.nn.one_hot(label, 10).T, r"\(10, 8\)"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_a_function_that_sums_itself_is_refused(tmp_path, output, shape, check):
    def function(forward, batch, rng):
        return {"counts": output(batch["label"]), "good": batch["label"]}

    message = f'val: .* returned "counts" of shape {shape} for a batch of 8 .* \\[8, '
    with pytest.raises(ValueError, match=message):
        sums(tmp_path, function, check=check)


def test_the_number_of_examples_has_its_name_for_itself(tmp_path):
    def function(forward, batch, rng):
        return {"examples": batch["label"]}

    with pytest.raises(ValueError, match='number of rows as "examples"'):
        sums(tmp_path, function)


def test_the_shortest_evaluator_of_the_map_scores(tmp_path):
    text = (pathlib.Path(big_vision_lite.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(@dataclasses.*?)```", text, re.DOTALL)
    names = {"Source": Source, "check_fields": check_fields, "jnp": jnp}
    exec(code, names | {"dataclasses": dataclasses}, found := {})
    evaluator = found["MeanLogit"](source=SOURCE, batch_size=8)
    mesh, model = make_mesh(8), Network()
    with jax.set_mesh(mesh):
        state = make_state(model, mesh, (8, 8, 1))
        scores = evaluator.prepare(make_context(tmp_path, mesh, model, NAMES))(state)
    logits = model.apply({"params": jax.device_get(state.params)}, IMAGES)["logits"]
    expected = np.asarray(logits)[np.arange(21), LABELS].mean()
    np.testing.assert_allclose(scores["mean_logit"], expected, rtol=1e-5)
    assert (scores["examples"], scores["unreadable"]) == (21, 0)


def context_of(tmp_path, names, messages=None):
    return make_context(tmp_path, make_mesh(1), Network(), names, messages=messages)


@pytest.mark.parametrize("several", [False, True])
def test_labels_of_a_source_become_those_of_the_model(tmp_path, several):
    """By name; where only one side has names, which is which cannot be known."""
    labels = np.array([0, 1, 1])
    batch = {"label": np.eye(2, dtype=np.float32)[labels] if several else labels}
    two = InMemory(IMAGES[:2], LABELS[:2] % 2, ("c", "a"))
    messages = []
    classes = context_of(tmp_path, "abc", messages).classes(two)
    found = np.asarray(classes.translate(batch)["label"])
    expected = np.array([2, 0, 0])
    np.testing.assert_array_equal(found, np.eye(3)[expected] if several else expected)
    assert classes.names == ("a", "b", "c") and "missing: b" in messages[0]
    for source, names in ((two, ()), (InMemory(IMAGES[:2]), "abc")):
        with pytest.raises(ValueError, match="which is which cannot be known"):
            context_of(tmp_path, names).classes(source)
    classes = context_of(tmp_path, ()).classes(InMemory(IMAGES[:2]))
    assert classes.translate(batch) is batch
    assert classes.translate({"image": IMAGES}) == {"image": IMAGES}


def test_unreadable_examples_are_counted_and_said(tmp_path):
    messages = []
    context = context_of(tmp_path, NAMES, messages)
    assert context.counts(SOURCE, 21) == {"examples": 21, "unreadable": 0}
    assert not messages
    assert context.counts(SOURCE, 19) == {"examples": 19, "unreadable": 2}
    assert "val: 2 of 21 examples are unreadable and not counted" in messages[0]


@pytest.mark.parametrize("kind", ["rows", "sums"])
def test_a_set_of_which_nothing_is_read_has_no_scores(tmp_path, monkeypatch, kind):
    context = context_of(tmp_path, NAMES)
    step = context.make_eval_step(rows)
    state = make_state(context.model, context.mesh, (8, 8, 1))
    batches = context.eval_batches(SOURCE, (), 8)
    none = [b | {"valid": jnp.zeros(8, bool)} for b in batches]
    monkeypatch.setattr(type(context), "eval_batches", lambda *_: none)
    with pytest.raises(ValueError, match="val: not one of 21 examples could be read"):
        getattr(context, kind)(step, state, SOURCE, (), 8)
