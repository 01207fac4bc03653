"""Fused attention for TPUs: whole rows in VMEM, in the layout of the projections.

Queries, keys, values and results are [B, N, H * D], as the projections write and read
them: no transposition, and no [B, H, N, M] array in memory. One program of the grid
attends for one image. Backward recomputes the attention weights, and sums the gradients
of queries, keys and values to those of their biases while it holds them.

Attention weights are kept transposed, [M, N]: the maximum and sum over keys then run
over sublanes, in the vector unit, instead of over lanes, and backward needs one
transposition less. Heads of 64 are processed in pairs that fill 128 lanes; one head of
a pair is zeroed in the queries, which moves no head to other lanes. For an image of
ViT-S/16 on a v5e the compiler schedules 1.7 thousand bundles forward and 3.3 backward,
3.7 with bias gradients; one head at a time, not transposed, took 2.2 and 6.0 (libtpu
0.0.42.1). Compiled for v4 to TPU7x and run in interpret mode, never on a TPU.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from big_vision_lite.runtime import layout

LANES = 128
# Queries per block: [M, N] weights of 256 x 256 take 256 KB.
ROWS = 256
# The limit on `_bytes` of one program. `_bytes` overestimates: 20.5 MB where the
# compiler needed 16.8 and allows 16 (1,024 tokens, 6 heads of 64 per program, v5e).
VMEM_BYTES = 16 * 2**20
# Most tokens that were compiled, by head dimension, for v4, v5e, v5p and v6e (64: TPU7x
# too). Heads that do not fill 128 lanes in pairs straddle them and take more memory:
# heads of 80 at 576 tokens need 18.2 MB of the 16.
LONGEST = {32: 257, 64: 1024, 72: 257, 80: 257, 88: 257}
# The mesh axis that splits heads, if the mesh has it.
HEADS_AXIS = "tensor"


def refusal(
    dtype: str, queries: int, memory: int, num_heads: int, head_dim: int
) -> str | None:
    """Returns what the kernel does not support ("float32"), None if it supports all.

    It supports the shapes it was compiled for; by the compiler's schedule it is faster
    wherever it was compared. Thousand cycles per image, forward and backward, v5e
    (libtpu 0.0.42.1), of the kernel, then of the XLA form by XLA's estimate:

        50 tokens, 6 heads of 64      1.5     4.0
        196 tokens, 6 heads of 64     5.4    43.1
        196 tokens, 12 heads of 64   10.3    92.4
        196 tokens, 16 heads of 80   19.2   162.7
        256 tokens, 12 heads of 64   12.5   106.0
        576 tokens, 12 heads of 64   63.7   588.6
        1024 tokens, 12 heads of 64   182    1535
    """
    if dtype != "bfloat16":
        return dtype
    if queries != memory:
        return f"{queries} queries for {memory} tokens"
    if head_dim not in LONGEST:
        return f"head dimension {head_dim}"
    size = _mesh_axes().get(HEADS_AXIS, 1)
    if num_heads % size:
        return f"{num_heads} heads on {size} devices of the axis {HEADS_AXIS}"
    if queries > LONGEST[head_dim]:
        return f"{queries} tokens with head dimension {head_dim}"
    width = num_heads // size * head_dim
    if width % LANES or _lanes(queries, width, head_dim) is None:  # k begins a register
        return f"{queries} tokens of {num_heads // size} heads of {head_dim}"
    return None


def attend(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    biases: tuple[Float[Array, "H D"], ...] = (),
    interpret: bool = False,
) -> Float[Array, "B N H D"]:
    """Returns softmax(q k / sqrt(D)) v; every device attends for its own images.

    `biases` of q, k and v are added first. The kernel then returns their gradients too,
    which saves reading those of q, k and v again to sum them.
    """
    arrays = (_flat(q), _flat(k), _flat(v))
    flat_biases = tuple(_flat(bias) for bias in biases)
    y: Any = _attend(arrays, flat_biases, q.shape[-1], interpret)
    return y.reshape(q.shape)


def _flat(x: Array) -> Array:
    return x.reshape(*x.shape[:-2], -1)


def attend_joined(
    qkv: Float[Array, "B N J"],
    bias: Float[Array, " J"] | None,
    head_dim: int,
    interpret: bool = False,
) -> Float[Array, "B N W"]:
    """Returns what `attend` does, from [q | k | v] of one product, J = 3 * W.

    Splits and joins nothing in memory, forward or backward, unless heads are split over
    devices or a program cannot hold the whole width.
    """
    _, tokens, width = qkv.shape
    biases = () if bias is None else (bias,)
    arrays = (qkv,)
    split = _mesh_axes().get(HEADS_AXIS, 1) > 1
    if split or _lanes(tokens, width // 3, head_dim) != width // 3:
        arrays = tuple(jnp.split(qkv, 3, axis=2))
        biases = tuple(part for bias in biases for part in jnp.split(bias, 3))
    return _attend(arrays, biases, head_dim, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(
    arrays: tuple[Array, ...],
    biases: tuple[Array, ...],
    head_dim: int,
    interpret: bool,
) -> Array:
    """Attends to q, k and v [B, N, W], or to one [B, N, 3 * W] of them."""
    return _forward(arrays, biases, head_dim, interpret)[0]


def _forward(
    arrays: tuple[Array, ...],
    biases: tuple[Array, ...],
    head_dim: int,
    interpret: bool,
) -> tuple[Array, Any]:
    if biases:
        # Not in the kernel: XLA fuses the addition into the projection's product.
        arrays = tuple(
            x + bias.astype(x.dtype) for x, bias in zip(arrays, biases, strict=True)
        )
    (y,) = _call(_forward_kernel, _forward_results, arrays, head_dim, interpret)
    return y, (arrays, biases)


def _backward(
    head_dim: int, interpret: bool, kept: Any, gradient: Array
) -> tuple[Any, Any]:
    arrays, biases = kept
    given = (*arrays, gradient)
    results = _call(_backward_kernel, _backward_results, given, head_dim, interpret)
    gradients, sums = results[: len(arrays)], results[len(arrays) :]
    # The kernel sums per image; XLA sums over images and devices, together with the
    # other gradients.
    each = zip(biases, sums, strict=False)
    return gradients, tuple(x.sum((0, 1)).astype(bias.dtype) for bias, x in each)


_attend.defvjp(_forward, _backward)


def _mesh_axes() -> dict[str, int]:
    """Returns the sizes of the mesh axes that the compiler shards arrays over.

    Inside `shard_map`, where gradients are accumulated, rows are already local.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    return {axis: mesh.shape[axis] for axis in mesh.auto_axes}


