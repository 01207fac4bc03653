import dataclasses
import functools
import math
import re
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from tiny_runs import (
    FSDP,
    Net,
    assert_same_step,
    collectives,
    computation,
    gradients,
    rows,
    start,
    tiny_vit,
)

from big_vision_lite import trees
from big_vision_lite.models.blocks.batch_norm import Statistics
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import Remat
from big_vision_lite.models.resnet import ResNet
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.forward import BoundModel
from big_vision_lite.training.step import make_eval_step, make_train_step
from big_vision_lite.types import Model, Objective

MESHES = {
    "one": dict(devices=1),
    "data=8": dict(devices=8),
    "data=2,fsdp=4": dict(devices=8, fsdp=4),
    "fsdp=8": dict(devices=8, fsdp=8),
}


@functools.cache
def five_steps(vit: bool, mesh: str, micro_batches: int = 1) -> dict:
    """Returns the gradients of the first step and the metrics of five."""
    model = tiny_vit() if vit else Net()
    run = start(model, **MESHES[mesh], micro_batches=micro_batches)
    first = run.advance(rows(seed=1))
    found = {"gradients": gradients(run.state)}
    rest = run.advance(*(rows(seed=seed) for seed in (2, 3, 4, 5)))
    return found | {"metrics": first + rest}


def case(vit, mesh, micro_batches=1, slow=False):
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(vit, mesh, micro_batches, marks=marks)


@pytest.mark.parametrize(
    ("vit", "mesh", "micro_batches"),
    [
        case(False, "data=8"),
        case(False, "data=2,fsdp=4"),
        case(False, "fsdp=8"),
        case(True, "data=2,fsdp=4", slow=True),
        case(True, "data=8", slow=True),
        case(True, "fsdp=8", slow=True),
    ],
)
def test_eight_devices_step_like_one(vit, mesh, micro_batches):
    found = five_steps(vit, mesh, micro_batches)
    assert_same_step(found, five_steps(vit, "one"))


def test_eight_devices_step_like_one_compiled_as_users_do(optimised):
    anew = five_steps.__wrapped__
    assert_same_step(anew(False, "data=2,fsdp=4"), anew(False, "one"))


@pytest.mark.parametrize(
    ("vit", "mesh", "micro_batches"),
    [
        case(False, "one", 4),
        case(False, "data=8", 2),
        case(False, "fsdp=8", 4),
        case(True, "data=2,fsdp=4", 2, slow=True),
        case(True, "one", 4, slow=True),
        case(True, "data=8", 4, slow=True),
    ],
)
def test_micro_batches_step_like_the_whole_batch(vit, mesh, micro_batches):
    found = five_steps(vit, mesh, micro_batches)
    assert_same_step(found, five_steps(vit, "one"))


def test_gradients_are_those_of_the_plain_mean_loss():
    run = start(Net())
    batch = rows(seed=1)
    params = jax.device_get(run.state.params)

    def loss(params):
        logits = Net().apply({"params": params}, image=jnp.asarray(batch["image"]))
        picked = jax.nn.log_softmax(logits["logits"])[np.arange(32), batch["label"]]
        return -picked.mean()

    value, expected = jax.value_and_grad(loss)(params)
    (metrics,) = run.advance(batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    for name, gradient in trees.flatten(expected).items():
        found = gradients(run.state)[name]
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-7)
    norm = math.sqrt(sum((g**2).sum() for g in gradients(run.state).values()))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)


@functools.cache
def compiled_text(fsdp: int, micro_batches: int) -> str:
    # 48 rows are 6 a device, numbers that no parameter has as a dimension.
    run = start(devices=8, fsdp=fsdp, micro_batches=micro_batches)
    assert not {6, 48} & {n for x in jax.tree.leaves(run.abstract) for n in x.shape}
    with jax.set_mesh(run.mesh):
        return run.step.lower(run.abstract, run.put(rows(48))).compile().as_text()


