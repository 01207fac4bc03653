import types as python_types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_runs import tiny_vit, tpus

from big_vision_lite import trees
from big_vision_lite.data import pipeline
from big_vision_lite.runtime import layout, sharding
from big_vision_lite.runtime.sharding import Layout, Mesh, ShardingRule, make_mesh
from big_vision_lite.schedules import Constant
from big_vision_lite.training.optimizers import SGD, Adafactor, AdamW, MomentumDtype

pytestmark = pytest.mark.compilers

FSDP = (ShardingRule(pattern=".*"),)
PARAMS = {
    "encoder": {
        "block_00": {
            "kernel": jnp.linspace(-1, 1, 32 * 48).reshape(32, 48),
            "bias": jnp.zeros(48),
        },
        "norm": {"scale": jnp.ones(7)},
    },
    "head": {"kernel": jnp.ones((48, 10)), "bias": jnp.zeros(10)},
    "kernel": jnp.ones((3, 40, 8)),
}
SPECS = {
    "encoder/block_00/bias": PartitionSpec(),
    "encoder/block_00/kernel": PartitionSpec("fsdp"),
    "encoder/norm/scale": PartitionSpec(),
    "head/bias": PartitionSpec(),
    "head/kernel": PartitionSpec("fsdp"),
    "kernel": PartitionSpec(None, "fsdp"),
}


def devices(count=8):
    return jax.devices()[:count]


