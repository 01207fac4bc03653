"""Multi-head attention: the projections, and one function that attends."""

import enum

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.models.layers import Dtype, layer_norm


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
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


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
