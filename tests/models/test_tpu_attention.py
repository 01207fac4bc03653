"""The kernel for TPUs, interpreted on a CPU; it has not run on a TPU."""

import functools

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from tiny_runs import rows, start, tiny_vit

from big_vision_lite.models.blocks.attention import Attention, attend
from big_vision_lite.models.blocks.layers import Dtype, Remat
from big_vision_lite.models.kernels import tpu_attention
from big_vision_lite.runtime import flops

NAMES = ("y", "q", "k", "v", "q_bias", "k_bias", "v_bias")


def arrays(tokens, heads, head_dim, dtype="float32", batch=2, seed=0):
    """Returns q, k, v, biases and the gradient of the result, unit normal."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    shape = (batch, tokens, heads, head_dim)
    biases = tuple(normal(heads, head_dim) for _ in range(3))
    return *(normal(*shape) for _ in range(3)), biases, normal(*shape)


def formula(q, k, v, biases, gradient):
    """Attention and its gradients in float64, by `NAMES`."""
    q, k, v, gradient = (np.asarray(x, np.float64) for x in (q, k, v, gradient))
    q, k, v = (
        x + np.asarray(b, np.float64) for x, b in zip((q, k, v), biases, strict=True)
    )
    scale = q.shape[-1] ** -0.5
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) * scale
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = np.einsum("bnhd,bmhd->bhnm", gradient, v)
    mean = (weights * of_weights).sum(-1, keepdims=True)
    of_logits = weights * (of_weights - mean) * scale
    found = {
        "y": np.einsum("bhnm,bmhd->bnhd", weights, v),
        "q": np.einsum("bhnm,bmhd->bnhd", of_logits, k),
        "k": np.einsum("bhnm,bnhd->bmhd", of_logits, q),
        "v": np.einsum("bhnm,bnhd->bmhd", weights, gradient),
    }
    return found | {f"{name}_bias": found[name].sum((0, 1)) for name in "qkv"}


def apart(q, k, v, biases):
    return tpu_attention.attend(q, k, v, biases, interpret=True)


def joined(q, k, v, biases):
    def join(parts):
        flat = [x.reshape(*x.shape[:-2], -1) for x in parts]
        return jnp.concatenate(flat, axis=-1)

    qkv, bias = join((q, k, v)), join(biases)
    y = tpu_attention.attend_joined(qkv, bias, q.shape[-1], interpret=True)
    return y.reshape(q.shape)


def everything(function, q, k, v, biases, gradient):
    """Returns what `function` gives and its gradients, by `NAMES`."""
    y, backward = jax.vjp(function, q, k, v, biases)
    *of_arrays, of_biases = backward(gradient)
    return dict(zip(NAMES, (y, *of_arrays, *of_biases), strict=True))


SLOW = pytest.mark.slow
SHAPES = [  # tokens, heads, head dimension
    pytest.param((196, 6, 64), marks=SLOW),
    (197, 3, 64),  # a class token; a head without another to fill 128 lanes
    pytest.param((257, 2, 64), marks=SLOW),
    (577, 2, 64),  # three blocks of queries
    (50, 2, 80),
    (50, 8, 32),  # four heads fill 128 lanes
    pytest.param((197, 4, 32), marks=SLOW),  # a masked autoencoder's decoder
    pytest.param((196, 2, 72), marks=SLOW),
]


@pytest.mark.parametrize("function", [apart, joined])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_formula(function, shape):
    given = arrays(*shape)
    found = jax.jit(functools.partial(everything, function))(*given)
    for name, expected in formula(*given).items():
        # The key's bias changes no weight: its gradient is a sum of zeros.
        scale = np.abs(expected).max() if name != "k_bias" else shape[0]
        error = np.abs(found[name] - expected).max() / scale
        assert error < 1e-5, (name, error)


def unit(x):
    """Returns a bfloat16's unit in the last place at x."""
    return 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)


# Of queries: logits of 1, and of 8.
@pytest.mark.parametrize("peak", [pytest.param(1, marks=SLOW), 8])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("attention", ["kernel", "xla"])
def test_bfloat16_attention_is_float64s_but_for_two_units(attention, head_dim, peak):
    q, k, v, biases, gradient = arrays(196, 2, head_dim, "bfloat16")
    q = q * peak
    none = tuple(jnp.zeros_like(bias) for bias in biases)
    function = apart
    if attention == "xla":

        def function(q, k, v, biases):
            return attend(*(x + b for x, b in zip((q, k, v), biases, strict=True)), xla)

    xla = Attention.XLA
    found = jax.jit(functools.partial(everything, function))(q, k, v, none, gradient)
    for name, expected in formula(q, k, v, none, gradient).items():
        if "bias" in name:
            continue
        rounded = np.asarray(jnp.asarray(expected, jnp.bfloat16), np.float64)
        error = np.abs(np.asarray(found[name], np.float64) - rounded)
        # Weights are rounded to bfloat16 before the second product, as cuDNN does, so
        # values that are small by cancellation have the error of what cancelled: a unit
        # is that of the value or, where that is larger, of its head's root mean square.
        # By the value's own unit it would be 93 % of unit normal v, and 99.99 % with
        # what the rounding left in a second product.
        size = np.sqrt((expected**2).mean((1, 3), keepdims=True))
        units = error / unit(np.maximum(np.abs(expected), size))
        assert (units <= 2).mean() >= 0.999, (name, (units <= 2).mean())


