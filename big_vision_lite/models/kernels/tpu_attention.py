"""Attention on TPUs: whole rows in fast memory, in the layout of the projections.

[B, N, H * D] is how the projections leave queries, keys and values, and how the output
projection takes them: no transposition, and no [B, H, N, N] array in memory. One
program of the grid attends for all heads of one image. Backward computes the weights
anew. It was compiled for v4 to v6e and run in interpret mode; it has not run on a TPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from big_vision_lite import layout


def refusal(
    dtype: str, queries: int, memory: int, num_heads: int, head_dim: int
) -> str | None:
    """Says what of these shapes the kernel does not take, None if it takes them."""
    if dtype != "bfloat16":
        return dtype
    if queries != memory:
        return f"{queries} queries for {memory} tokens"
    if head_dim != 64:
        return f"head dimension {head_dim}"
    if queries > 256:
        return f"{queries} tokens, more than 256"
    return None


def attend(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    interpret: bool = False,
) -> Float[Array, "B N H D"]:
    """Returns softmax(q k / sqrt(D)) v; every device attends for its own images."""
    batch, tokens, heads, head_dim = q.shape
    local = functools.partial(_attend_local, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in layout.BATCH_AXES if not mesh.empty and a in mesh.auto_axes)
    if axes and batch % mesh.size == 0:
        rows = PartitionSpec(axes)
        local = jax.shard_map(
            local, in_specs=(rows,) * 3, out_specs=rows, check_vma=False
        )
    return local(q, k, v)


def _attend_local(q: Array, k: Array, v: Array, *, interpret: bool) -> Array:
    batch, tokens, heads, head_dim = q.shape
    flat = (x.reshape(batch, tokens, heads * head_dim) for x in (q, k, v))
    return _attend_flat(*flat, heads, interpret).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend_flat(q: Array, k: Array, v: Array, heads: int, interpret: bool) -> Array:
    return _call(_forward_kernel, 1, (q, k, v), heads, interpret)[0]


def _forward(
    q: Array, k: Array, v: Array, heads: int, interpret: bool
) -> tuple[Array, tuple[Array, ...]]:
    y = _attend_flat(q, k, v, heads, interpret)
    return y, (q, k, v, y)


def _backward(
    heads: int, interpret: bool, kept: tuple[Array, ...], gradient: Array
) -> tuple[Array, ...]:
    return tuple(_call(_backward_kernel, 3, (*kept, gradient), heads, interpret))


_attend_flat.defvjp(_forward, _backward)


def _call(
    kernel: Any, outputs: int, arrays: tuple[Array, ...], heads: int, interpret: bool
) -> Any:
    batch, tokens, width = arrays[0].shape
    block = pl.BlockSpec((1, tokens, width), lambda image: (image, 0, 0))
    shape = jax.ShapeDtypeStruct((batch, tokens, width), arrays[0].dtype)
    return pl.pallas_call(
        functools.partial(kernel, heads=heads),
        grid=(batch,),
        in_specs=[block] * len(arrays),
        out_specs=[block] * outputs,
        out_shape=[shape] * outputs,
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )(*arrays)


def _product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Sums over an axis of each, in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _weights(q: Array, k: Array) -> tuple[Array, Array]:
    """Returns exp(logits - their maximum) [N, M] and its sums [N, 1]."""
    logits = _product(q, k, (1, 1)) * q.shape[-1] ** -0.5
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True)


def _forward_kernel(q_ref: Any, k_ref: Any, v_ref: Any, y_ref: Any, *, heads: int):
    head_dim = q_ref.shape[-1] // heads
    for head in range(heads):
        at = slice(head * head_dim, (head + 1) * head_dim)
        q, k, v = (ref[0, :, at] for ref in (q_ref, k_ref, v_ref))
        weights, total = _weights(q, k)
        y = _product(weights.astype(v.dtype), v, (1, 0)) / total
        y_ref[0, :, at] = y.astype(y_ref.dtype)


def _backward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    y_ref: Any,
    gradient_ref: Any,
    q_gradient_ref: Any,
    k_gradient_ref: Any,
    v_gradient_ref: Any,
    *,
    heads: int,
):
    head_dim = q_ref.shape[-1] // heads
    for head in range(heads):
        at = slice(head * head_dim, (head + 1) * head_dim)
        refs = (q_ref, k_ref, v_ref, y_ref, gradient_ref)
        q, k, v, y, gradient = (ref[0, :, at] for ref in refs)
        weights, total = _weights(q, k)
        weights = weights / total
        of_sum = (gradient.astype(jnp.float32) * y).sum(-1, keepdims=True)
        of_logits = weights * (_product(gradient, v, (1, 1)) - of_sum)
        of_logits = (of_logits * head_dim**-0.5).astype(q.dtype)
        of_q = _product(of_logits, k, (1, 0))
        of_k = _product(of_logits, q, (0, 0))
        of_v = _product(weights.astype(q.dtype), gradient, (0, 0))
        q_gradient_ref[0, :, at] = of_q.astype(q.dtype)
        k_gradient_ref[0, :, at] = of_k.astype(k.dtype)
        v_gradient_ref[0, :, at] = of_v.astype(v.dtype)