def test_gradients_are_reduced_once_however_many_micro_batches():
    counts = {}
    for micro_batches in (2, 3):
        text = compiled_text(1, micro_batches)
        bodies = re.findall(r"body=%?([\w.\-]+)", text)
        assert bodies, "the loop over the parts"
        for body in bodies:
            assert not collectives(computation(text, body))
        found = collectives(text)
        counts[micro_batches] = len(found)
        reduced = [
            size for kind, sizes in found if kind != "all-gather" for size in sizes
        ]
        # Every value of every gradient once, and no more than a few scalars.
        values = sum(x.size for x in jax.tree.leaves(start().abstract.params))
        sent = sum(math.prod(size) for size in reduced)
        assert values <= sent <= values + 10, (values, sent)
    assert counts[2] == counts[3]


@pytest.mark.parametrize(("fsdp", "micro_batches"), [(1, 1), (8, 1), (1, 2), (1, 3)])
def test_no_image_moves_between_devices(fsdp, micro_batches):
    found = collectives(compiled_text(fsdp, micro_batches))
    assert found
    for kind, sizes in found:
        for size in sizes:
            # 3 and 2 are the rows of a part.
            assert not {6, 48} & set(size) and size[:1] not in ([3], [2]), (kind, size)
    if fsdp == 1:
        assert {kind for kind, _ in found} == {"all-reduce"}


def with_valid(batch: dict, valid: int) -> dict:
    return batch | {"valid": np.arange(len(batch["label"])) < valid}


# 13 of 32 rows: on 8 devices the last four have nothing but padding.
@pytest.mark.parametrize(
    ("devices", "micro_batches"),
    [(8, 1), (8, 2), pytest.param(1, 4, marks=pytest.mark.slow)],
)
def test_padded_rows_change_nothing(devices, micro_batches):
    padded = with_valid(rows(32), 13)
    run = start(devices=devices, micro_batches=micro_batches)
    run.advance(padded)
    expected = jax.device_get(run.state.params)

    # Whatever the padding holds: the same bits.
    other = {name: value.copy() for name, value in padded.items()}
    other["image"][13:], other["label"][13:] = 255, 7
    again = start(devices=devices, micro_batches=micro_batches)
    again.step = run.step
    again.advance(other)
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(again.state.params), expected
    )

    # And without it: the same mean over the 13.
    alone = start()
    (metrics,) = alone.advance({name: value[:13] for name, value in rows(32).items()})
    for name, gradient in gradients(alone.state).items():
        np.testing.assert_allclose(
            gradients(run.state)[name], gradient, rtol=1e-4, atol=1e-7
        )
    (padded_metrics,) = start(devices=devices, micro_batches=micro_batches).advance(
        padded
    )
    np.testing.assert_allclose(padded_metrics["loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(padded_metrics["accuracy"], metrics["accuracy"], 1e-6)


def test_a_batch_of_padding_alone_is_not_finite_and_moves_nothing():
    run = start()
    before = jax.device_get(run.state.params)
    (metrics,) = run.advance(with_valid(rows(), 0))
    assert not metrics["finite"]
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(run.state.params), before
    )


def test_frozen_parameters_keep_their_bits_and_have_no_optimizer_state():
    freeze = ("stem/.*", "block_00/.*")
    run = start(Net(), freeze=freeze, optimizer="adam")
    frozen = set(trees.names(run.state.frozen))
    assert frozen == {
        f"{m}/{leaf}" for m in ("stem", "block_00/dense") for leaf in ("kernel", "bias")
    }
    before = jax.device_get(run.state)
    run.advance(rows(seed=1), rows(seed=2))
    after = jax.device_get(run.state)
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, before.params)
    assert min(jax.tree.leaves(moved)) > 1e-3
    named = trees.names(run.state.opt_state)
    assert not [n for n in named if any(n.endswith(name) for name in frozen)]
    # Second way: the trained ones move as if the frozen ones were constants.
    assert len([n for n in named if "/mu/" in n]) == len(trees.names(run.state.params))
    assert not frozen & set(trees.names(run.state.params))


def test_freezing_changes_no_gradient_of_the_others():
    whole, part = start(Net()), start(Net(), freeze=("block_00/.*",))
    whole.advance(rows())
    part.advance(rows())
    for name, gradient in gradients(part.state).items():
        np.testing.assert_allclose(
            gradient, gradients(whole.state)[name], rtol=1e-5, atol=1e-7
        )