def test_rows_of_logits_that_overflow_are_finite():
    q, k, v, biases, gradient = arrays(50, 2, 64)
    given = (1000 * q, k, v, biases, gradient)
    found = everything(apart, *given)
    # Logits of 8,000 are known to 5e-4 in float32.
    np.testing.assert_allclose(found["y"], formula(*given)["y"], atol=1e-3)
    assert all(np.isfinite(x).all() for x in found.values())


MESHES = {
    "data=8": dict(data=8, fsdp=1),
    "data=2,fsdp=4": dict(data=2, fsdp=4),
    "data=2,fsdp=2,tensor=2": dict(data=2, fsdp=2, tensor=2),
}


def make_mesh(data, fsdp, **more):
    shape = dict(data=data, fsdp=fsdp, **more)
    devices = np.array(jax.devices()).reshape(*shape.values())
    return Mesh(devices, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize(
    ("function", "batch", "mesh"),
    [
        (apart, 8, "data=8"),
        (joined, 8, "data=2,fsdp=2,tensor=2"),
        (apart, 1, "data=2,fsdp=4"),  # a row: shapes are traced with it
        pytest.param(apart, 8, "data=2,fsdp=4", marks=SLOW),
        pytest.param(apart, 8, "data=2,fsdp=2,tensor=2", marks=SLOW),
        pytest.param(joined, 8, "data=8", marks=SLOW),
        pytest.param(joined, 8, "data=2,fsdp=4", marks=SLOW),
        pytest.param(apart, 1, "data=8", marks=SLOW),
        pytest.param(apart, 1, "data=2,fsdp=2,tensor=2", marks=SLOW),
    ],
)
def test_eight_devices_give_what_one_gives(function, batch, mesh):
    given = arrays(17, 4, 64, batch=batch)
    expected = everything(function, *given)
    with jax.set_mesh(make_mesh(**MESHES[mesh])):
        step = jax.jit(functools.partial(everything, function))
        found = step(*given)
        text = step.lower(*given).compile().as_text()
    for name in NAMES:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5, err_msg=name)
    if batch == 8 and function is apart:
        assert "all-gather(" not in text, "rows or heads are moved"


def test_the_kernel_runs_where_rows_are_local_already():
    """Gradients are accumulated inside a `shard_map` of the whole step."""
    given = arrays(17, 2, 64, batch=8)
    expected = everything(apart, *given)
    rows, whole = PartitionSpec(("data", "fsdp")), PartitionSpec()
    in_specs = (rows, rows, rows, whole, rows)
    of_biases = {name: whole for name in NAMES if "bias" in name}
    out_specs = dict.fromkeys(NAMES, rows) | of_biases

    def local(*given):
        found = everything(apart, *given)
        sums = {name: jax.lax.psum(found[name], ("data", "fsdp")) for name in of_biases}
        return found | sums

    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        found = jax.jit(
            jax.shard_map(
                local, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
        )(*given)
    for name in NAMES:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5, err_msg=name)


def test_the_kernel_can_be_mapped():
    q, k, v, biases, _ = arrays(17, 2, 64, batch=4)
    mapped = jax.jit(jax.vmap(lambda *qkv: apart(*(x[None] for x in qkv), biases)[0]))
    np.testing.assert_allclose(mapped(q, k, v), apart(q, k, v, biases), atol=1e-6)


def test_the_kernel_says_what_it_does_not_take():
    def refusal(dtype="bfloat16", queries=196, memory=196, num_heads=6, head_dim=64):
        return tpu_attention.refusal(dtype, queries, memory, num_heads, head_dim)

    assert refusal() is None
    assert refusal(queries=1024, memory=1024, num_heads=16) is None
    assert refusal(queries=257, memory=257, num_heads=16, head_dim=88) is None
    assert refusal(dtype="float32") == "float32"
    assert refusal(queries=1) == "1 queries for 196 tokens"
    assert refusal(head_dim=48) == "head dimension 48"
    assert refusal(queries=197, memory=197, num_heads=16, head_dim=32) is None
    assert refusal(queries=1025, memory=1025) == "1025 tokens with head dimension 64"
    long = refusal(queries=576, memory=576, num_heads=16, head_dim=72)
    assert long == "576 tokens with head dimension 72"
    with jax.set_mesh(make_mesh(data=1, fsdp=2, tensor=4)):
        assert refusal() == "6 heads on 4 devices of the axis tensor"
        assert refusal(num_heads=8) is None
        # Three of 64 a device: k would begin within a register of 128 lanes.
        assert refusal(num_heads=12) == "196 tokens of 3 heads of 64"
    assert refusal(num_heads=3) == "196 tokens of 3 heads of 64"


