"""Pooling of tokens to one vector per image."""

import enum

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.models.blocks.attention import Attention, MultiHeadAttention
from big_vision_lite.models.blocks.layers import Dtype, layer_norm
from big_vision_lite.models.blocks.mlp import Activation, Mlp


class Pooling(enum.StrEnum):
    """The reduction of a ViT's tokens to one vector."""

    AVERAGE = "average"
    CLASS_TOKEN = "class_token"
    # Concatenated, twice as wide: DINOv2's linear classifiers, arXiv:2304.07193.
    CLASS_TOKEN_AND_AVERAGE = "class_token_and_average"
    ATTENTION = "attention"


# Those that read a class token; a model has one only for these.
WITH_CLASS_TOKEN = (Pooling.CLASS_TOKEN, Pooling.CLASS_TOKEN_AND_AVERAGE)


class FinalNorm(enum.StrEnum):
    """The input of the norm after the last block."""

    # Every token, before they are pooled.
    TOKENS = "tokens"
    # The pooled vector: timm's fc_norm, MAE's fine-tuning.
    POOLED = "pooled"


class AttentionPooling(nn.Module, kw_only=True):
    """Attention of one learned probe to all tokens, then an MLP (arXiv:1810.00825)."""

    num_heads: int
    mlp_dim: int
    dtype: Dtype = Dtype.FLOAT32
    attention: Attention = Attention.AUTO
    activation: Activation = Activation.GELU_TANH
    norm_epsilon: float = 1e-6

    @nn.compact
    def __call__(self, tokens: Float[Array, "B N D"]) -> Float[Array, "B D"]:
        batch, _, width = tokens.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
        probe = jnp.broadcast_to(probe, (batch, 1, width)).astype(self.dtype)
        z = MultiHeadAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            attention=self.attention,
            name="attention",
        )(probe, tokens)
        y = layer_norm(self.dtype, "norm", self.norm_epsilon)(z)
        y = Mlp(
            hidden_dim=self.mlp_dim,
            dtype=self.dtype,
            activation=self.activation,
            name="mlp",
        )(y)
        return (z + y)[:, 0]
