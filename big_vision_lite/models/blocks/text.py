"""What models of text share: embedding of ids, and masks of who attends to whom."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from big_vision_lite.models.blocks.layers import Dtype


class TextEmbedding(nn.Module, kw_only=True):
    """Adds a learned vector for each id to one for its position, both [*, width].

    Ids are in 0..vocabulary - 1; another id gives NaN, which the loop reports.
    """

    vocabulary: int
    width: int
    length: int
    dtype: Dtype = Dtype.FLOAT32

    @nn.compact
    def __call__(self, ids: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        count = ids.shape[1]
        if count > self.length:
            raise ValueError(
                f"The model takes texts of at most length={self.length} tokens and "
                f"got {count}; give Tokenize(length={self.length}), or the model "
                f"length={count}."
            )
        start = nn.initializers.normal(self.width**-0.5)
        tokens = self.param("tokens", start, (self.vocabulary, self.width))
        positions = self.param("positions", start, (self.length, self.width))
        # Indexing would take the nearest id there is, and nobody would know.
        x = jnp.take(tokens, ids, axis=0, mode="fill", fill_value=jnp.nan)
        return (x + positions[:count]).astype(self.dtype)


def causal_mask(count: int) -> Bool[np.ndarray, "1 N N"]:
    """Returns True where a token (row) may see another (column): itself, those before.

    For attention without a batch of its own: one mask for all texts.
    """
    return np.tril(np.ones((1, count, count), bool))
