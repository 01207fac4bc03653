"""MLP-Mixer (arXiv:2105.01601): MLPs over patches and MLPs over channels."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import (
    Dtype,
    Remat,
    check_choices,
    check_positive,
    check_rate,
    layer_norm,
    rematerialised,
    scale_pixels,
)
from big_vision_lite.models.blocks.mlp import Activation, Mlp
from big_vision_lite.models.blocks.patches import PatchEmbedding
from big_vision_lite.runtime import layout
from big_vision_lite.types import Model

# Width, depth, width of the MLPs over patches and over channels: Table 1.
SIZES = {
    "S": (512, 8, 256, 2048),
    "B": (768, 12, 384, 3072),
    "L": (1024, 24, 512, 4096),
    "H": (1280, 32, 640, 5120),
}


class MixerBlock(nn.Module, kw_only=True):
    """Mixer block: x += token_mixing(norm(x)); x += channel_mixing(norm(x))."""

    token_mlp_dim: int
    channel_mlp_dim: int
    stochastic_depth: float
    dtype: Dtype
    activation: Activation

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N D"], train: bool = False
    ) -> Float[Array, "B N D"]:
        y = layer_norm(self.dtype, "token_norm")(x)
        y = y.swapaxes(1, 2)  # [B, D, N]
        y = self._mlp("token_mixing", self.token_mlp_dim)(y, train)
        x = layout.pin_batch(x + self._drop("token", y.swapaxes(1, 2), train))

        y = layer_norm(self.dtype, "channel_norm")(x)
        y = self._mlp("channel_mixing", self.channel_mlp_dim)(y, train)
        return layout.pin_batch(x + self._drop("channel", y, train))

    def _mlp(self, name: str, hidden_dim: int) -> Mlp:
        return Mlp(
            hidden_dim=hidden_dim,
            dtype=self.dtype,
            activation=self.activation,
            name=name,
        )

    def _drop(self, branch: str, y: Array, train: bool) -> Array:
        # Stochastic depth drops a branch per image, arXiv:1603.09382.
        return nn.Dropout(
            self.stochastic_depth,
            broadcast_dims=(1, 2),
            name=f"{branch}_stochastic_depth",
        )(y, deterministic=not train)


class MlpMixer(nn.Module, Model, kw_only=True):
    """MLP-Mixer; returns "grid" [B, h, w, D], "pooled", "image"; with a head, "logits".

    The number of patches is a layer width, so parameters fit one image size only.
    `stochastic_depth` is the drop rate of the last block; the rate grows linearly from
    0 at the first. `mean` and `std` are in units of 0..255, one value or one per
    channel.
    """

    published: ClassVar = ("S/32", "S/16", "B/32", "B/16", "L/32", "L/16", "H/14")
    layers: ClassVar = ("patch_embedding/.*", r"block_(\d+)/.*")
    free_fields: ClassVar = (
        *("head", "dtype", "remat", "stochastic_depth"),
        *("patch_size", "width", "depth"),
    )
    input_kernel = "patch_embedding/kernel"
    reads_patches = True

    width: int
    depth: int
    token_mlp_dim: int
    channel_mlp_dim: int
    patch_size: int
    head: Classifier | None = None
    activation: Activation = Activation.GELU_TANH
    stochastic_depth: float = 0.0
    dtype: Dtype = Dtype.FLOAT32
    remat: Remat = Remat.NONE
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)

    def __post_init__(self) -> None:
        check_positive(
            width=self.width,
            depth=self.depth,
            token_mlp_dim=self.token_mlp_dim,
            channel_mlp_dim=self.channel_mlp_dim,
            patch_size=self.patch_size,
        )
        check_choices(self)
        check_rate("stochastic_depth", self.stochastic_depth)
        super().__post_init__()

    @classmethod
    def of(cls, size: str, **overrides: object) -> "MlpMixer":
        """Builds a published size: MlpMixer.of("B/16", head=Classifier(...))."""
        name, _, patch = size.partition("/")
        if name not in SIZES or not patch.isdecimal():
            raise ValueError(
                f'No MlpMixer is called "{size}"; write SIZE/PATCH with a size of '
                f'{", ".join(SIZES)} and the patch in pixels, like "B/16".'
            )
        names = ("width", "depth", "token_mlp_dim", "channel_mlp_dim")
        fields = dict(zip(names, SIZES[name], strict=True))
        return cls(**{**fields, "patch_size": int(patch), **overrides})

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
        x = layout.pin_batch(x.reshape(batch, rows * columns, width))
        block = rematerialised(MixerBlock, self.remat)
        for index in range(self.depth):
            x = block(
                token_mlp_dim=self.token_mlp_dim,
                channel_mlp_dim=self.channel_mlp_dim,
                stochastic_depth=self.stochastic_depth * index / max(1, self.depth - 1),
                dtype=self.dtype,
                activation=self.activation,
                name=f"block_{index:02d}",
            )(x, train)
        x = layer_norm(self.dtype, "norm")(x)
        pooled = x.mean(axis=1, dtype=jnp.float32)
        grid = x.reshape(batch, rows, columns, width)
        outputs = {"image": image, "grid": grid, "pooled": pooled}
        if self.head is not None:
            outputs |= self.head(pooled)
        return outputs