SLOW = pytest.mark.slow
FROZEN_MODELS = [
    (Net(dropout=0.5), "block_"),
    (Net(dropout=0.5, remat=True), "block_"),
    # Stochastic depth grows from 0: only block_01 drops anything.
    pytest.param(
        tiny_vit(depth=2, stochastic_depth=0.5), "encoder/block_01", marks=SLOW
    ),
    pytest.param(
        tiny_vit(depth=2, stochastic_depth=0.5, remat=Remat.FULL),
        "encoder/block_01",
        marks=SLOW,
    ),
]


@pytest.mark.parametrize(("model", "prefix"), FROZEN_MODELS)
def test_frozen_modules_run_without_dropout(model, prefix):
    params = jax.device_get(start(model).state.params)
    image = jnp.asarray(rows()["image"])
    names = trees.names(params)
    frozen = frozenset(
        state_lib.frozen_modules({n for n in names if n.startswith(prefix)}, names)
    )
    assert frozen and not frozen & {"", "encoder", "head", "stem"}

    @functools.partial(jax.jit, static_argnums=1)
    def twice(key, frozen):
        bound = BoundModel(
            model, params, {}, rng=key, train=True, frozen_modules=frozen
        )
        evaluated = BoundModel(model, params, {})(image=image)["pooled"]
        return [bound(image=image)["pooled"] for _ in range(2)] + [evaluated]

    one, two, evaluated = twice(jax.random.key(1), frozenset())
    assert np.abs(one - two).max() > 1e-3 and np.abs(one - evaluated).max() > 1e-3
    one, two, evaluated = twice(jax.random.key(1), frozen)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_allclose(one, evaluated, atol=1e-5)


def test_frozen_batch_statistics_are_only_read():
    for freeze, moves in (((), True), (("stem/.*", "norm/.*"), False)):
        run = start(Net(batch_norm=True), freeze=freeze)
        before = jax.device_get(run.state.collections)
        run.advance(rows())
        after = jax.device_get(run.state.collections)
        same = jax.tree.map(np.array_equal, before, after)
        assert all(jax.tree.leaves(same)) != moves


def test_freeze_refuses_what_matches_nothing_and_what_leaves_nothing():
    with pytest.raises(ValueError, match='freeze pattern "blok.*" matches no name'):
        start(Net(), freeze=("blok.*",))
    with pytest.raises(ValueError, match=r"freezes all 8 parameters.*leave some out"):
        start(Net(), freeze=(".*",))


def test_the_average_is_a_copy_that_follows_its_formula():
    run = start(Net(), ema=0.75, devices=8, fsdp=8)
    for new, average in zip(
        jax.tree.leaves(run.state.params), jax.tree.leaves(run.state.ema), strict=True
    ):
        for a, b in zip(
            new.addressable_shards, average.addressable_shards, strict=True
        ):
            assert a.data.unsafe_buffer_pointer() != b.data.unsafe_buffer_pointer()
    expected = jax.device_get(run.state.params)
    for seed in (1, 2, 3):
        run.advance(rows(seed=seed))
        now = jax.device_get(run.state.params)
        expected = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, expected, now)
    found = jax.device_get(run.state.ema)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
        found,
        expected,
    )
    differ = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, now)
    assert max(jax.tree.leaves(differ)) > 1e-3


def bound(**fields):
    params = jax.tree.map(jnp.asarray, jax.device_get(start().state.params))
    image = jnp.asarray(rows()["image"])
    return BoundModel(Net(dropout=0.5), params, {}, **{"train": True, **fields}), image


def test_every_call_of_forward_has_its_own_dropout_mask():
    start()  # which `bound` finds again: nothing is placed on devices inside of jit

    @functools.partial(jax.jit, static_argnums=1)
    def twice(key, train):
        forward, image = bound(rng=key, train=train)
        return [forward(image=image)["pooled"] for _ in range(2)]

    one, two = twice(jax.random.key(1), True)
    assert np.abs(one - two).max() > 1e-2
    again = twice(jax.random.key(1), True)
    np.testing.assert_array_equal(again, (one, two))
    other, _ = twice(jax.random.key(2), True)
    assert np.abs(one - other).max() > 1e-2
    # In evaluation there is none.
    one, two = twice(jax.random.key(1), False)
    np.testing.assert_array_equal(one, two)


