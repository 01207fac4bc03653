"""Text transformer: the text tower of SigLIP (arXiv:2303.15343) and of CLIP."""

import enum
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from big_vision_lite.models.blocks.attention import Attention
from big_vision_lite.models.blocks.encoder import Encoder
from big_vision_lite.models.blocks.layers import (
    Dtype,
    Remat,
    check_choices,
    check_positive,
    check_rate,
)
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.pooling import AttentionPooling
from big_vision_lite.models.blocks.text import TextEmbedding, causal_mask
from big_vision_lite.runtime import layout
from big_vision_lite.types import Batch, Model

# B texts, N tokens, D values


class TextPooling(enum.StrEnum):
    """The reduction of a text's tokens to one vector."""

    # The last position, padding or not: SigLIP.
    LAST = "last"
    # The first position of the largest id: CLIP, where that id ends a text.
    LARGEST_ID = "largest_id"
    # Attention of a learned probe to all positions.
    ATTENTION = "attention"
    # The mean of all positions, padding included.
    AVERAGE = "average"


class TextTransformer(nn.Module, Model, kw_only=True):
    """Encodes texts of at most `length` ids: "tokens" [B, N, D], "pooled" [B, D].

    Ids are int32 in 0..vocabulary - 1; another gives NaN. With `causal` a token attends
    to itself and those before it (CLIP), else to all, padding too (SigLIP). Embeddings
    of ids and positions are learned; the last norm comes before pooling. "pooled" is
    float32.
    """

    layers: ClassVar = ("embedding/.*", r"encoder/block_(\d+)/.*")
    free_fields: ClassVar = ("dtype", "remat", "attention", "dropout")

    vocabulary: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    length: int = 64
    pooling: TextPooling = TextPooling.LAST
    causal: bool = False
    dropout: float = 0.0
    dtype: Dtype = Dtype.FLOAT32
    attention: Attention = Attention.AUTO
    remat: Remat = Remat.NONE
    activation: Activation = Activation.GELU_TANH
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        names = ("vocabulary", "width", "depth", "mlp_dim", "num_heads", "length")
        check_positive(**{name: getattr(self, name) for name in names})
        check_choices(self)
        check_rate("dropout", self.dropout)
        if self.width % self.num_heads:
            raise ValueError(
                f"TextTransformer: width={self.width} does not divide over "
                f"num_heads={self.num_heads}."
            )
        super().__post_init__()

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Returns the ids under "text"."""
        return {"text": batch["text"]}

    @nn.compact
    def __call__(
        self, text: Int[Array, "B N"], *, train: bool = False
    ) -> dict[str, Array]:
        x = TextEmbedding(
            vocabulary=self.vocabulary,
            width=self.width,
            length=self.length,
            dtype=self.dtype,
            name="embedding",
        )(text)
        x = nn.Dropout(self.dropout, name="dropout")(x, deterministic=not train)
        x = Encoder(
            depth=self.depth,
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dropout=self.dropout,
            dtype=self.dtype,
            attention=self.attention,
            activation=self.activation,
            norm_epsilon=self.norm_epsilon,
            remat=self.remat,
            name="encoder",
        )(
            layout.pin_batch(x),
            train,
            jnp.asarray(causal_mask(x.shape[1])) if self.causal else None,
        )
        pooled = self._pooled(x, text).astype(jnp.float32)
        return {"tokens": x, "pooled": pooled}

    def _pooled(
        self, x: Float[Array, "B N D"], text: Int[Array, "B N"]
    ) -> Float[Array, "B D"]:
        match self.pooling:
            case TextPooling.LAST:
                return x[:, -1]
            case TextPooling.LARGEST_ID:
                end = text.argmax(axis=1)
                return jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
            case TextPooling.AVERAGE:
                return x.mean(axis=1, dtype=jnp.float32)
            case TextPooling.ATTENTION:
                return AttentionPooling(
                    num_heads=self.num_heads,
                    mlp_dim=self.mlp_dim,
                    dtype=self.dtype,
                    attention=self.attention,
                    activation=self.activation,
                    norm_epsilon=self.norm_epsilon,
                    name="pooling",
                )(x)
