"""Multi-head attention, and the choice of its implementation for a platform."""

import contextlib
import contextvars
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from big_vision_lite.models.blocks.layers import Dtype, add_bias, layer_norm, product
from big_vision_lite.models.blocks.projections import (
    HeadProjection,
    Joined,
    OutProjection,
    join,
    project,
    project_flat,
)
from big_vision_lite.models.kernels import tpu_attention
from big_vision_lite.runtime import layout


class Attention(enum.StrEnum):
    """The implementation of softmax(q k / sqrt(D)) v."""

    # The fused kernel of the platform if it takes these arrays, else XLA; see `choose`.
    AUTO = "auto"
    # The reference; runs everywhere, keeps [B, H, N, M] weights in memory.
    XLA = "xla"
    # Fused; NVIDIA GPUs since Ampere, and bfloat16 only.
    CUDNN = "cudnn"
    # Fused, `kernels/tpu_attention.py`; TPUs only. It has not run on one yet.
    PALLAS = "pallas"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """The shapes of an attention call: `queries` tokens attend to `memory` tokens."""

    dtype: str
    queries: int
    memory: int
    num_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The implementation for a platform, and why a fused kernel was refused, if so."""

    attention: Attention
    reason: str | None = None


# Filled by `attend` while a model is traced inside `calls`.
_calls: contextvars.ContextVar[dict[tuple[Attention, Shapes], None] | None] = (
    contextvars.ContextVar("attention_calls", default=None)
)


@contextlib.contextmanager
def calls() -> Iterator[dict[tuple[Attention, Shapes], None]]:
    """Collects (implementation, shapes) of attention calls traced inside, in order."""
    found: dict[tuple[Attention, Shapes], None] = {}
    token = _calls.set(found)
    try:
        yield found
    finally:
        _calls.reset(token)


def describe(
    found: dict[tuple[Attention, Shapes], None], platform: str, device_kind: str
) -> list[str]:
    """Returns one line per distinct call: its implementation on `platform`, and why."""
    lines = []
    for wanted, shapes in found:
        choice = Choice(attention=wanted)
        if wanted == Attention.AUTO:
            choice = choose(platform, shapes)
        what = (
            f"{shapes.queries} x {shapes.memory} tokens, {shapes.num_heads} heads of "
            f"{shapes.head_dim}, {shapes.dtype}"
        )
        line = f"attention: {choice.attention} on {device_kind} ({what})"
        if choice.reason is not None:
            line += f", because {choice.reason}"
        if line not in lines:
            lines.append(line)
    return lines


def without_fused(module: Any) -> Any:
    """Returns the model with `auto` replaced by `xla` in it and all its submodules."""
    changed = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if value is Attention.AUTO:
            changed[field.name] = Attention.XLA
        elif isinstance(value, nn.Module) and field.name != "parent":
            plain = without_fused(value)
            if plain is not value:
                changed[field.name] = plain
        elif isinstance(value, tuple) and any(isinstance(x, nn.Module) for x in value):
            changed[field.name] = tuple(map(without_fused, value))
    return module.clone(**changed) if changed else module


def choose(platform: str, shapes: Shapes) -> Choice:
    """Returns the choice of `auto` on "cpu", "tpu" or "gpu" (also called "cuda")."""
    if platform in ("gpu", "cuda"):
        reason = _not_for_cudnn(shapes)
        reason = f"cuDNN's takes no {reason}" if reason else _no_cudnn()
        if reason is None:
            return Choice(attention=Attention.CUDNN)
        return Choice(attention=Attention.XLA, reason=reason)
    if platform == "tpu":
        reason = tpu_attention.refusal(
            shapes.dtype,
            shapes.queries,
            shapes.memory,
            shapes.num_heads,
            shapes.head_dim,
        )
        if reason is None:
            return Choice(attention=Attention.PALLAS)
        return Choice(attention=Attention.XLA, reason=f"the kernel takes no {reason}")
    return Choice(attention=Attention.XLA)


def attend(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    attention: Attention,
) -> Float[Array, "B N H D"]:
    """Returns softmax(q k / sqrt(D)) v, the softmax in float32.

    `auto` is resolved when the program is lowered: one trace serves every platform.

    Raises:
        ValueError: `cudnn` or `pallas` does not support the platform, shapes or dtype.
    """
    functions = {
        Attention.XLA: _xla,
        Attention.CUDNN: _cudnn,
        Attention.PALLAS: tpu_attention.attend,
    }
    return _dispatch(functions, attention, _shapes(q, k), q, k, v)


def attend_to_self(
    x: Float[Array, "B N W"],
    joined: Joined,
    out: Float[Array, "I W"],
    attention: Attention,
) -> Float[Array, "B N W"]:
    """Projects tokens to heads, applies attention, and projects back without bias.

    One product computes queries, keys and values: x is read and written once, which
    moves 0.91 of the bytes of three products in a step of ViT-S/16 on an H100, by
    XLA:GPU. The TPU kernel reads that product's rows unsplit, image by image, and
    returns the bias gradients; the other forms multiply by `layers.product`.
    """
    *_, num_heads, head_dim = joined.kernel.shape

    def by_heads(function: Callable[..., Array]) -> Callable[..., Array]:
        def attended(x: Array, joined: Joined, out: Array) -> Array:
            y = function(*project(x, joined))
            return product(y.reshape(*x.shape[:2], -1), out)

        return attended

    def by_rows(x: Array, joined: Joined, out: Array) -> Array:
        qkv, bias = project_flat(x, joined), joined.bias.reshape(-1)
        return tpu_attention.attend_joined(qkv, bias, head_dim) @ out

    functions = {
        Attention.XLA: by_heads(_xla),
        Attention.CUDNN: by_heads(_cudnn),
        Attention.PALLAS: by_rows,
    }
    one = jax.ShapeDtypeStruct((*x.shape[:2], num_heads, head_dim), x.dtype)
    return _dispatch(functions, attention, _shapes(one, one), x, joined, out)


def _shapes(q: Any, k: Any) -> Shapes:
    _, queries, num_heads, head_dim = q.shape
    return Shapes(
        dtype=str(q.dtype),
        queries=queries,
        memory=k.shape[1],
        num_heads=num_heads,
        head_dim=head_dim,
    )


def _dispatch(
    functions: Mapping[Attention, Callable[..., Array]],
    attention: Attention,
    shapes: Shapes,
    *operands: Any,
) -> Array:
    """Calls the function of `attention`, for `auto` the one chosen for the platform."""
    found = _calls.get()
    if found is not None:
        found[attention, shapes] = None
    if attention == Attention.CUDNN:
        _check_cudnn(shapes)
    if attention == Attention.PALLAS:
        _check_pallas(shapes)
    if attention != Attention.AUTO:
        return functions[attention](*operands)
    plain = functions[Attention.XLA]
    by_platform = {
        platform: functions[choose(platform, shapes).attention]
        for platform in ("cuda", "tpu")
    }
    fused = {name: f for name, f in by_platform.items() if f is not plain}
    if not fused:
        return plain(*operands)
    return jax.lax.platform_dependent(*operands, default=plain, **fused)


def _xla(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    # Scaled in float32: rounding q / sqrt(D) to bfloat16 changes q unless D is a power
    # of 4. With heads of 80 and logits of 8, 4 % of the results were more than 2 units
    # of bfloat16 off, up to 14; now none.
    logits *= q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    call = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes and layout.TENSOR_AXIS in mesh.auto_axes:
        # JAX shards this call over all axes of a mesh or over none; in gradient
        # accumulation rows are already sharded, so only heads are left.
        even = q.shape[2] % mesh.shape[layout.TENSOR_AXIS] == 0
        heads = PartitionSpec(None, None, layout.TENSOR_AXIS if even else None)
        call = jax.shard_map(
            call,
            in_specs=(heads,) * 3,
            out_specs=heads,
            axis_names={layout.TENSOR_AXIS},
            check_vma=False,
        )
    return call(q, k, v)


class MultiHeadAttention(nn.Module, kw_only=True):
    """Multi-head attention of queries to memory, with its four projections.

    `qk_norm` normalises queries and keys within each head (arXiv:2302.05442). The
    output projection has a bias unless `out_bias=False`. Where a `mask` is False a
    query does not attend; every query needs one True. With a mask XLA computes
    attention, whatever `attention` says.
    """

    num_heads: int
    dtype: Dtype = Dtype.FLOAT32
    attention: Attention = Attention.AUTO
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: bool = False
    norm_epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "B N W"],
        memory: Float[Array, "B M W"],
        mask: Bool[Array, "#B N M"] | None = None,
    ) -> Float[Array, "B N W"]:
        width = queries.shape[-1]
        query, key, value = (
            HeadProjection(
                num_heads=self.num_heads,
                head_dim=width // self.num_heads,
                use_bias=self.qkv_bias,
                dtype=self.dtype,
                name=name,
            ).of_width(width)
            for name in ("query", "key", "value")
        )
        out = OutProjection(
            width=width, use_bias=self.out_bias, dtype=self.dtype, name="out"
        ).of_heads(self.num_heads, width // self.num_heads)
        to_itself = queries is memory
        queries, memory = queries.astype(self.dtype), memory.astype(self.dtype)
        if to_itself and not self.qk_norm and mask is None:
            joined = join(query, key, value)
            y = attend_to_self(queries, joined, out.kernel, self.attention)
        else:
            (q,) = project(queries, join(query))
            k, v = project(memory, join(key, value))
            if self.qk_norm:
                q = layer_norm(self.dtype, "query_norm", self.norm_epsilon)(q)
                k = layer_norm(self.dtype, "key_norm", self.norm_epsilon)(k)
            if mask is None:
                y = attend(q, k, v, self.attention)
            else:
                y = _xla(q, k, v, mask)
            y = product(y.reshape(*queries.shape[:2], -1), out.kernel)
        return y if out.bias is None else add_bias(y, out.bias)


def _platform() -> str:
    """Returns the platform of the mesh, or JAX's default without a mesh."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _no_cudnn() -> str | None:
    """Returns why JAX cannot trace cuDNN's attention here, None if it can.

    JAX looks for cuDNN and for a GPU since Ampere while it traces.
    """
    small = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(_cudnn, small, small, small)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _not_for_cudnn(shapes: Shapes) -> str | None:
    if shapes.dtype != "bfloat16":
        return shapes.dtype
    if shapes.head_dim % 8 or shapes.head_dim > 256:
        return f"head dimension {shapes.head_dim}"
    # JAX 0.10 refuses to differentiate it: it takes every call for one with a bias.
    for count in (shapes.queries, shapes.memory):
        if count % 2:
            return f"odd number of tokens ({count})"
    return None


def _check_cudnn(shapes: Shapes) -> None:
    if _platform() not in ("gpu", "cuda"):
        raise ValueError(
            "attention=cudnn needs an NVIDIA GPU, this run computes on "
            f"{_platform()}; use --config.model.attention=auto."
        )
    if shapes.dtype != "bfloat16":
        raise ValueError(
            f"attention=cudnn does not compute in {shapes.dtype}; use "
            "--config.model.dtype=bfloat16 or --config.model.attention=auto."
        )
    if _not_for_cudnn(shapes):
        raise ValueError(
            f"attention=cudnn takes no {_not_for_cudnn(shapes)}; use an even number of "
            "tokens and a head dimension (width / num_heads) that is a multiple of 8 "
            "up to 256, or --config.model.attention=auto."
        )


def _check_pallas(shapes: Shapes) -> None:
    if _platform() != "tpu":
        raise ValueError(
            f"attention=pallas needs a TPU, this run computes on {_platform()}; use "
            "--config.model.attention=auto."
        )
    reason = choose("tpu", shapes).reason
    if reason is not None:
        raise ValueError(
            f"attention=pallas: {reason}; use --config.model.attention=auto."
        )