def scanned(forward, image):
    return jax.lax.scan(lambda c, x: (c, forward(image=x)["pooled"]), 0, image[None])


def vmapped(forward, image):
    return jax.vmap(lambda x: forward(image=x)["pooled"])(image[None])


def differentiated(forward, image):
    return jax.grad(lambda x: forward(image=x)["pooled"].sum())(image.astype(float))


def checkpointed(forward, image):
    return jax.checkpoint(lambda x: forward(image=x)["pooled"])(image)


@pytest.mark.parametrize("inside", [scanned, vmapped, differentiated, checkpointed])
def test_forward_refuses_to_be_called_inside_a_transformation(inside):
    forward, image = bound(rng=jax.random.key(1))
    with pytest.raises(ValueError, match=r"forward\(\) was called inside.*call it out"):
        inside(forward, image)

    def objective(forward, batch, rng):
        return inside(forward, batch["image"]), {}

    run = start(objective=objective)
    with pytest.raises(ValueError, match=r"forward\(\) was called inside"):
        run.advance(rows())


def test_forward_may_be_transformed_around():
    forward, image = bound(rng=jax.random.key(1))
    pooled = forward(image=image)["pooled"]
    total, _ = jax.lax.scan(lambda c, x: (c + x, None), jnp.zeros(16), pooled)
    np.testing.assert_allclose(total, pooled.sum(0), rtol=1e-4, atol=1e-5)


def test_capture_returns_what_a_block_returned():
    model = tiny_vit()
    image = jnp.asarray(rows()["image"])
    params = jax.device_get(start(model).state.params)
    names = ("encoder/block_00", "encoder/norm")

    @jax.jit
    def run(image):
        forward = BoundModel(model, params, {})
        with pytest.raises(ValueError, match='capture="encoder/block_7" is no module'):
            forward(image=image, capture=("encoder/block_7",))
        assert "captured" not in forward(image=image)
        return forward(image=image, capture=names)

    outputs = run(image)
    captured = outputs["captured"]
    assert set(captured) == set(names)
    tokens = outputs["grid"].reshape(captured["encoder/norm"].shape)
    np.testing.assert_array_equal(captured["encoder/norm"], tokens)
    # Second way: the norm of what the last block returned is the tokens.
    x = captured["encoder/block_00"]
    x = x - x.mean(-1, keepdims=True)
    scale, bias = params["encoder"]["norm"]["scale"], params["encoder"]["norm"]["bias"]
    normed = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + bias
    np.testing.assert_allclose(normed, tokens, atol=1e-5)


def test_capture_keeps_the_gradient_and_the_collections():
    def objective(forward, batch, rng):
        outputs = forward(image=batch["image"], capture=("block_00",))
        return jnp.square(outputs["captured"]["block_00"]).sum(-1), {}

    run = start(Net(batch_norm=True), objective=objective)
    names = trees.names(run.state.collections)
    run.advance(rows())
    assert trees.names(run.state.collections) == names
    found = gradients(run.state)
    assert np.abs(found["block_00/dense/kernel"]).max() > 1e-3
    assert not np.any(found["block_01/dense/kernel"])


def test_averaged_parameters_give_outputs_but_no_gradient(optimised):
    def objective(forward, batch, rng):
        teacher = forward(image=batch["image"], params="ema")["logits"]
        student = forward(image=batch["image"])["logits"]
        return jnp.square(student - teacher).sum(-1), {"teacher": teacher.sum(-1)}

    run = start(objective=objective, ema=0.5)
    image = jnp.asarray(rows()["image"])
    logits = jax.jit(lambda params: Net().apply({"params": params}, image=image))
    target = logits(jax.device_get(run.state.ema))["logits"]
    params = jax.device_get(run.state.params)
    # With student = teacher the loss, and all of its gradient, is zero.
    (metrics,) = run.advance(rows())
    assert metrics["loss"] == 0 and metrics["gradient_norm"] == 0
    np.testing.assert_allclose(metrics["teacher"], target.sum(-1).mean(), rtol=1e-4)

    # And apart, the gradient is that of a constant target.
    moved = jax.tree.map(lambda x: x + 0.1, params)
    put = jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding), moved, run.state.params
    )
    run.state = run.state.replace(params=put)

    def loss(params):
        student = logits(params)["logits"]
        return jnp.square(student - target).sum(-1).mean()

    expected = trees.flatten(jax.jit(jax.grad(loss))(moved))
    run.advance(rows())
    for name, gradient in gradients(run.state).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("params", ["ema", "averaged"])
