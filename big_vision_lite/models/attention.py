"""Multi-head attention: the projections, and one function that attends."""

import enum

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.models.layers import Dtype, layer_norm
from big_vision_lite.models.products import dot_general


class Attention(enum.StrEnum):
    """Who computes softmax(q k / sqrt(D)) v."""

    # The reference; runs everywhere, keeps [B, H, N, M] weights in memory.
    XLA = "xla"
    # Fused; NVIDIA GPUs and bfloat16 only.
    CUDNN = "cudnn"


def attend(
    q: Float[Array, "B N H D"],
    k: Float[Array, "B M H D"],
    v: Float[Array, "B M H D"],
    attention: Attention,
) -> Float[Array, "B N H D"]:
    """Returns softmax(q k / sqrt(D)) v, the softmax in float32.

    Raises:
        ValueError: `cudnn` on another backend, in another dtype than bfloat16 or with
            a head dimension it does not know.
    """
    head_dim = q.shape[-1]
    if attention == Attention.CUDNN:
        _check_cudnn(q.dtype, head_dim)
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    # Scaled before the product: N * D instead of N * M multiplications. In float32,
    # because 1 / sqrt(D) rounded to bfloat16 would change the temperature.
    q = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)
    heads = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(_attend_in_heads(*heads), 1, 2)


@jax.custom_vjp
def _attend_in_heads(
    q: Float[Array, "B H N D"], k: Float[Array, "B H M D"], v: Float[Array, "B H M D"]
) -> Float[Array, "B H N D"]:
    """Returns softmax(q k) v, and keeps one array of [B, H, N, M] for the gradient.

    By itself JAX keeps the logits, too, and divides every weight instead of every
    output. A step of ViT-S/16, 224 px, batch 8, depth 6: 375 instead of 403 MB. It has
    no forward-mode derivative (`jax.jvp`).
    """
    return _attend_forward(q, k, v)[0]


def _attend_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    logits = _product("bhnd,bhmd->bhnm", q, k)
    # Weights before they are divided by their sum, at most 1.
    weights = jnp.exp(logits - logits.max(-1, keepdims=True)).astype(v.dtype)
    total = jnp.sum(weights, -1, keepdims=True, dtype=jnp.float32)
    y = (_product("bhnm,bhmd->bhnd", weights, v) / total).astype(v.dtype)
    return y, (q, k, v, weights, total, y)


def _attend_backward(
    kept: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array, Array]:
    q, k, v, weights, total, y = kept
    of_sum = (gradient.astype(jnp.float32) * y).sum(-1, keepdims=True) / total
    gradient = (gradient / total).astype(v.dtype)
    of_weights = _product("bhnd,bhmd->bhnm", gradient, v) - of_sum
    of_logits = (weights * of_weights).astype(q.dtype)
    return (
        _product("bhnm,bhmd->bhnd", of_logits, k).astype(q.dtype),
        _product("bhnm,bhnd->bhmd", of_logits, q).astype(k.dtype),
        _product("bhnm,bhnd->bhmd", weights, gradient).astype(v.dtype),
    )


_attend_in_heads.defvjp(_attend_forward, _attend_backward)


def _product(terms: str, a: Array, b: Array) -> Array:
    return jnp.einsum(terms, a, b, preferred_element_type=jnp.float32)


class MultiHeadAttention(nn.Module, kw_only=True):
    """Lets every query attend to every memory.

    `qk_norm` normalises queries and keys within each head (arXiv:2302.05442); the
    output projection has a bias whatever `qkv_bias` says.
    """

    num_heads: int
    dtype: Dtype = Dtype.FLOAT32
    attention: Attention = Attention.XLA
    qkv_bias: bool = True
    qk_norm: bool = False
    norm_epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, queries: Float[Array, "B N W"], memory: Float[Array, "B M W"]
    ) -> Float[Array, "B N W"]:
        width = queries.shape[-1]
        head_dim = width // self.num_heads

        def project(name: str, x: Array) -> Array:  # [B, N, W] -> [B, N, H, D]
            return nn.DenseGeneral(
                (self.num_heads, head_dim),
                use_bias=self.qkv_bias,
                dtype=self.dtype,
                dot_general=dot_general,
                kernel_init=nn.initializers.xavier_uniform(),
                name=name,
            )(x)

        q, k = project("query", queries), project("key", memory)
        if self.qk_norm:
            q = layer_norm(self.dtype, "query_norm", self.norm_epsilon)(q)
            k = layer_norm(self.dtype, "key_norm", self.norm_epsilon)(k)
        attended = attend(q, k, project("value", memory), self.attention)
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            dot_general=dot_general,
            kernel_init=nn.initializers.xavier_uniform(),
            name="out",
        )(attended)


def _check_cudnn(dtype: jnp.dtype, head_dim: int) -> None:
    if jax.default_backend() != "gpu":
        raise ValueError(
            "attention=cudnn needs an NVIDIA GPU, this run computes on "
            f"{jax.default_backend()}; use --config.model.attention=xla."
        )
    if dtype != jnp.bfloat16:
        raise ValueError(
            f"attention=cudnn does not compute in {dtype}; use "
            "--config.model.dtype=bfloat16 or --config.model.attention=xla."
        )
    if head_dim % 8 or head_dim > 256:
        raise ValueError(
            f"attention=cudnn knows no head dimension {head_dim} (width / num_heads); "
            "use a multiple of 8 up to 256, or --config.model.attention=xla."
        )