def abstract(tree):
    return jax.eval_shape(lambda: tree)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (Mesh(), (8, 1, 1)),
        (Mesh(data=-1, fsdp=4), (2, 4, 1)),
        (Mesh(data=2, fsdp=-1), (2, 4, 1)),
        (Mesh(data=1, fsdp=8), (1, 8, 1)),
        (Mesh(tensor=4), (2, 1, 4)),
        (Mesh(data=1, fsdp=2, tensor=-1), (1, 2, 4)),
        (Mesh(fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_the_mesh_has_all_axes_and_every_device_once(config, shape):
    mesh = make_mesh(config, devices())
    assert tuple(mesh.shape.items()) == tuple(zip(layout.AXES, shape, strict=True))
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert mesh.devices.ravel().tolist() == devices()


def test_one_device_makes_a_mesh_and_so_do_all_of_them():
    assert make_mesh(Mesh(), devices(1)).size == 1
    assert make_mesh(Mesh()).size == jax.device_count()


def test_each_process_owns_contiguous_rows():
    # Interleaved on purpose: what a topology-aware order could give.
    shuffled = [
        python_types.SimpleNamespace(process_index=i % 2, id=i) for i in range(8)
    ]
    ordered = sharding.process_major(shuffled)
    assert [device.process_index for device in ordered] == [0] * 4 + [1] * 4
    assert [device.id for device in ordered] == [0, 2, 4, 6, 1, 3, 5, 7]
    mesh = make_mesh(Mesh(fsdp=2), devices()[::-1])
    rows = layout.batch_sharding(mesh).devices_indices_map((16,))
    starts = [rows[device][0].start for device in devices()]
    assert starts == list(range(0, 16, 2))


def test_on_tpus_an_axis_runs_along_a_line_of_the_torus():
    mesh = make_mesh(Mesh(fsdp=4), tpus("v5e:4x4"))
    for row in mesh.devices.reshape(4, 4):
        x, y, _ = (set(values) for values in zip(*(d.coords for d in row), strict=True))
        assert sorted((len(x), len(y))) == [1, 4]
    # So a host, 2 x 2 chips, has no neighbouring rows.
    rows = layout.batch_sharding(mesh)
    host = {d for d in mesh.devices.ravel() if d.process_index == 0}
    assert pipeline.rows_of_devices(rows, 16, host) == [0, 1, 4, 5]
    assert make_mesh(Mesh(fsdp=2), tpus("v5e:4x4")).shape["data"] == 8


def test_only_data_goes_across_slices():
    devices = tpus("v5e:2x4", num_slices=2)
    mesh = make_mesh(Mesh(fsdp=4, tensor=2), devices)
    for row in mesh.devices:
        assert len({d.slice_index for d in row.ravel()}) == 1
    assert len({d.slice_index for d in mesh.devices[:, 0, 0]}) == 2
    with pytest.raises(ValueError, match="mesh.fsdp=16.*fsdp that divides 8"):
        make_mesh(Mesh(fsdp=16), devices)


TENSOR_SPECS = {
    "encoder/block_00/attention/query/kernel": PartitionSpec("fsdp", "tensor"),
    "encoder/block_00/attention/query/bias": PartitionSpec("tensor"),
    "encoder/block_00/attention/out/kernel": PartitionSpec("tensor", "fsdp"),
    "encoder/block_00/attention/out/bias": PartitionSpec(),
    "encoder/block_00/mlp/hidden/kernel": PartitionSpec("fsdp", "tensor"),
    "encoder/block_00/mlp/hidden/bias": PartitionSpec("tensor"),
    "encoder/block_00/mlp/out/kernel": PartitionSpec("tensor", "fsdp"),
    "encoder/block_00/mlp_norm/scale": PartitionSpec(),
    "head/kernel": PartitionSpec("fsdp"),
}


def vit_shapes(num_heads):
    shapes = jax.eval_shape(
        lambda: tiny_vit(num_heads=num_heads).init(
            jax.random.key(0), jnp.zeros((1, 8, 8, 1), jnp.uint8)
        )
    )
    return shapes["params"]


def test_tensor_rules_split_heads_and_mlps_and_fsdp_another_dimension():
    mesh = make_mesh(Mesh(fsdp=2, tensor=4), devices())
    rules = sharding.TENSOR_PARALLEL_VIT
    placed = trees.flatten(sharding.shardings(vit_shapes(4), rules, mesh))
    assert {name: placed[name].spec for name in TENSOR_SPECS} == TENSOR_SPECS
    with pytest.raises(
        ValueError, match=r"(?s)tensor=4.*query/kernel.*divides num_heads"
    ):
        sharding.shardings(vit_shapes(2), rules, mesh)
    one = make_mesh(Mesh(), devices())
    placed = jax.tree.leaves(sharding.shardings(vit_shapes(2), rules, one))
    assert {leaf.spec for leaf in placed} == {PartitionSpec()}


def test_a_batch_divides_over_data_and_fsdp_alone():
    mesh = make_mesh(Mesh(fsdp=2, tensor=2), devices())
    layout.check_batch_size(4, mesh)
    with pytest.raises(ValueError, match=r"=6 .* data \* fsdp = 4 of 8.*=4 or 8"):
        layout.check_batch_size(6, mesh)


@pytest.mark.parametrize(
    "config",
    [
        Mesh(fsdp=3),
        Mesh(data=3, fsdp=2),
        Mesh(data=2, fsdp=2),
        Mesh(data=16),
        Mesh(tensor=3),
        Mesh(data=2, fsdp=2, tensor=4),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_with_what_would(config):
    with pytest.raises(ValueError, match=r"the 8 cpu devices.*one of 1, 2, 4, 8\."):
        make_mesh(config, devices())


def test_axes_that_are_no_numbers_of_devices_are_refused():
    with pytest.raises(ValueError, match="mesh.fsdp=0 is not a number"):
        Mesh(fsdp=0)
    with pytest.raises(ValueError, match="both -1"):
        Mesh(data=-1, fsdp=-1)
    with pytest.raises(ValueError, match="mesh.tensor=-2 is not a number"):
        Mesh(tensor=-2)
    with pytest.raises(ValueError, match="mesh.data and mesh.tensor are both -1"):
        Mesh(tensor=-1)


def test_fsdp_splits_rows_and_leaves_vectors_whole():
    mesh = make_mesh(Mesh(fsdp=4), devices())
    placed = sharding.shardings(abstract(PARAMS), FSDP, mesh)
    assert {n: s.spec for n, s in trees.flatten(placed).items()} == SPECS
    params = jax.device_put(PARAMS, placed)
    kernel = params["encoder"]["block_00"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(8, 48)}


def test_an_axis_of_one_device_and_no_rules_replicate_everything():
    whole = {PartitionSpec()}
    mesh = make_mesh(Mesh(), devices())
    for rules, on in ((FSDP, mesh), ((), make_mesh(Mesh(fsdp=8), devices()))):
        placed = jax.tree.leaves(sharding.shardings(abstract(PARAMS), rules, on))
        assert {leaf.spec for leaf in placed} == whole


def test_the_first_rule_wins_and_unused_or_missing_rules_are_refused():
    mesh = make_mesh(Mesh(fsdp=4), devices())
    rules = (ShardingRule(pattern="head/.*", layout=Layout.REPLICATE), *FSDP)
    placed = trees.flatten(sharding.shardings(abstract(PARAMS), rules, mesh))
    assert placed["head/kernel"].spec == PartitionSpec()
    assert placed["kernel"].spec == SPECS["kernel"]
    typo = (ShardingRule(pattern="haed/kernel"), *FSDP)
    with pytest.raises(ValueError, match='sharding rule "haed/kernel" matches no name'):
        sharding.shardings(abstract(PARAMS), typo, mesh)
    with pytest.raises(ValueError, match='No sharding rule matches "encoder/'):
        sharding.shardings(abstract(PARAMS), rules[:1], mesh)


def test_big_parameters_that_cannot_be_split_are_named_in_one_warning():
    mesh = make_mesh(Mesh(fsdp=8), devices())
    shapes = {"a": (301, 299), "b": (301, 301), "small": (3, 3), "fine": (512, 512)}
    tree = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    with pytest.warns(UserWarning, match="mesh.fsdp=8") as caught:
        sharding.shardings(tree, FSDP, mesh)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "a (301, 299) float32\n  b (301, 301) float32\n" in message
    assert "small" not in message and "fine" not in message
    silenced = (ShardingRule(pattern="[ab]", layout=Layout.REPLICATE), *FSDP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharding.shardings(tree, silenced, mesh)


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamW(schedule=Constant(peak=0.1), momentum_dtype=MomentumDtype.BFLOAT16),
        SGD(schedule=Constant(peak=0.1)),
        Adafactor(schedule=Constant(peak=0.1)),
    ],
)
def test_optimizer_state_lives_where_its_parameter_lives(optimizer):
    mesh = make_mesh(Mesh(fsdp=4), devices())
    chain = optimizer.build(10)

    def init():
        # As in a train state: parameters, their average, the optimiser's state.
        state = {"params": PARAMS, "ema": PARAMS, "opt_state": chain.init(PARAMS)}
        return state | {"step": jnp.zeros((), jnp.int32), "mean": jnp.zeros(48)}

    tree = jax.eval_shape(init)
    placed = sharding.shardings(tree, FSDP, mesh, parameters=tree["params"])
    state = jax.jit(init, out_shardings=placed)()

    def step(state):
        gradients = jax.tree.map(jnp.cos, state["params"])
        updates, opt_state = chain.update(
            gradients, state["opt_state"], state["params"]
        )
        params = optax.apply_updates(state["params"], updates)
        return state | {"params": params, "opt_state": opt_state}

    stepped = jax.jit(step, out_shardings=placed)(state)
    followed = 0
    for tree in (state, stepped):
        for name, leaf in trees.flatten(tree).items():
            owners = [n for n in SPECS if f"/{name}".endswith(f"/{n}")]
            owner = max(owners, key=len, default="")
            same = owner and trees.flatten(PARAMS)[owner].shape == leaf.shape
            expected = SPECS[owner] if same else PartitionSpec()
            assert leaf.sharding.spec == expected, name
            followed += name.startswith("opt_state") and expected != PartitionSpec()
    # Both trees, three split parameters: AdamW has two moments of each.
    assert followed >= 2 * 3 * (2 if isinstance(optimizer, AdamW) else 1)


def test_fsdp_holds_a_share_of_the_state_on_each_device():
    mesh = make_mesh(Mesh(fsdp=8), devices())
    chain = AdamW(schedule=Constant(peak=0.1)).build(10)
    params = {"a": {"kernel": jnp.ones((640, 96)), "bias": jnp.zeros(96)}}

    def init():
        return {"params": params, "opt_state": chain.init(params)}

    tree = jax.eval_shape(init)
    placed = sharding.shardings(tree, FSDP, mesh, parameters=tree["params"])
    state = jax.jit(init, out_shardings=placed)()
    leaves = jax.tree.leaves(state)
    total = sum(leaf.nbytes for leaf in leaves)
    first = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert first * 8 / total < 1.1


def test_three_steps_on_eight_devices_equal_those_of_one():
    chain = AdamW(schedule=Constant(peak=0.01), weight_decay=0.1).build(3)
    images = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)

    def init():
        a = jax.random.normal(jax.random.key(0), (32, 48)) / 6
        b = jax.random.normal(jax.random.key(1), (48, 8)) / 7
        params = {"a": {"kernel": a}, "b": {"kernel": b}}
        return {"params": params, "opt_state": chain.init(params)}

    def loss(params, batch):
        hidden = jnp.tanh(layout.pin_batch(batch["image"] @ params["a"]["kernel"]))
        return jnp.mean((hidden @ params["b"]["kernel"]) ** 2)

    def step(state, batch):
        gradients = jax.grad(loss)(state["params"], batch)
        updates, opt_state = chain.update(
            gradients, state["opt_state"], state["params"]
        )
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}

    start = jax.device_get(jax.jit(init)())

    def train(mesh):
        tree = abstract(start)
        placed = sharding.shardings(tree, FSDP, mesh, parameters=tree["params"])
        with jax.set_mesh(mesh):
            state = jax.device_put(start, placed)
            batch = sharding.put({"image": images}, mesh)
            compiled = jax.jit(step, out_shardings=placed)
            for _ in range(3):
                state = compiled(state, batch)
        assert compiled._cache_size() == 1
        return jax.device_get(state["params"])

    one = train(make_mesh(Mesh(), devices(1)))
    for fsdp in (1, 4):
        eight = train(make_mesh(Mesh(fsdp=fsdp), devices()))
        # Sums over devices in another order; Adam divides by tiny gradients.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), one, eight
        )