def test_forward_refuses_parameters_that_are_not_there(params):
    forward, image = bound()
    with pytest.raises(ValueError, match=f'params="{params}".*allowed are "online"'):
        forward(image=image, params=params)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_the_counter_alone(what):
    def objective(forward, batch, rng):
        outputs = forward(image=batch["image"])
        x = jnp.abs(outputs["logits"].sum(-1))
        bad = batch["label"][0] == 3
        if what == "loss":
            return x + jnp.where(bad, jnp.inf, 0), {}
        return jnp.sqrt(x * jnp.where(bad, 0, 1)), {}  # at 0 its slope is infinite

    run = start(Net(batch_norm=True), objective=objective, ema=0.9, optimizer="adam")
    good, bad = rows(), rows() | {"label": np.full(32, 3, np.int32)}
    (metrics,) = run.advance(good)
    assert metrics["finite"]
    before = jax.device_get(run.state)
    (metrics,) = run.advance(bad)
    assert not metrics["finite"]
    assert np.isfinite(metrics["loss"]) == (what == "gradient")
    after = jax.device_get(run.state)
    assert after.step == before.step + 1
    for name, leaf in trees.flatten(after).items():
        if name != "step":
            np.testing.assert_array_equal(leaf, trees.flatten(before)[name], name)
    (metrics,) = run.advance(good)
    assert metrics["finite"]


@pytest.mark.parametrize("fsdp", [1, 4])
def test_one_compile_for_fresh_stepped_and_moved_states(fsdp):
    run = start(Net(batch_norm=True), devices=8, fsdp=fsdp, ema=0.9, optimizer="adam")
    run.advance(rows(seed=1), rows(seed=2), rows(seed=3))
    assert run.step._cache_size() == 1
    state_lib.check_same(run.abstract, run.state)
    # As a restore does: arrays from the host, placed by the blueprint.
    host = jax.device_get(run.state)
    run.state = jax.tree.map(
        lambda leaf, like: jax.device_put(leaf, like.sharding), host, run.abstract
    )
    state_lib.check_same(run.abstract, run.state)
    run.advance(rows(seed=4))
    assert run.step._cache_size() == 1


def test_another_dtype_or_sharding_would_be_noticed_before_it_compiles_again():
    run = start(devices=8, fsdp=8)
    wrong = run.state.replace(step=run.state.step.astype(jnp.float32))
    with pytest.raises(AssertionError, match="step: expected"):
        state_lib.check_same(run.abstract, wrong)
    whole = jax.device_put(run.state.params["stem"]["kernel"], jax.devices()[0])
    params = run.state.params | {"stem": run.state.params["stem"] | {"kernel": whole}}
    with pytest.raises(AssertionError, match="params/stem/kernel"):
        state_lib.check_same(run.abstract, run.state.replace(params=params))


def test_the_state_is_donated():
    run = start(ema=0.9, optimizer="adam")
    before = run.state
    run.advance(rows())
    deleted = {n: x.is_deleted() for n, x in trees.flatten(before).items()}
    assert all(deleted.values()), deleted
    with jax.set_mesh(run.mesh):
        lowered = run.step.lower(run.abstract, run.put(rows()))
    memory = lowered.compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.abstract))
    assert memory.alias_size_in_bytes >= size


def test_parameters_are_born_sharded():
    # 104 = 8 x 13 is no other size here, so that a whole kernel can be seen in text.
    run = start(Net(width=104), devices=8, fsdp=8, optimizer="adam")
    split = 0
    with jax.set_mesh(run.mesh):
        state = state_lib.create(run.init, run.abstract, 0)
    for name, leaf in trees.flatten(state).items():
        if leaf.sharding.is_fully_replicated:
            continue
        split += 1
        for shard in leaf.addressable_shards:
            assert shard.data.size == leaf.size // 8, name
    assert split == 3 * 4  # kernels; biases are whole
    kernel = state.params["stem"]["kernel"]
    assert kernel.shape == (64, 104)
    assert {s.data.shape for s in kernel.addressable_shards} == {(8, 104)}
    assert len({s.device for s in kernel.addressable_shards}) == 8
    assert np.std(kernel) > 0.05

    places = jax.tree.map(lambda leaf: leaf.sharding, run.abstract)
    with jax.set_mesh(run.mesh):
        lowered = jax.jit(run.init, out_shardings=places).lower(jax.random.key(0))
        compiled = lowered.compile()
    jax.tree.map(
        lambda leaf, place: assert_equivalent(place, leaf),
        run.abstract,
        compiled.output_shardings,
    )
    whole = re.findall(r".*\[(?:64|104),104\].*", compiled.as_text())
    assert not whole, whole[:3]


