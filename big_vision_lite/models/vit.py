"""Vision transformer, after arXiv:2010.11929 and big_vision's form of it."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from big_vision_lite import layout
from big_vision_lite.models.attention import Attention, MultiHeadAttention
from big_vision_lite.models.heads import Classifier
from big_vision_lite.models.layers import (
    Dtype,
    Remat,
    check_choices,
    check_positive,
    check_rate,
    layer_norm,
    rematerialised,
    scale_pixels,
)
from big_vision_lite.models.mlp import Mlp
from big_vision_lite.models.patches import PatchEmbedding
from big_vision_lite.models.pooling import AttentionPooling, Pooling
from big_vision_lite.models.positions import Positions, sincos
from big_vision_lite.types import Batch

# Width, depth, MLP width, heads: arXiv:2106.04560 Table 2 and arXiv:2106.10270 Table 1;
# So400m: arXiv:2305.13035.
SIZES = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
}


class EncoderBlock(nn.Module, kw_only=True):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    mlp_dim: int
    num_heads: int
    dropout: float
    stochastic_depth: float
    dtype: Dtype
    attention: Attention

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], train: bool = False
    ) -> Float[Array, "B N D"]:
        y = layer_norm(self.dtype, "attention_norm")(x)
        y = MultiHeadAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            attention=self.attention,
            name="attention",
        )(y, y)
        x = layout.pin_batch(x + self._drop("attention", y, train))

        y = layer_norm(self.dtype, "mlp_norm")(x)
        y = Mlp(
            hidden_dim=self.mlp_dim,
            dropout=self.dropout,
            dtype=self.dtype,
            name="mlp",
        )(y, train)
        return layout.pin_batch(x + self._drop("mlp", y, train))

    def _drop(self, branch: str, y: Array, train: bool) -> Array:
        y = nn.Dropout(self.dropout, name=f"{branch}_dropout")(
            y, deterministic=not train
        )
        # Whole branches of whole images, arXiv:1603.09382.
        return nn.Dropout(
            self.stochastic_depth,
            broadcast_dims=(1, 2),
            name=f"{branch}_stochastic_depth",
        )(y, deterministic=not train)


class Encoder(nn.Module, kw_only=True):
    """A stack of blocks and a last norm."""

    depth: int
    mlp_dim: int
    num_heads: int
    dropout: float
    stochastic_depth: float
    dtype: Dtype
    attention: Attention
    remat: Remat

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], train: bool) -> Float[Array, "B N D"]:
        block = rematerialised(EncoderBlock, self.remat)
        for index in range(self.depth):
            x = block(
                mlp_dim=self.mlp_dim,
                num_heads=self.num_heads,
                dropout=self.dropout,
                stochastic_depth=self.stochastic_depth * index / max(1, self.depth - 1),
                dtype=self.dtype,
                attention=self.attention,
                name=f"block_{index:02d}",
            )(x, train)
        return layer_norm(self.dtype, "norm")(x)


class ViT(nn.Module, kw_only=True):
    """Returns "tokens" (of patches), "pooled", "logits" if there is a head, "image".

    `dropout` acts after the positions and after every dense layer but query, key and
    value; `stochastic_depth` is the rate of the last block, growing linearly from 0.
    `mean` and `std` are in units of 0..255, one value or one a channel.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    pooling: Pooling = Pooling.AVERAGE
    positions: Positions = Positions.SINCOS
    head: Classifier | None = None
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: Dtype = Dtype.FLOAT32
    attention: Attention = Attention.XLA
    remat: Remat = Remat.NONE
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)

    def __post_init__(self) -> None:
        check_positive(
            width=self.width,
            depth=self.depth,
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            patch_size=self.patch_size,
        )
        check_choices(self)
        check_rate("dropout", self.dropout)
        check_rate("stochastic_depth", self.stochastic_depth)
        if self.width % self.num_heads:
            nearest = self.width - self.width % self.num_heads + self.num_heads
            raise ValueError(
                f"width={self.width} does not divide over num_heads={self.num_heads}; "
                f"use width={nearest}, or other heads."
            )
        super().__post_init__()

    @classmethod
    def of(cls, size: str, **overrides: object) -> "ViT":
        """Builds a published size, ViT.of("S/16", head=Classifier(num_classes=10))."""
        name, _, patch = size.partition("/")
        if name not in SIZES or not patch.isdecimal():
            raise ValueError(
                f'No ViT is called "{size}"; write SIZE/PATCH with a size of '
                f'{", ".join(SIZES)} and the patch in pixels, like "S/16".'
            )
        fields = dict(
            zip(("width", "depth", "mlp_dim", "num_heads"), SIZES[name], strict=True)
        )
        return cls(**{**fields, "patch_size": int(patch), **overrides})

    def inputs(self, batch: Batch) -> dict[str, Array]:
        return {"image": batch["image"]}

    @nn.compact
    def __call__(
        self, image: Num[Array, "B H W C"], *, train: bool = False
    ) -> dict[str, Array]:
        image = scale_pixels(image, self.mean, self.std)
        x = PatchEmbedding(
            patch_size=self.patch_size,
            width=self.width,
            dtype=self.dtype,
            name="patch_embedding",
        )(image)
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows * columns, width)
        match self.positions:
            case Positions.SINCOS:
                x = x + jnp.asarray(sincos(rows, columns, width), self.dtype)
            case Positions.LEARNED:
                positions = self.param(
                    "position_embedding",
                    nn.initializers.normal(width**-0.5),
                    (rows, columns, width),
                )
                x = x + positions.reshape(x.shape[1:]).astype(self.dtype)

        if self.pooling == Pooling.CLASS_TOKEN:
            # After the positions, so the class token has none.
            token = self.param("class_token", nn.initializers.zeros, (1, 1, width))
            token = jnp.broadcast_to(token, (batch, 1, width)).astype(self.dtype)
            x = jnp.concatenate([token, x], axis=1)
        x = nn.Dropout(self.dropout, name="dropout")(x, deterministic=not train)

        x = Encoder(
            depth=self.depth,
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dropout=self.dropout,
            stochastic_depth=self.stochastic_depth,
            dtype=self.dtype,
            attention=self.attention,
            remat=self.remat,
            name="encoder",
        )(layout.pin_batch(x), train)

        match self.pooling:
            case Pooling.AVERAGE:
                pooled = x.mean(axis=1, dtype=jnp.float32)
            case Pooling.CLASS_TOKEN:
                pooled, x = x[:, 0], x[:, 1:]
            case Pooling.ATTENTION:
                pooled = AttentionPooling(
                    num_heads=self.num_heads,
                    mlp_dim=self.mlp_dim,
                    dtype=self.dtype,
                    attention=self.attention,
                    name="pooling",
                )(x)
        pooled = pooled.astype(jnp.float32)
        outputs = {"image": image, "tokens": x, "pooled": pooled}
        if self.head is not None:
            outputs |= self.head(pooled)
        return outputs