def _forward_results(arrays: tuple[Array, ...]) -> list[jax.ShapeDtypeStruct]:
    width = sum(x.shape[2] for x in arrays) // 3
    return [jax.ShapeDtypeStruct((*arrays[0].shape[:2], width), arrays[0].dtype)]


def _backward_results(arrays: tuple[Array, ...]) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of the gradients of q, k and v, then of their token sums."""
    *like, _ = arrays
    sums = ((x.shape[0], 1, x.shape[2]) for x in like)
    return [
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like),
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in sums),
    ]


def _call(
    kernel: Callable[..., None],
    results: Callable[[tuple[Array, ...]], list[jax.ShapeDtypeStruct]],
    arrays: tuple[Array, ...],
    head_dim: int,
    interpret: bool,
) -> tuple[Array, ...]:
    """Runs `kernel` on every image of `arrays`, on the device that holds it."""
    local = functools.partial(_call_local, kernel, results, head_dim, interpret)
    axes = _mesh_axes()
    if not axes:
        return local(*arrays)
    rows = tuple(axis for axis in layout.BATCH_AXES if axis in axes)
    # A batch that does not divide is only traced for shapes (parameters, FLOPs).
    if arrays[0].shape[0] % math.prod(axes[axis] for axis in rows):
        rows = ()
    spec = PartitionSpec(rows or None, None, HEADS_AXIS if HEADS_AXIS in axes else None)
    return jax.shard_map(
        local, in_specs=spec, out_specs=spec, axis_names=set(axes), check_vma=False
    )(*arrays)


def _call_local(
    kernel: Callable[..., None],
    results: Callable[[tuple[Array, ...]], list[jax.ShapeDtypeStruct]],
    head_dim: int,
    interpret: bool,
    *arrays: Array,
) -> tuple[Array, ...]:
    shapes = results(arrays)
    batch, tokens, _ = arrays[0].shape
    width = min(x.shape[2] for x in (*arrays, *shapes))
    # Where q, k and v are joined, the whole width fits.
    parts = width // (_lanes(tokens, width, head_dim) or width)

    def block(x: Any) -> pl.BlockSpec:
        shape = (1, x.shape[1], x.shape[2] // parts)
        return pl.BlockSpec(shape, lambda image, part: (image, 0, part))

    # The FLOPs of the XLA form, for `flops.count`: two products forward, four backward,
    # without recomputation and products with zeros. No bytes: XLA counts operands and
    # results itself, and would add these.
    products = 2 if len(shapes) == 1 else 4
    cost = pl.CostEstimate(
        flops=products * 2 * batch * tokens**2 * width,
        transcendentals=batch * (width // head_dim) * tokens**2,
        bytes_accessed=0,
    )
    done = pl.pallas_call(
        functools.partial(kernel, head_dim=head_dim),
        grid=(batch, parts),
        in_specs=[block(x) for x in arrays],
        out_specs=[block(x) for x in shapes],
        out_shape=shapes,
        interpret=interpret,
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel")
        ),
    )(*arrays)
    return tuple(done)


def _lanes(tokens: int, width: int, head_dim: int) -> int | None:
    """Returns the lanes of [N, W] that a program takes, whole heads; None if none fit.

    The most that fit: with more heads the compiler overlaps more work with the product
    of one of them (the whole of ViT-S takes 0.75 of three pairs).
    """
    unit = math.lcm(LANES, head_dim)
    parts = [n for n in range(unit, width, unit) if width % n == 0]
    fitting = [n for n in (*parts, width) if _bytes(tokens, n, head_dim) <= VMEM_BYTES]
    return max(fitting, default=None)


def _bytes(tokens: int, lanes: int, head_dim: int) -> int:
    """Estimates the bytes that a backward program holds in VMEM."""
    tokens = -(-tokens // 16) * 16
    lanes = -(-lanes // LANES) * LANES
    # Four bfloat16 arrays in and three out, double-buffered: this image and the next.
    blocks = 7 * 2 * tokens * lanes * 2
    longest = max(rows.stop - rows.start for rows in _row_blocks(tokens))
    rows = -(-longest // LANES) * LANES
    # For a window's heads, in float32: weights, their gradients, products of these.
    weights = max(2, LANES // head_dim) * 4 * tokens * rows * 4
    return blocks + weights + 4 * tokens * LANES * 4


def _row_blocks(tokens: int) -> list[slice]:
    """Splits queries into blocks of `ROWS`; a rest of up to `LANES` joins the last.

    Queries lie on lanes, 128 per register: 257 fill three registers, in one block as in
    blocks of 256 and 1.
    """
    starts = [at for at in range(0, tokens, ROWS) if not at or tokens - at > LANES]
    return [slice(*ends) for ends in zip(starts, [*starts[1:], tokens], strict=True)]


def _windows(lanes: int, head_dim: int) -> Iterator[tuple[slice, int]]:
    """Yields the lanes processed at once, and the number of heads in them."""
    size = LANES if LANES % head_dim == 0 else head_dim
    for start in range(0, lanes, size):
        stop = min(start + size, lanes)
        yield slice(start, stop), (stop - start) // head_dim


def _product(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Array:
    """Returns the product of a and b, summed over one axis of each, in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _by_head(x: Array, heads: int) -> list[Array]:
    """Returns a copy of x [N, heads * D] per head, with the other heads zeroed."""
    if heads == 1:
        return [x]
    head_dim = x.shape[1] // heads
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return [
        jnp.where(
            (lane >= head * head_dim) & (lane < (head + 1) * head_dim),
            x,
            jnp.zeros_like(x),
        )
        for head in range(heads)
    ]


