"""The transformer encoder: pre-norm blocks of attention and MLP."""

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from big_vision_lite.models.blocks.attention import Attention, MultiHeadAttention
from big_vision_lite.models.blocks.layers import (
    Dtype,
    Remat,
    layer_norm,
    rematerialised,
)
from big_vision_lite.models.blocks.mlp import Activation, Mlp
from big_vision_lite.runtime import layout


class EncoderBlock(nn.Module, kw_only=True):
    """Pre-norm block: x += attention(norm(x)); x += mlp(norm(x)).

    `layer_scale` is the initial value of a learned vector that multiplies each branch.
    Where `mask` is False a token does not attend to another.
    """

    mlp_dim: int
    num_heads: int
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: Dtype = Dtype.FLOAT32
    attention: Attention = Attention.AUTO
    activation: Activation = Activation.GELU_TANH
    norm_epsilon: float = 1e-6
    layer_scale: float | None = None
    qkv_bias: bool = True
    qk_norm: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        train: bool = False,
        mask: Bool[Array, "#B N N"] | None = None,
    ) -> Float[Array, "B N D"]:
        y = layer_norm(self.dtype, "attention_norm", self.norm_epsilon)(x)
        y = MultiHeadAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            attention=self.attention,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            norm_epsilon=self.norm_epsilon,
            name="attention",
        )(y, y, mask)
        x = layout.pin_batch(x + self._drop("attention", y, train))

        y = layer_norm(self.dtype, "mlp_norm", self.norm_epsilon)(x)
        y = Mlp(
            hidden_dim=self.mlp_dim,
            dropout=self.dropout,
            dtype=self.dtype,
            activation=self.activation,
            name="mlp",
        )(y, train)
        return layout.pin_batch(x + self._drop("mlp", y, train))

    def _drop(self, branch: str, y: Array, train: bool) -> Array:
        y = nn.Dropout(self.dropout, name=f"{branch}_dropout")(
            y, deterministic=not train
        )
        if self.layer_scale is not None:
            # arXiv:2103.17239.
            start = nn.initializers.constant(self.layer_scale)
            scale = self.param(f"{branch}_scale", start, y.shape[-1:])
            y = y * scale.astype(y.dtype)
        # Stochastic depth drops a branch per image, arXiv:1603.09382.
        return nn.Dropout(
            self.stochastic_depth,
            broadcast_dims=(1, 2),
            name=f"{branch}_stochastic_depth",
        )(y, deterministic=not train)


class Encoder(nn.Module, kw_only=True):
    """A stack of blocks, then with `last_norm` a layer norm of every token."""

    depth: int
    mlp_dim: int
    num_heads: int
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: Dtype = Dtype.FLOAT32
    attention: Attention = Attention.AUTO
    activation: Activation = Activation.GELU_TANH
    norm_epsilon: float = 1e-6
    last_norm: bool = True
    layer_scale: float | None = None
    qkv_bias: bool = True
    qk_norm: bool = False
    remat: Remat = Remat.NONE

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        train: bool = False,
        mask: Bool[Array, "#B N N"] | None = None,
    ) -> Float[Array, "B N D"]:
        block = rematerialised(EncoderBlock, self.remat)
        for index in range(self.depth):
            x = block(
                mlp_dim=self.mlp_dim,
                num_heads=self.num_heads,
                dropout=self.dropout,
                stochastic_depth=self.stochastic_depth * index / max(1, self.depth - 1),
                dtype=self.dtype,
                attention=self.attention,
                activation=self.activation,
                norm_epsilon=self.norm_epsilon,
                layer_scale=self.layer_scale,
                qkv_bias=self.qkv_bias,
                qk_norm=self.qk_norm,
                name=f"block_{index:02d}",
            )(x, train, mask)
        return (
            layer_norm(self.dtype, "norm", self.norm_epsilon)(x)
            if self.last_norm
            else x
        )
