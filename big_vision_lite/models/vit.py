"""Vision transformer (arXiv:2010.11929), in big_vision's form."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from big_vision_lite.models.blocks import patches
from big_vision_lite.models.blocks.attention import Attention
from big_vision_lite.models.blocks.encoder import Encoder
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.layers import (
    Dtype,
    Remat,
    check_choices,
    check_positive,
    check_rate,
    layer_norm,
    scale_pixels,
)
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import PatchEmbedding, Positions, sincos
from big_vision_lite.models.blocks.pooling import (
    WITH_CLASS_TOKEN,
    AttentionPooling,
    FinalNorm,
    Pooling,
)
from big_vision_lite.runtime import layout
from big_vision_lite.types import Model, Stem

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


class ViT(nn.Module, Model, kw_only=True):
    """ViT; returns "grid" [B, h, w, D], "pooled", "image"; with a head, "logits".

    `dropout` applies after the positions and after every dense layer of the blocks but
    query, key and value. `stochastic_depth` is the drop rate of the last block; the
    rate grows linearly from 0 at the first. `mean` and `std` are in units of 0..255,
    one value or one per channel.

    Options of published variants, each off by default (`vit_variants.py` sets them):
    `layer_scale` is the initial value of a learned factor per channel on each branch.
    `registers` is the number of learned tokens without positions, left out of the
    output (arXiv:2309.16588). Of several `class_tokens` the pooled vector is the mean.
    `distillation_token` (arXiv:2012.12877) adds a second class token and head: "logits"
    and "pooled" are then means over both tokens, "class_logits" and
    "distillation_logits" the two parts. `stem` turns the image into a grid, whose cells
    `patch_size` then counts. `kernel_patch_size` and `position_grid` are the sizes in
    which the patch kernel and the learned positions are stored; every call resizes them
    (FlexiViT, arXiv:2212.08013).

    A call can encode only some patches: `visible` [B, K] holds their indices per image;
    the call then returns "tokens" [B, K, D] in that order and no "grid", and what lies
    before them, class tokens and registers, as "special" (arXiv:2111.06377). `replaced`
    [B, N] is true where a learned token replaces a patch before positions are added
    (arXiv:2106.08254); it needs `mask_token=True`.
    """

    published: ClassVar = (
        *("Ti/16", "S/32", "S/16", "B/32", "B/16", "L/32", "L/16"),
        *("So400m/14", "H/14", "g/14", "G/14"),
    )
    head_modules: ClassVar = ("head", "distillation_head")
    layers: ClassVar = (
        "(?:stem|patch_embedding)/.*|position_embedding|mask_token"
        "|class_token|distillation_token|registers",
        r"encoder/block_(\d+)/.*",
    )
    free_fields: ClassVar = (
        *("head", "dtype", "remat", "attention", "dropout", "stochastic_depth"),
        *("width", "depth", "mlp_dim", "patch_size", "kernel_patch_size"),
        *("position_grid", "layer_scale", "mask_token"),
    )
    position_embeddings: ClassVar = ("position_embedding",)

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
    attention: Attention = Attention.AUTO
    remat: Remat = Remat.NONE
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)
    activation: Activation = Activation.GELU_TANH
    norm_epsilon: float = 1e-6
    final_norm: FinalNorm = FinalNorm.TOKENS
    layer_scale: float | None = None
    qkv_bias: bool = True
    qk_norm: bool = False
    registers: int = 0
    class_tokens: int = 1
    distillation_token: bool = False
    stem: Stem | None = None
    kernel_patch_size: int | None = None
    position_grid: tuple[int, ...] = ()
    mask_token: bool = False

    @property
    def input_kernel(self) -> str:
        if self.stem is None:
            return "patch_embedding/kernel"
        return f"stem/{self.stem.input_kernel}"

    @property
    def reads_patches(self) -> bool:
        return self.stem is None

    @property
    def standardises_kernels(self) -> bool:
        return self.stem is not None and self.stem.standardises_kernels

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
        # Not a method: Linen's interceptors would see it before the module has a path.
        _check_variants(self)
        super().__post_init__()

    @classmethod
    def of(cls, size: str, **overrides: object) -> "ViT":
        """Builds a published size: ViT.of("S/16", head=Classifier(num_classes=10))."""
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

    @nn.compact
    def __call__(
        self,
        image: Num[Array, "B H W C"],
        *,
        train: bool = False,
        visible: Int[Array, "B K"] | None = None,
        replaced: Bool[Array, "B N"] | None = None,
    ) -> dict[str, Array]:
        scaled = scale_pixels(image, self.mean, self.std)
        # The backward pass recomputes patches from the input instead of storing them.
        x = nn.remat(PatchEmbedding)(
            patch_size=self.patch_size,
            kernel_patch_size=self.kernel_patch_size,
            width=self.width,
            dtype=self.dtype,
            mean=self.mean if self.stem is None else None,
            std=self.std if self.stem is None else None,
            name="patch_embedding",
        )(image if self.stem is None else self.stem(scaled, train))
        batch, rows, columns, width = x.shape
        x = x.reshape(batch, rows * columns, width)
        if self.mask_token:
            start = nn.initializers.normal(0.02)
            token = self.param("mask_token", start, (1, 1, width)).astype(self.dtype)
            x = x if replaced is None else jnp.where(replaced[:, :, None], token, x)
        elif replaced is not None:
            raise ValueError(
                "replaced= needs a learned token to put in place of patches: give the "
                "model mask_token=True."
            )
        match self.positions:
            case Positions.SINCOS:
                x = x + jnp.asarray(sincos(rows, columns, width), self.dtype)
            case Positions.LEARNED:
                positions = self._learned_positions((rows, columns))
                x = x + positions.reshape(x.shape[1:]).astype(self.dtype)
        if visible is not None:
            x = patches.picked(x, visible)
        # After the positions, because these tokens have none.
        before = self._tokens_before_patches(batch)
        x = jnp.concatenate([*before, x], axis=1) if before else x
        x = nn.Dropout(self.dropout, name="dropout")(x, deterministic=not train)

        x = Encoder(
            depth=self.depth,
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            dropout=self.dropout,
            stochastic_depth=self.stochastic_depth,
            dtype=self.dtype,
            attention=self.attention,
            activation=self.activation,
            norm_epsilon=self.norm_epsilon,
            last_norm=self.final_norm == FinalNorm.TOKENS,
            layer_scale=self.layer_scale,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            remat=self.remat,
            name="encoder",
        )(layout.pin_batch(x), train)

        num_special = sum(tokens.shape[1] for tokens in before)
        special, x = x[:, :num_special], x[:, num_special:]
        match self.pooling:
            case Pooling.AVERAGE:
                pooled = x.mean(axis=1, dtype=jnp.float32)
            case Pooling.CLASS_TOKEN:
                pooled = self._class_token(special)
            case Pooling.CLASS_TOKEN_AND_AVERAGE:
                average = x.mean(axis=1, dtype=jnp.float32)
                token = self._class_token(special)
                pooled = jnp.concatenate([token, average], axis=-1)
            case Pooling.ATTENTION:
                pooled = AttentionPooling(
                    num_heads=self.num_heads,
                    mlp_dim=self.mlp_dim,
                    dtype=self.dtype,
                    attention=self.attention,
                    activation=self.activation,
                    norm_epsilon=self.norm_epsilon,
                    name="pooling",
                )(x)
        if self.final_norm == FinalNorm.POOLED:
            pooled = layer_norm(self.dtype, "pooled_norm", self.norm_epsilon)(pooled)
        pooled = pooled.astype(jnp.float32)
        outputs = {"image": scaled, "pooled": pooled}
        if visible is None:
            outputs["grid"] = x.reshape(batch, rows, columns, width)
        else:
            outputs |= {"tokens": x, "special": special} if before else {"tokens": x}
        if self.head is not None:
            outputs |= self.head(pooled)
        if self.distillation_token:
            outputs |= self._with_distillation(outputs, special[:, 1])
        return outputs

    def _class_token(self, special: Float[Array, "B n D"]) -> Float[Array, "B D"]:
        if self.class_tokens == 1:
            return special[:, 0]
        return special[:, : self.class_tokens].mean(axis=1, dtype=jnp.float32)

    def _learned_positions(self, grid: tuple[int, int]) -> Float[Array, "h w D"]:
        stored = self.position_grid or grid
        positions = self.param(
            "position_embedding",
            nn.initializers.normal(self.width**-0.5),
            (*stored, self.width),
        )
        return patches.resample_positions(positions, grid)

    def _tokens_before_patches(self, batch: int) -> list[Float[Array, "B n D"]]:
        counts = {
            "class_token": self.class_tokens * (self.pooling in WITH_CLASS_TOKEN),
            "distillation_token": int(self.distillation_token),
            "registers": self.registers,
        }
        starts = {"class_token": nn.initializers.zeros}
        learned = [
            self.param(
                name, starts.get(name, nn.initializers.normal(0.02)), (1, n, self.width)
            )
            for name, n in counts.items()
            if n
        ]
        return [
            jnp.broadcast_to(tokens, (batch, *tokens.shape[1:])).astype(self.dtype)
            for tokens in learned
        ]

    def _with_distillation(
        self, outputs: dict[str, Array], token: Float[Array, "B D"]
    ) -> dict[str, Array]:
        token = token.astype(jnp.float32)
        both = {"pooled": (outputs["pooled"] + token) / 2}
        if self.head is None:
            return both
        head = Classifier(
            num_classes=self.head.num_classes,
            hidden_dim=self.head.hidden_dim,
            bias_init=self.head.bias_init,
            name="distillation_head",
        )
        parts = outputs["logits"], head(token)["logits"]
        return both | {
            "logits": (parts[0] + parts[1]) / 2,
            "class_logits": parts[0],
            "distillation_logits": parts[1],
        }


def _check_variants(model: ViT) -> None:
    if model.norm_epsilon <= 0:
        raise ValueError(f"norm_epsilon={model.norm_epsilon} must be positive.")
    if model.registers < 0:
        raise ValueError(f"registers={model.registers}: use 0 for none.")
    if model.class_tokens < 1 or (
        model.class_tokens > 1
        and (model.pooling not in WITH_CLASS_TOKEN or model.distillation_token)
    ):
        raise ValueError(
            f"class_tokens={model.class_tokens} with pooling={model.pooling} and "
            f"distillation_token={model.distillation_token}: several go with "
            "pooling=class_token or class_token_and_average, and without distillation; "
            "else use 1."
        )
    if model.kernel_patch_size is not None:
        check_positive(kernel_patch_size=model.kernel_patch_size)
    if model.distillation_token and (
        model.pooling != Pooling.CLASS_TOKEN or model.final_norm != FinalNorm.TOKENS
    ):
        raise ValueError(
            "distillation_token=True goes with pooling=class_token and "
            f"final_norm=tokens (DeiT), not with pooling={model.pooling} and "
            f"final_norm={model.final_norm}."
        )
    if (
        model.pooling == Pooling.CLASS_TOKEN_AND_AVERAGE
        and model.final_norm != FinalNorm.TOKENS
    ):
        raise ValueError(
            f"pooling={model.pooling} goes with final_norm=tokens (DINOv2), not with "
            f"final_norm={model.final_norm}."
        )
    if model.position_grid and (
        len(model.position_grid) != 2
        or min(model.position_grid) < 1
        or model.positions != Positions.LEARNED
    ):
        raise ValueError(
            f"position_grid={model.position_grid} with positions={model.positions}: "
            "it is (rows, columns) of learned positions; use positions=learned, or "
            "position_grid=()."
        )