def _rows_of_head(x: Array, head: int, heads: int) -> Array:
    """Returns a head's rows of x [heads * D, M]."""
    head_dim = x.shape[0] // heads
    return x[head * head_dim : (head + 1) * head_dim]


def _exponentials(q: Array, k: Array, head_dim: int) -> Array:
    """Returns exp(logits - their maximum) [M, N]."""
    logits = _product(k, q, (1, 1))
    # The hardware computes 2 ** x; one factor holds the scale and log2(e).
    scale = head_dim**-0.5 * math.log2(math.e)
    return jnp.exp2((logits - logits.max(0, keepdims=True)) * scale)


def _thirds(refs: tuple[Any, ...]) -> list[Any]:
    """Returns refs of q, k and v, given as three refs or as one of all."""
    if len(refs) == 3:
        return list(refs)
    width = refs[0].shape[2] // 3
    return [refs[0].at[:, :, part * width : (part + 1) * width] for part in range(3)]


def _forward_kernel(*refs: Any, head_dim: int) -> None:
    *given, y_ref = refs
    q_ref, k_ref, v_ref = _thirds(tuple(given))
    # Here and in backward, each operation runs for all heads of a window before the
    # next: the compiler keeps the order and fills the wait for one head with another.
    for at, heads in _windows(q_ref.shape[-1], head_dim):
        k = k_ref[0, :, at]
        v_rows = v_ref[0, :, at].T
        for rows in _row_blocks(q_ref.shape[1]):
            queries = _by_head(q_ref[0, rows, at], heads)
            weights = [_exponentials(q, k, head_dim) for q in queries]
            totals = [w.sum(0, keepdims=True) for w in weights]
            y = [
                _product(_rows_of_head(v_rows, head, heads), w.astype(v_rows.dtype))
                for head, w in enumerate(weights)
            ]
            y = [part / total for part, total in zip(y, totals, strict=True)]
            y_ref[0, rows, at] = jnp.concatenate(y).astype(y_ref.dtype).T


