"""The two-layer perceptron of a transformer block."""

import enum

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.models.layers import Dtype


class Activation(enum.StrEnum):
    """What stands between the two layers; the two GELUs differ by up to 5e-4."""

    # The tanh form: big_vision, SigLIP.
    GELU_TANH = "gelu_tanh"
    # The exact form, by the error function: the default of torch, timm, DeiT, DINOv2.
    GELU_ERF = "gelu_erf"
    # silu(gate) * value, arXiv:2002.05202; DINOv2 giant. The first layer makes both,
    # gate first, each of `hidden_dim`.
    SWIGLU = "swiglu"


class Mlp(nn.Module, kw_only=True):
    """Widens to `hidden_dim`, applies the activation, comes back."""

    hidden_dim: int
    dropout: float = 0.0
    dtype: Dtype = Dtype.FLOAT32
    activation: Activation = Activation.GELU_TANH

    @nn.compact
    def __call__(
        self, x: Float[Array, "*B D"], train: bool = False
    ) -> Float[Array, "*B D"]:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features,
                dtype=self.dtype,
                kernel_init=nn.initializers.xavier_uniform(),
                bias_init=nn.initializers.normal(1e-6),
                name=name,
            )

        match self.activation:
            case Activation.GELU_TANH:
                y = nn.gelu(dense(self.hidden_dim, "hidden")(x), approximate=True)
            case Activation.GELU_ERF:
                y = nn.gelu(dense(self.hidden_dim, "hidden")(x), approximate=False)
            case Activation.SWIGLU:
                both = dense(2 * self.hidden_dim, "hidden")(x)
                gate, value = jnp.split(both, 2, axis=-1)
                y = nn.silu(gate) * value
        y = nn.Dropout(self.dropout, name="dropout")(y, deterministic=not train)
        return dense(x.shape[-1], "out")(y)
