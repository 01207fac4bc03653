"""An image encoder and a decoder that writes its caption, for pretraining: CapPa."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from big_vision_lite.models.blocks import layers
from big_vision_lite.models.blocks.attention import Attention, MultiHeadAttention
from big_vision_lite.models.blocks.layers import Dtype, layer_norm
from big_vision_lite.models.blocks.mlp import Activation, Mlp
from big_vision_lite.models.blocks.text import TextEmbedding, causal_mask
from big_vision_lite.models.vit import ViT
from big_vision_lite.runtime import layout
from big_vision_lite.types import Batch, Model

# B images and captions, N tokens, M patches, D values, V ids


class DecoderBlock(nn.Module, kw_only=True):
    """Pre-norm block: attention of tokens, attention to patches, MLP; no biases."""

    mlp_dim: int
    num_heads: int
    dtype: Dtype = Dtype.FLOAT32
    attention: Attention = Attention.AUTO
    activation: Activation = Activation.GELU_TANH
    norm_epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        patches: Float[Array, "B M D"],
        mask: Bool[Array, "B N N"],
    ) -> Float[Array, "B N D"]:
        def attend(name: str) -> MultiHeadAttention:
            return MultiHeadAttention(
                num_heads=self.num_heads,
                dtype=self.dtype,
                attention=self.attention,
                qkv_bias=False,
                out_bias=False,
                name=name,
            )

        def norm(name: str, x: Array) -> Array:
            return layer_norm(self.dtype, name, self.norm_epsilon)(x)

        y = norm("attention_norm", x)
        x = layout.pin_batch(x + attend("attention")(y, y, mask))
        y = norm("cross_attention_norm", x)
        x = layout.pin_batch(x + attend("cross_attention")(y, patches))
        y = Mlp(
            hidden_dim=self.mlp_dim,
            use_bias=False,
            dtype=self.dtype,
            activation=self.activation,
            name="mlp",
        )(norm("mlp_norm", x))
        return layout.pin_batch(x + y)


class Captioner(nn.Module, Model, kw_only=True):
    """Predicts the ids of a caption from the patches of its image (arXiv:2306.07915).

    Returns what the encoder does and "token_logits" [B, N, V] of each id given the
    image and the ids before it; "parallel" [B] is true for captions of which it saw no
    id at all: each time, those of `parallel_prediction` of the examples, drawn at
    random (0 writes one after the other: Cap). A caption is int32 [B, N], its ids in
    0..vocabulary - 1, of at most `length`; id 0 stands before it. The decoder has the
    encoder's width and no biases, and pays attention to all patches. After training
    only the encoder is used.
    """

    backbone: ClassVar = "encoder"
    head_modules: ClassVar = ()
    free_fields: ClassVar = ("parallel_prediction",)

    encoder: ViT
    vocabulary: int
    length: int = 64
    decoder_depth: int = 6
    parallel_prediction: float = 0.75

    def __post_init__(self) -> None:
        layers.check_positive(
            vocabulary=self.vocabulary,
            length=self.length,
            decoder_depth=self.decoder_depth,
        )
        if not 0 <= self.parallel_prediction <= 1:
            raise ValueError(
                f"parallel_prediction={self.parallel_prediction} is a share of the "
                "examples; use 0.75, or 0 for none."
            )
        super().__post_init__()

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Returns the image and, where the batch has one, the caption."""
        text = {"text": batch["text"]} if "text" in batch else {}
        return {"image": batch["image"], **text}

    @nn.compact
    def __call__(
        self,
        image: Num[Array, "B H W C"],
        text: Int[Array, "B N"] | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Array]:
        outputs = self.encoder(image, train=train)
        if self.is_initializing() and text is None:
            # Images alone make all parameters.
            text = jnp.zeros((len(image), self.length), jnp.int32)
        if text is None:
            return outputs
        count, like = text.shape[1], self.encoder
        parallel = jax.random.uniform(self.make_rng("mask"), (len(text),))
        parallel = parallel < self.parallel_prediction
        # One more id than there are stands for all that is not seen.
        before = jnp.pad(text[:, :-1], ((0, 0), (1, 0)))
        seen = jnp.where(parallel[:, None], self.vocabulary, before)
        mask = parallel[:, None, None] | jnp.asarray(causal_mask(count))
        x = TextEmbedding(
            vocabulary=self.vocabulary + 1,
            width=like.width,
            length=self.length,
            dtype=like.dtype,
            name="embedding",
        )(seen)
        grid = outputs["grid"]
        patches = grid.reshape(len(grid), -1, grid.shape[-1])
        for index in range(self.decoder_depth):
            x = DecoderBlock(
                mlp_dim=like.mlp_dim,
                num_heads=like.num_heads,
                dtype=like.dtype,
                attention=like.attention,
                activation=like.activation,
                norm_epsilon=like.norm_epsilon,
                name=f"decoder_{index:02d}",
            )(x, patches, mask)
        x = layer_norm(like.dtype, "norm", like.norm_epsilon)(x)
        logits = layers.Dense(
            features=self.vocabulary, use_bias=False, dtype=like.dtype, name="ids"
        )(x)
        logits = logits.astype(jnp.float32)
        return {**outputs, "token_logits": logits, "parallel": parallel}