def test_put_makes_global_arrays_of_the_same_rows():
    mesh = make_mesh(Mesh(fsdp=2), devices())
    batch = {
        "image": np.arange(16 * 4, dtype=np.uint8).reshape(16, 2, 2, 1),
        "label": np.arange(16, dtype=np.int32),
    }
    placed = sharding.put(batch, mesh)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.dtype == batch[name].dtype
        expected = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        assert array.sharding == expected
    shard = {s.device: s.data for s in placed["label"].addressable_shards}
    np.testing.assert_array_equal(shard[devices()[3]], [6, 7])


def test_a_batch_that_does_not_divide_is_refused_with_the_two_nearest_sizes():
    mesh = make_mesh(Mesh(), devices())
    for size in (8, 96, 1024):
        layout.check_batch_size(size, mesh)
    with pytest.raises(ValueError, match=r"batch_size=100 .* 8 devices; .*=96 or 104"):
        layout.check_batch_size(100, mesh)
    with pytest.raises(ValueError, match=r"batch_size=5 .* use .*=8 or 16"):
        layout.check_batch_size(5, mesh)
    with pytest.raises(ValueError, match=r"batch_size=0 .* use .*=8 or 16"):
        layout.check_batch_size(0, mesh)
    one = make_mesh(Mesh(), devices(1))
    layout.check_batch_size(5, one)
    with pytest.raises(ValueError, match=r"1 device times 4 micro-batches; .*=4 or 8"):
        layout.check_batch_size(5, one, micro_batches=4)
    with pytest.raises(ValueError, match=r"8 devices times 2 micro.*=96 or 112"):
        layout.check_batch_size(104, mesh, micro_batches=2)
