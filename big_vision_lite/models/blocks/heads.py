"""The classification head: pooled features to logits."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_lite.models.blocks.layers import check_positive
from big_vision_lite.runtime import layout


class Classifier(nn.Module, kw_only=True):
    """A linear classifier in float32, with a kernel that starts at zero.

    `hidden_dim` puts a tanh layer before it (arXiv:2205.01580 uses the model's width).
    `bias_init` is the initial value of every bias: with a sigmoid loss over C classes,
    -log(C), or -10 for ImageNet-21k, starts near the rate of positives.
    """

    num_classes: int
    hidden_dim: int | None = None
    bias_init: float = 0.0

    def __post_init__(self) -> None:
        check_positive(num_classes=self.num_classes)
        if self.hidden_dim is not None:
            check_positive(hidden_dim=self.hidden_dim)
        super().__post_init__()

    @nn.compact
    def __call__(self, pooled: Float[Array, "B D"]) -> dict[str, Array]:
        """Returns "logits" [B, num_classes] and, with `hidden_dim`, "pre_logits"."""
        outputs: dict[str, Array] = {}
        x = layout.pin_batch(pooled.astype(jnp.float32))
        if self.hidden_dim is not None:
            x = jnp.tanh(nn.Dense(self.hidden_dim, name="pre_logits")(x))
            outputs["pre_logits"] = x
        kernel = self.param(
            "kernel", nn.initializers.zeros, (x.shape[-1], self.num_classes)
        )
        bias = self.param(
            "bias", nn.initializers.constant(self.bias_init), (self.num_classes,)
        )
        outputs["logits"] = layout.pin_batch(x @ kernel + bias)
        return outputs
