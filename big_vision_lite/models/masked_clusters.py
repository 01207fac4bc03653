"""Masked clusters: a ViT sees a block of patches, a decoder names the rest."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from big_vision_lite.models.blocks import layers
from big_vision_lite.models.embedder import unit
from big_vision_lite.models.masked_model import Hidden, MaskedModel


class MaskedClusters(MaskedModel, kw_only=True):
    """Predicts to which of K clusters the features of hidden patches belong (CAPI).

    After arXiv:2502.08769. Returns "scores" [B, N, K] predicted at all patches,
    "masked" [B, N], "image", and "pooled" of the visible patches; with `whole` instead
    what the encoder returns for the whole image. `cluster` compares features of
    patches with the clusters. The decoder attends to all tokens, as that of MAE does,
    and predicts all hidden patches; the paper's attends from 5 % of the hidden patches
    to the visible ones.
    """

    clusters: int = 1024
    mask_ratio: float = 0.65
    hidden: Hidden = Hidden.OUTSIDE_BLOCK

    def __post_init__(self) -> None:
        if self.clusters < 2:
            raise ValueError(f"clusters={self.clusters}: use 2 or more.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, image: Num[Array, "B H W C"], *, train: bool = False, whole: bool = False
    ) -> dict[str, Array]:
        if whole:
            return self.encoder(image, train=train)
        decoded, outputs = self.decode(image, train)
        if self.is_initializing():
            self.cluster(jnp.zeros((1, 1, self.encoder.width)))
        scores = layers.Dense(features=self.clusters, name="prediction")(decoded)
        return {**outputs, "scores": scores}

    @nn.compact
    def cluster(
        self, features: Float[Array, "B N E"], *, train: bool = False
    ) -> dict[str, Array]:
        """Returns {"scores": [B, N, K]} of features whose lengths do not count."""
        shape = (features.shape[-1], self.clusters)
        kernel = self.param("clusters_kernel", nn.initializers.normal(1.0), shape)
        bias = self.param("clusters_bias", nn.initializers.zeros, shape[1:])
        return {"scores": unit(features) @ kernel + bias}
