"""Masked autoencoder: a ViT sees some patches, a decoder predicts the rest."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Num

from big_vision_lite.models.blocks import layers
from big_vision_lite.models.blocks.patches import patchify
from big_vision_lite.models.masked_model import MaskedModel


class MaskedAutoencoder(MaskedModel, kw_only=True):
    """Encodes the visible patches and predicts the pixels of all (arXiv:2111.06377).

    Returns "reconstruction" [B, N, p * p * C] and what it should be, the "patches" of
    the scaled input, a patch's values ordered by row, column and channel; "masked"
    [B, N], true where the encoder saw nothing; "image", the scaled input; "pooled" of
    the visible patches. The fields are those of MaskedModel. Pixio (arXiv:2512.15715)
    makes the task harder: mask_block=4, 32 blocks in the decoder, 8 `class_tokens` of
    the encoder.
    """

    @nn.compact
    def __call__(
        self, image: Num[Array, "B H W C"], *, train: bool = False
    ) -> dict[str, Array]:
        decoded, outputs = self.decode(image, train)
        patch, dtype = self.encoder.patch_size, self.encoder.dtype
        values = patch * patch * image.shape[-1]
        predicted = layers.Dense(features=values, dtype=dtype, name="pixels")(decoded)
        patches = patchify(outputs["image"], patch).reshape(predicted.shape)
        predicted = predicted.astype(jnp.float32)
        return {**outputs, "reconstruction": predicted, "patches": patches}
