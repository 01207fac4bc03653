"""Attention on TPUs: whole rows in fast memory, in the layout of the projections.

[B, N, H * D] is how the projections leave queries, keys and values, and how the output
projection takes them: no transposition, and no [B, H, N, M] array in memory. A program
of the grid attends for one image. Backward computes the weights anew, and sums the
gradients of the biases while it has the gradients of queries, keys and values at hand.

Weights stand transposed, [M, N]: maximum and sum over keys then run over sublanes, in
the vector unit, instead of over lanes, and one transposition less is needed backward.
Heads of 64 are worked on in pairs that fill 128 lanes, one of them zeroed in the
queries, so that no head is moved to other lanes. The compiler schedules 1.7 thousand
bundles forward and 3.3 backward for an image of ViT-S/16 on a v5e; one head after the
other, not transposed, took 2.2 and 6.0 (libtpu 0.0.42.1). It was compiled for v4 to
TPU7x and run in interpret mode; it has not run on a TPU.
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

from big_vision_lite import layout

LANES = 128
# Queries that are worked on at once: [M, N] weights of 256 x 256 take 256 KB.
ROWS = 256
# What one program may hold of the 16 MB that the compiler grants, by `_bytes`.
VMEM_BYTES = 14 * 2**20
# The mesh axis that splits heads, where a mesh has it.
HEADS_AXIS = "tensor"


def refusal(
    dtype: str, queries: int, memory: int, num_heads: int, head_dim: int
) -> str | None:
    """Says what of these shapes the kernel does not take, None if it takes them."""
    if dtype != "bfloat16":
        return dtype
    if queries != memory:
        return f"{queries} queries for {memory} tokens"
    if head_dim not in (64, 72, 80, 88):
        return f"head dimension {head_dim}"
    size = _mesh_axes().get(HEADS_AXIS, 1)
    if num_heads % size:
        return f"{num_heads} heads on {size} devices of the axis {HEADS_AXIS}"
    if queries > 1024 or not _lanes(queries, num_heads // size * head_dim, head_dim):
        return f"{queries} tokens of {num_heads} heads of {head_dim}"
    return None


def attend(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    biases: tuple[Float[Array, "H D"], ...] = (),
    interpret: bool = False,
) -> Float[Array, "B N H D"]:
    """Returns softmax(q k / sqrt(D)) v; every device attends for its own images.

    `biases` of q, k and v are added first. Given here, their gradients come out of the
    kernel, and nobody reads those of q, k and v again to sum them.
    """
    flat = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
    flat_biases = tuple(bias.reshape(-1) for bias in biases)
    return _attend(*flat, flat_biases, q.shape[-1], interpret).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q: Array,
    k: Array,
    v: Array,
    biases: tuple[Array, ...],
    head_dim: int,
    interpret: bool,
) -> Array:
    return _forward(q, k, v, biases, head_dim, interpret)[0]


def _forward(
    q: Array,
    k: Array,
    v: Array,
    biases: tuple[Array, ...],
    head_dim: int,
    interpret: bool,
) -> tuple[Array, Any]:
    arrays = (q, k, v)
    if biases:
        # Not in the kernel: XLA adds them where the projection's product ends.
        arrays = tuple(x + bias.astype(x.dtype) for x, bias in zip(arrays, biases))
    (y,) = _call(_forward_kernel, arrays, head_dim, outputs=1, interpret=interpret)
    return y, (arrays, biases)


def _backward(
    head_dim: int, interpret: bool, kept: Any, gradient: Array
) -> tuple[Any, ...]:
    arrays, biases = kept
    *gradients, q_sum, k_sum, v_sum = _call(
        _backward_kernel,
        (*arrays, gradient),
        head_dim,
        outputs=3,
        sums=3,
        interpret=interpret,
    )
    sums = (q_sum, k_sum, v_sum)
    of_biases = tuple(
        # A sum of every image [B, 1, W]: the images' sum, and that over devices, is
        # left to XLA, which joins it with the other gradients.
        x.sum((0, 1)).astype(bias.dtype)
        for x, bias in zip(sums, biases)
    )
    return *gradients, of_biases


_attend.defvjp(_forward, _backward)


def _mesh_axes() -> dict[str, int]:
    """Returns the sizes of the mesh axes that the compiler would spread arrays over.

    Inside `shard_map`, where gradients are accumulated, rows are local already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    return {axis: mesh.shape[axis] for axis in mesh.auto_axes}


def _call(
    kernel: Callable[..., None],
    arrays: tuple[Array, ...],
    head_dim: int,
    *,
    outputs: int,
    sums: int = 0,
    interpret: bool,
) -> list[Array]:
    """Runs `kernel` on every image: `outputs` like `arrays`, then `sums` [B, 1, W]."""
    local = functools.partial(
        _call_local, kernel, head_dim, outputs=outputs, sums=sums, interpret=interpret
    )
    axes = _mesh_axes()
    if not axes:
        return local(*arrays)
    rows = tuple(axis for axis in layout.BATCH_AXES if axis in axes)
    # A row that does not divide is a shape being traced (parameters, FLOPs).
    if arrays[0].shape[0] % math.prod(axes[axis] for axis in rows):
        rows = ()
    spec = PartitionSpec(rows or None, None, HEADS_AXIS if HEADS_AXIS in axes else None)
    return jax.shard_map(
        local,
        in_specs=(spec,) * len(arrays),
        out_specs=[spec] * (outputs + sums),
        axis_names=set(axes),
        check_vma=False,
    )(*arrays)