def assert_equivalent(place, leaf):
    assert place.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_momentum_lives_where_its_parameter_lives():
    run = start(devices=8, fsdp=8, optimizer="adam", ema=0.9)
    flat = trees.flatten(run.state)
    kernel = flat["params/block_00/dense/kernel"].sharding
    assert not kernel.is_fully_replicated
    for name, leaf in flat.items():
        if name.endswith("block_00/dense/kernel"):
            assert leaf.sharding.is_equivalent_to(kernel, 2), name
    assert sum(n.endswith("block_00/dense/kernel") for n in flat) == 4


def test_the_same_seed_gives_the_same_bits():
    def train(seed):
        run = start(Net(dropout=0.5), seed=seed, devices=8, fsdp=4)
        metrics = run.advance(rows(seed=1), rows(seed=2), rows(seed=3))
        return [m["loss"] for m in metrics], jax.device_get(run.state.params)

    losses, params = train(0)
    again, same = train(0)
    assert losses == again
    jax.tree.map(np.testing.assert_array_equal, params, same)
    others, _ = train(1)
    assert others != losses


def test_dropout_is_that_of_the_global_batch_on_any_mesh():
    losses = [
        start(Net(dropout=0.5), **mesh).advance(rows(seed=1))[0]["loss"]
        for mesh in (MESHES["one"], MESHES["data=2,fsdp=4"])
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    plain = start(Net()).advance(rows(seed=1))[0]["loss"]
    assert abs(plain - losses[0]) > 1e-3


def test_micro_batches_are_refused_for_batch_statistics():
    with pytest.raises(
        ValueError,
        match=r"micro_batches=2 with a model that keeps "
        r"batch_stats.*micro_batches=1",
    ):
        start(Net(batch_norm=True), micro_batches=2)


@dataclasses.dataclass(frozen=True)
class Contrast(Objective):
    """Tells every image from the others of the batch: the parts have fewer others."""

    def __call__(self, forward, batch, rng):
        z = forward(image=batch["image"])["pooled"]
        return -jax.nn.log_softmax(z @ z.T, axis=-1).diagonal(), {}


class WholeContrast(Contrast):
    needs_whole_batch: ClassVar[bool] = True


class Wrapped(nn.Module, Model, kw_only=True):
    """A backbone with batch norm, and a centre of its own where asked for."""

    backbone: ClassVar = "net"

    net: ResNet
    centre: bool = False

    @nn.compact
    def __call__(self, image, *, train=False):
        if self.centre:
            self.variable("centres", "centre", jnp.zeros, (3,))
        return self.net(image, train=train)


def test_micro_batches_ask_the_backbone_whether_statistics_are_frozen():
    def wrapped(statistics, **more):
        head = Classifier(num_classes=10)
        net = ResNet(stages=(1,), width=8, statistics=statistics, head=head)
        return Wrapped(net=net, **more)

    with pytest.raises(ValueError, match="--config.model.net.statistics=frozen"):
        start(wrapped(Statistics.BATCH), micro_batches=2)
    start(wrapped(Statistics.FROZEN), micro_batches=2)
    with pytest.raises(ValueError, match=r"that keeps centres: .*micro_batches=1\.$"):
        start(wrapped(Statistics.FROZEN, centre=True), micro_batches=2)


def test_micro_batches_are_refused_for_an_objective_that_needs_the_whole_batch():
    with pytest.raises(
        ValueError,
        match=r"micro_batches=2 with WholeContrast.*--config.micro_batches=1",
    ):
        start(objective=WholeContrast(), micro_batches=2)
    (whole,) = start(objective=WholeContrast()).advance(rows())
    # Why: undeclared, the parts give another loss without an error.
    (parts,) = start(objective=Contrast(), micro_batches=2).advance(rows())
    assert abs(parts["loss"] - whole["loss"]) > 0.1


def test_device_ops_see_the_whole_batch_once_and_only_in_training():
    seen = []

    def double(batch, rng):
        seen.append(batch["image"].shape)
        return {**batch, "image": batch["image"].astype(jnp.float32) * 0}

    run = start(device_ops=(double,), micro_batches=4)
    (metrics,) = run.advance(rows(seed=1))
    assert seen == [(32, 8, 8, 1)]
    black = start().advance(rows(seed=1) | {"image": rows()["image"] * 0})
    np.testing.assert_allclose(metrics["loss"], black[0]["loss"], rtol=1e-5)


def test_evaluation_uses_the_average_and_the_frozen_parameters():
    run = start(Net(dropout=0.5), ema=0.5, freeze=("stem/.*",))
    run.advance(rows(seed=1), rows(seed=2))
    step = make_eval_step(
        Net(dropout=0.5),
        lambda forward, batch, _: forward(image=batch["image"])["logits"],
    )
    found = step(run.state, rows())
    state = jax.device_get(run.state)
    for params, same in ((state.ema, True), (state.params, False)):
        merged = state_lib.merge(params, state.frozen)
        logits = Net().apply({"params": merged}, image=jnp.asarray(rows()["image"]))
        assert np.allclose(found, logits["logits"], atol=1e-5) == same


def test_an_objective_that_counts_its_random_key_gets_another_every_step():
    def objective(forward, batch, rng):
        logits = forward(image=batch["image"])["logits"]
        drawn = jnp.full(logits.shape[:1], jax.random.uniform(rng))
        return SoftmaxClassification()(forward, batch, rng)[0], {"drawn": drawn}

    run = start(objective=objective)
    drawn = [m["drawn"] for m in run.advance(rows(), rows(), rows())]
    assert len({float(x) for x in drawn}) == 3


def test_a_mesh_of_one_device_compiles_the_same_step_with_split_and_whole_rules():
    texts = set()
    for rules in (FSDP, ()):
        run = start()
        with jax.set_mesh(run.mesh):
            abstract = state_lib.blueprint(run.init, rules, run.mesh)
            step = make_train_step(
                Net(),
                SoftmaxClassification(),
                tiny_runs.keep_gradient(),
                run.mesh,
                abstract,
            )
            texts.add(step.lower(abstract, run.put(rows())).as_text())
    assert len(texts) == 1


def test_the_progress_of_a_run_goes_from_zero_to_one():
    def objective(forward, batch, rng):
        losses, _ = SoftmaxClassification()(forward, batch, rng)
        return losses, {"progress": forward.progress}

    for parts in (1, 2):
        run = start(objective=objective, num_steps=4, micro_batches=parts)
        found = run.advance(*(rows(seed=n) for n in range(3)))
        assert [float(metrics["progress"]) for metrics in found] == [0, 0.25, 0.5]
    run = start(objective=objective)
    with pytest.raises(ValueError, match="forward.progress is not known here: give"):
        run.advance(rows())


def test_an_average_follows_its_parameters_ever_more_slowly():
    run = start(num_steps=4, ema=(0.5, 1.0))
    average = jax.device_get(run.state.ema)
    for step in range(3):
        run.advance(rows(seed=step))
        # Half a cosine from 0.5 to 1, by hand.
        decay = 1 - 0.5 * (1 + np.cos(np.pi * step / 4)) / 2
        average = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * new,
            average,
            jax.device_get(run.state.params),
        )
        for expected, found in zip(
            jax.tree.leaves(average), jax.tree.leaves(run.state.ema), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_the_averaged_model_has_no_dropout_and_changes_no_statistics():
    def objective(forward, batch, rng):
        before = forward.collections
        one, two = (
            forward(image=batch["image"], params="ema")["logits"] for _ in range(2)
        )
        assert forward.collections is not None
        same = [
            a is b
            for a, b in zip(
                jax.tree.leaves(before),
                jax.tree.leaves(forward.collections),
                strict=True,
            )
        ]
        assert same and all(same)
        online = forward(image=batch["image"])["logits"]
        differ = jnp.abs(one - two).max(axis=-1)
        return jnp.square(online).sum(axis=-1), {"differ": differ}

    run = start(Net(batch_norm=True, dropout=0.5), objective=objective, ema=0.9)
    (metrics,) = run.advance(rows())
    assert metrics["differ"] == 0


def test_the_averaged_model_takes_the_statistics_of_the_batch_where_asked():
    def objective(forward, batch, rng):
        before = jax.tree.leaves(forward.collections)
        image = batch["image"]
        of_batch = forward(image=image, params="ema", statistics="batch")["logits"]
        running = forward(image=image, params="ema")["logits"]
        after = jax.tree.leaves(forward.collections)
        assert all(a is b for a, b in zip(before, after, strict=True))
        online = forward(image=image)["logits"]
        off = {
            "batch": jnp.abs(of_batch - online).max(axis=-1),
            "running": jnp.abs(running - online).max(axis=-1),
        }
        return jnp.square(online).sum(axis=-1), off

    # Nothing has moved: the average is the model.
    run = start(Net(batch_norm=True), objective=objective, ema=0.9)
    (metrics,) = run.advance(rows())
    assert metrics["batch"] < 1e-5 < 1e-3 < metrics["running"]


@pytest.mark.parametrize("inputs", [{"statistics": "batch"}, {"statistics": "mine"}])
def test_statistics_that_there_are_not_are_refused(inputs):
    def objective(forward, batch, rng):
        return forward(image=batch["image"], **inputs)["logits"].mean(axis=-1), {}

    with pytest.raises(ValueError, match='allowed are "running" and, with params="em'):
        start(objective=objective).advance(rows())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.mean(), r"losses of shape \(\) for a batch of 32 examples"),
        (lambda x: x[:, None], r"losses of shape \(32, 1\).*losses.reshape\(32, -1"),
        (lambda x: (x, jnp.ones(3)), r'metric "own" of shape \(3,\) for a batch'),
    ],
)
def test_what_is_not_one_loss_an_example_is_refused(change, message):
    def objective(forward, batch, rng):
        losses, _ = SoftmaxClassification()(forward, batch, rng)
        changed = change(losses)
        if isinstance(changed, tuple):
            return changed[0], {"own": changed[1]}
        return changed, {}

    with pytest.raises(ValueError, match=message):
        start(objective=objective).advance(rows())