@pytest.fixture
def gpu(monkeypatch):
    """JAX asks the machine for both while it traces cuDNN's attention."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 90800)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)


def vit(**fields):
    """Returns a ViT with heads of 64 for images of `tiny_runs.rows`."""
    fields = dict(width=128, num_heads=2, depth=2, dtype=Dtype.BFLOAT16) | fields
    return tiny_vit(**fields)


def lowered(model, platform, devices=8, **options):
    """Returns a train step as JAX hands it to the compiler of `platform`."""
    run = start(model, devices=devices, optimizer="adam", **options)
    with jax.set_mesh(run.mesh):
        traced = run.step.trace(run.abstract, run.put(rows()))
        return traced.lower(lowering_platforms=(platform,)).as_text()


OPTIONS = {
    "plain": {},
    "fsdp": dict(fsdp=4),
    "micro-batches": dict(micro_batches=2),
}


@pytest.mark.parametrize(
    ("remat", "options"),
    [
        (Remat.NONE, "plain"),
        (Remat.DOTS, "fsdp"),
        (Remat.FULL, "micro-batches"),
        pytest.param(Remat.NONE, "fsdp", marks=SLOW),
        pytest.param(Remat.NONE, "micro-batches", marks=SLOW),
        pytest.param(Remat.DOTS, "plain", marks=SLOW),
        pytest.param(Remat.DOTS, "micro-batches", marks=SLOW),
        pytest.param(Remat.FULL, "plain", marks=SLOW),
        pytest.param(Remat.FULL, "fsdp", marks=SLOW),
    ],
)
def test_a_step_lowered_for_tpus_holds_the_kernel(remat, options):
    text = lowered(vit(remat=remat), "tpu", **OPTIONS[options])
    found = text.count("@tpu_custom_call")
    again = 0 if remat == Remat.NONE else 1
    assert found == 2 * (2 + again), "forward, backward of two blocks"
    assert "xf64" not in text


@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=SLOW)])
def test_a_step_lowered_for_gpus_holds_cudnns_attention(gpu, micro_batches):
    # One device: with more, JAX has XLA ask it for the call while it partitions.
    options = dict(devices=1, micro_batches=micro_batches)
    text = lowered(vit(), "cuda", **options)
    # Parts of a batch are one loop, whose body stands there once.
    assert text.count("__cudnn$fmhaSoftmax(") == 2, "of two blocks"
    assert text.count("__cudnn$fmhaSoftmaxBackward(") == 2
    plain = lowered(vit(dtype=Dtype.FLOAT32), "cuda", **options)
    assert "__cudnn" not in plain
    for found in (text, plain):
        assert "tpu_custom_call" not in found
        assert "callback" not in found and "xf64" not in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "options"),
    [
        (Remat.NONE, "plain"),
        (Remat.DOTS, "plain"),
        (Remat.FULL, "plain"),
        (Remat.NONE, "micro-batches"),
    ],
)
def test_branches_of_other_platforms_cost_a_cpu_nothing(gpu, remat, options):
    """`auto` is one trace for all platforms; what it leaves of others is zeros."""
    found = {}
    for attention in (Attention.AUTO, Attention.XLA):
        model = vit(remat=remat, attention=attention)
        run = start(model, devices=8, optimizer="adam", **OPTIONS[options])
        with jax.set_mesh(run.mesh):
            compiled = run.step.lower(run.abstract, run.put(rows())).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        found[attention] = (memory, compiled.cost_analysis()["flops"])
    (memory, counted), (plain_memory, plain) = found.values()
    assert memory == plain_memory
    # What is kept for the gradient is decided inside a branch: with remat=dots a few
    # biases are not added again.
    assert 0.99 * plain < counted <= plain


@pytest.mark.parametrize("remat", [Remat.NONE, Remat.DOTS, Remat.FULL])
def test_the_count_of_flops_does_not_depend_on_who_attends(gpu, remat):
    counts = set()
    for attention in (Attention.AUTO, Attention.XLA):
        model = vit(attention=attention, remat=remat)
        run = start(model, devices=8, optimizer="adam")
        with jax.set_mesh(run.mesh):
            counts.add(flops.count(run.step, run.abstract, run.put(rows())))
    assert len(counts) == 1


@pytest.mark.parametrize("batch", [8, 1])
@pytest.mark.parametrize("mesh", MESHES)
def test_the_kernel_counts_the_products_of_the_formula(batch, mesh):
    q, k, v, biases, gradient = arrays(17, 4, 64, batch=batch)
    with jax.set_mesh(make_mesh(**MESHES[mesh])):
        counted = flops.count(
            functools.partial(everything, apart), q, k, v, biases, gradient
        )
    assert counted == 6 * 2 * batch * 17**2 * 4 * 64
