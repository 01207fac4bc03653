"""The two-layer perceptron of a transformer block."""

import enum

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.models.blocks.layers import Dense, Dtype
from big_vision_lite.runtime import layout


class Activation(enum.StrEnum):
    """The activation between the two layers; the two GELUs differ by up to 5e-4."""

    # The tanh form: big_vision, SigLIP.
    GELU_TANH = "gelu_tanh"
    # The exact form, by the error function: the default of torch, timm, DeiT, DINOv2.
    GELU_ERF = "gelu_erf"
    # silu(gate) * value, arXiv:2002.05202; DINOv2 giant. The first layer computes both,
    # gate first, each of `hidden_dim`.
    SWIGLU = "swiglu"


class Mlp(nn.Module, kw_only=True):
    """A two-layer MLP: D to `hidden_dim`, activation, back to D."""

    hidden_dim: int
    use_bias: bool = True
    dropout: float = 0.0
    dtype: Dtype = Dtype.FLOAT32
    activation: Activation = Activation.GELU_TANH

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B D"], train: bool = False
    ) -> Float[Array, "*B D"]:
        def dense(features: int, name: str) -> Dense:
            return Dense(
                features=features,
                use_bias=self.use_bias,
                dtype=self.dtype,
                bias_deviation=1e-6,
                name=name,
            )

        def activate_and_narrow(mlp: "Mlp", hidden: Array) -> Array:
            y = activate(hidden, self.activation)
            y = nn.Dropout(self.dropout, name="dropout")(y, deterministic=not train)
            return dense(x.shape[-1], "out")(y)

        gated = self.activation == Activation.SWIGLU
        hidden = dense((2 if gated else 1) * self.hidden_dim, "hidden")(x)
        # Backward recomputes the activation, a quarter of what a block would store: a
        # step of ViT-S/16 takes 0.88 of the memory and moves 1.03 of the bytes on an
        # H100, by XLA:GPU.
        if layout.gathers_by_hand():
            # There a policy rematerialises the whole backward pass (`accumulation.py`);
            # this remat inside it would hold the gathered parameters of many blocks.
            return activate_and_narrow(self, hidden)
        return nn.remat(activate_and_narrow)(self, hidden)


def activate(
    hidden: Float[Array, "*B H"], activation: Activation
) -> Float[Array, "*B h"]:
    """Applies the function between the two layers; SwiGLU halves the last axis."""
    match activation:
        case Activation.GELU_TANH:
            return nn.gelu(hidden, approximate=True)
        case Activation.GELU_ERF:
            return nn.gelu(hidden, approximate=False)
        case Activation.SWIGLU:
            gate, value = jnp.split(hidden, 2, axis=-1)
            return nn.silu(gate) * value
