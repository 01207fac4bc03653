"""The two-layer perceptron of a transformer block."""

import flax.linen as nn
from jaxtyping import Array, Float

from big_vision_lite.models.layers import Dtype


class Mlp(nn.Module, kw_only=True):
    """Widens to `hidden_dim`, applies the tanh form of GELU, comes back."""

    hidden_dim: int
    dropout: float = 0.0
    dtype: Dtype = Dtype.FLOAT32

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

        y = nn.gelu(dense(self.hidden_dim, "hidden")(x), approximate=True)
        y = nn.Dropout(self.dropout, name="dropout")(y, deterministic=not train)
        return dense(x.shape[-1], "out")(y)