def _call_local(
    kernel: Callable[..., None],
    head_dim: int,
    *arrays: Array,
    outputs: int,
    sums: int,
    interpret: bool,
) -> list[Array]:
    batch, tokens, width = arrays[0].shape
    lanes = _lanes(tokens, width, head_dim) or width
    block = pl.BlockSpec((1, tokens, lanes), lambda image, at: (image, 0, at))
    row = pl.BlockSpec((1, 1, lanes), lambda image, at: (image, 0, at))
    like = jax.ShapeDtypeStruct((batch, tokens, width), arrays[0].dtype)
    row_like = jax.ShapeDtypeStruct((batch, 1, width), jnp.float32)
    return pl.pallas_call(
        functools.partial(kernel, head_dim=head_dim),
        grid=(batch, width // lanes),
        in_specs=[block] * len(arrays),
        out_specs=[block] * outputs + [row] * sums,
        out_shape=[like] * outputs + [row_like] * sums,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel")
        ),
    )(*arrays)


def _lanes(tokens: int, width: int, head_dim: int) -> int | None:
    """Returns how much of [N, W] a program takes, whole heads; None: no part fits.

    All of it where it fits: the more heads, the more the compiler finds to do while a
    product of one of them is under way (the whole of ViT-S is 0.75 of three pairs).
    """
    unit = math.lcm(LANES, head_dim)
    parts = [n for n in range(unit, width, unit) if width % n == 0]
    fitting = [n for n in (*parts, width) if _bytes(tokens, n) <= VMEM_BYTES]
    return max(fitting, default=None)


def _bytes(tokens: int, lanes: int) -> int:
    """Returns about what a backward program holds in fast memory."""
    tokens = -(-tokens // 16) * 16
    lanes = -(-lanes // LANES) * LANES
    # Four arrays come and three go, bfloat16, the next image's beside this one's.
    blocks = 7 * 2 * tokens * lanes * 2
    rows = -(-_row_blocks(tokens)[0].stop // LANES) * LANES
    # Of two heads: weights, their gradients and products of these, float32.
    weights = 2 * 4 * tokens * rows * 4
    return blocks + weights + 4 * tokens * LANES * 4


def _row_blocks(tokens: int) -> list[slice]:
    """Splits queries into even parts of about `ROWS` that begin at whole tiles."""
    parts = 1 if tokens <= 1.5 * ROWS else -(-tokens // ROWS)
    # 16 rows of bfloat16 fill a tile.
    size = -(-tokens // parts // 16) * 16 if parts > 1 else tokens
    return [slice(at, min(at + size, tokens)) for at in range(0, tokens, size)]


def _windows(lanes: int, head_dim: int) -> Iterator[tuple[slice, int]]:
    """Yields lanes that are worked on at once, and how many heads they hold."""
    size = LANES if LANES % head_dim == 0 else head_dim
    for start in range(0, lanes, size):
        stop = min(start + size, lanes)
        yield slice(start, stop), (stop - start) // head_dim


def _product(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Array:
    """Sums over an axis of each, in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _by_head(x: Array, heads: int) -> list[Array]:
    """Returns for every head a copy of x [N, heads * D] with zeros for the others."""
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
    # 2 ** x is what the hardware has; the scale rides on its factor.
    scale = head_dim**-0.5 * math.log2(math.e)
    return jnp.exp2((logits - logits.max(0, keepdims=True)) * scale)


def _forward_kernel(q_ref: Any, k_ref: Any, v_ref: Any, y_ref: Any, *, head_dim: int):
    # All heads of a window do each thing before the next one, here and backward: the
    # compiler keeps the order, and so fills the wait for one head with the other.
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
            y = [part / total for part, total in zip(y, totals)]
            y_ref[0, rows, at] = jnp.concatenate(y).astype(y_ref.dtype).T


def _backward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    gradient_ref: Any,
    of_q_ref: Any,
    of_k_ref: Any,
    of_v_ref: Any,
    q_sum_ref: Any,
    k_sum_ref: Any,
    v_sum_ref: Any,
    *,
    head_dim: int,
):
    scale = head_dim**-0.5
    dtype = of_q_ref.dtype
    for at, heads in _windows(q_ref.shape[-1], head_dim):
        k, v = k_ref[0, :, at], v_ref[0, :, at]
        k_rows = k.T
        of_k = of_v = q_sum = 0.0
        for rows in _row_blocks(q_ref.shape[1]):
            queries = _by_head(q_ref[0, rows, at], heads)
            gradients = _by_head(gradient_ref[0, rows, at], heads)
            weights = [_exponentials(q, k, head_dim) for q in queries]
            weights = [w * (1 / w.sum(0, keepdims=True)) for w in weights]
            of_weights = [_product(v, gradient, (1, 1)) for gradient in gradients]
            both = [w * of_w for w, of_w in zip(weights, of_weights)]
            of_logits = [
                (b - w * b.sum(0, keepdims=True)).astype(dtype)
                for b, w in zip(both, weights)
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