def test_a_number_of_the_batch_is_a_metric_as_it_is():
    def objective(forward, batch, rng):
        losses, _ = SoftmaxClassification()(forward, batch, rng)
        return losses, {"number": jnp.float32(3), "rows": jnp.ones_like(losses)}

    for parts in (1, 2):
        run = start(objective=objective, micro_batches=parts)
        (metrics,) = run.advance(rows())
        assert metrics["number"] == 3 and metrics["rows"] == 1


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: x, "Called returned .*; return losses and metrics, .losses, {}."),
        (lambda x: (x, None), r"Called returned .*NoneType\); return losses and metr"),
        (lambda x: (x, {"loss": x}), 'a metric named "loss", which records have'),
    ],
)
def test_what_is_no_pair_of_losses_and_metrics_is_refused(returned, message):
    def objective(forward, batch, rng):
        return returned(SoftmaxClassification()(forward, batch, rng)[0])

    with pytest.raises(ValueError, match=message):
        start(objective=objective).advance(rows())


def test_frozen_batch_norms_keep_the_running_statistics_in_the_averaged_model_too():
    def objective(forward, batch, rng):
        image = batch["image"]
        of_batch = forward(image=image, params="ema", statistics="batch")["logits"]
        running = forward(image=image, params="ema")["logits"]
        online = forward(image=image)["logits"]
        return jnp.square(online).sum(axis=-1), {
            "apart": jnp.abs(of_batch - running).max(axis=-1)
        }

    options = dict(objective=objective, ema=0.9)
    frozen = start(Net(batch_norm=True), freeze=("norm/.*",), **options)
    (metrics,) = frozen.advance(rows())
    assert metrics["apart"] == 0
    (metrics,) = start(Net(batch_norm=True), **options).advance(rows())
    assert metrics["apart"] > 1e-3