def _backward_kernel(*refs: Any, head_dim: int) -> None:
    # q, k, v; gradient of y; gradients of q, k, v; their sums. Triples may be joined.
    each = (len(refs) - 1) // 3
    q_ref, k_ref, v_ref = _thirds(refs[:each])
    gradient_ref = refs[each]
    of_q_ref, of_k_ref, of_v_ref = _thirds(refs[each + 1 : -each])
    q_sum_ref, k_sum_ref, v_sum_ref = _thirds(refs[-each:])
    scale = head_dim**-0.5
    dtype = of_q_ref.dtype
    for at, heads in _windows(q_ref.shape[-1], head_dim):
        k, v = k_ref[0, :, at], v_ref[0, :, at]
        k_rows = k.T
        of_k: Any = 0.0
        of_v: Any = 0.0
        q_sum: Any = 0.0
        for rows in _row_blocks(q_ref.shape[1]):
            queries = _by_head(q_ref[0, rows, at], heads)
            gradients = _by_head(gradient_ref[0, rows, at], heads)
            weights = [_exponentials(q, k, head_dim) for q in queries]
            weights = [w * (1 / w.sum(0, keepdims=True)) for w in weights]
            of_weights = [_product(v, gradient, (1, 1)) for gradient in gradients]
            both = [w * of_w for w, of_w in zip(weights, of_weights, strict=True)]
            of_logits = [
                (b - w * b.sum(0, keepdims=True)).astype(dtype)
                for b, w in zip(both, weights, strict=True)
            ]
            of_q = []
            for head in range(heads):
                of_v += _product(weights[head].astype(dtype), gradients[head])
                of_k += _product(of_logits[head], queries[head])
                k_head = _rows_of_head(k_rows, head, heads)
                of_q.append(_product(k_head, of_logits[head]))
            of_q = (jnp.concatenate(of_q) * scale).astype(dtype).T
            of_q_ref[0, rows, at] = of_q
            q_sum += of_q.astype(jnp.float32).sum(0, keepdims=True)
        of_k = of_k * scale
        of_k_ref[0, :, at] = of_k.astype(dtype)
        of_v_ref[0, :, at] = of_v.astype(dtype)
        q_sum_ref[0, :, at] = q_sum
        k_sum_ref[0, :, at] = of_k.sum(0, keepdims=True)
        v_sum_ref[0, :, at] = of_v.sum(0, keepdims=True)
