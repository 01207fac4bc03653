"""timm's VisionTransformer (vit_*, deit_*, deit3_*, *_siglip, *_dinov2) and our ViT.

Facebook's own files of DINOv2 and DeiT III are read, too.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from big_vision_lite.conversion.engine import (
    Entry,
    conv,
    linear,
    norm,
    output_projection,
    projection_biases,
    projections,
    same,
)
from big_vision_lite.conversion.families import vit_tables
from big_vision_lite.conversion.families.vit_timm_config import (
    BASES,
    POOLINGS,
    activation_of,
    arguments_of,
    model_args,
    num_heads_of,
    pooling_of,
    positions_of,
)
from big_vision_lite.conversion.families.vit_timm_names import in_timm_names
from big_vision_lite.conversion.families.vit_timm_tokens import tokens_and_positions
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks import patches
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import grid_size
from big_vision_lite.models.blocks.pooling import FinalNorm, Pooling
from big_vision_lite.models.vit import ViT

PATCHES = "patch_embed.proj.weight"
# What some models of timm have and ours have not, by a name that shows it.
UNKNOWN_PARTS = {
    "norm_pre.weight": "a norm before the first block (CLIP)",
    "patch_embed.norm.weight": "a norm of patches (AIMv2)",
    "blocks.0.attn.norm.weight": "a norm inside attention (BEiT-3)",
    "blocks.0.attn.lambda_q1": "differential attention",
    "blocks.0.attn.q_bias": "BEiT's attention",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimmViT(Format):
    """timm's names. A class token that no pooling reads is a register of ours.

    With `unread_class_token` it is the first of them; such models come in only: they
    leave in the other form, with a register token and the same numbers.
    """

    name: str = "timm ViT"
    unread_class_token: bool = False
    library: Library = Library.TIMM
    model: type = ViT
    ignored: tuple[str, ...] = ()

    def normalised_names(self, weights: Weights) -> Weights:
        return in_timm_names(weights)

    def recognises(self, weights: Weights) -> bool:
        weights = self.normalised_names(weights)
        arrays = weights.arrays
        if not {PATCHES, "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight"} <= (
            arrays.keys()
        ):
            return False
        unread = "cls_token" in arrays and pooling_of(weights) != Pooling.CLASS_TOKEN
        return unread == self.unread_class_token

    def architecture(self, weights: Weights) -> Architecture:
        weights = self.normalised_names(weights)
        arrays = weights.arrays
        for name, what in UNKNOWN_PARTS.items():
            if name in arrays:
                raise ValueError(f"{weights.path} has {what}, which no ViT here has.")
        if "blocks.0.norm1.bias" not in arrays:
            raise ValueError(f"{weights.path} has RMS norms, which no ViT here has.")
        width, channels, patch, patch_width = weights.shape(PATCHES, 4)
        if patch != patch_width:
            raise ValueError(
                f"{weights.path} has patches of {patch}x{patch_width} px; here they "
                "are square."
            )
        if not arrays.keys() & {"norm.weight", "fc_norm.weight"}:
            raise ValueError(f"{weights.path} has no norm after the last block.")
        blocks = {int(n.split(".")[1]) for n in arrays if re.match(r"blocks\.\d", n)}
        made, _ = weights.shape("blocks.0.mlp.fc1.weight", 2)
        _, mlp_dim = weights.shape("blocks.0.mlp.fc2.weight", 2)
        num_heads = num_heads_of(weights)
        activation = activation_of(weights, gated=made == 2 * mlp_dim)
        registers = sum(
            weights.shape(name, 3)[1]
            for name in ("reg_token", "cls_token" if self.unread_class_token else "")
            if name in arrays
        )
        positions, image_size, note = positions_of(weights, patch)
        arguments = arguments_of(weights)
        scaled = "blocks.0.ls1.gamma" in arrays
        model = ViT(
            width=width,
            depth=len(blocks),
            mlp_dim=mlp_dim,
            num_heads=num_heads.value,
            patch_size=patch,
            pooling=pooling_of(weights),
            positions=positions,
            head=Classifier(num_classes=weights.shape("head.weight", 2)[0])
            if "head.weight" in arrays
            else None,
            activation=activation.value,
            final_norm=FinalNorm.POOLED
            if "fc_norm.weight" in arrays
            else FinalNorm.TOKENS,
            # Where a fresh one starts; these weights have their own. DINOv2's.
            layer_scale=(arguments.get("init_values") or 1e-5) if scaled else None,
            qkv_bias="blocks.0.attn.qkv.bias" in arrays,
            qk_norm="blocks.0.attn.q_norm.weight" in arrays,
            registers=registers,
            distillation_token="dist_token" in arrays,
        )
        return Architecture(
            model=model,
            image_size=image_size,
            channels=channels,
            notes=tuple(n for n in (num_heads.note, activation.note, note) if n),
        )

    def entries(
        self, model: ViT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        grid = grid_size(*image_size, model.patch_size)
        return [
            _patches(model),
            same("patch_embed.proj.bias", "patch_embedding/bias"),
            tokens_and_positions(model, grid, self.unread_class_token),
            *encoder_entries(model),
        ]

    def describe(
        self, model: ViT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        if self.unread_class_token:
            raise ValueError("A ViT leaves in the format timm ViT.")
        vit_tables.check_fields(
            model,
            what="timm's VisionTransformer",
            expresses=(
                *("pooling", "positions", "activation", "final_norm", "layer_scale"),
                *("qkv_bias", "qk_norm", "registers", "distillation_token"),
                *("kernel_patch_size", "position_grid"),
            ),
            instead="Use --to safetensors, which keeps everything, for this library. "
            "For the layer before the head, drop it and train a new head: "
            "--config.init.drop='head/.*' with head.hidden_dim=none.",
        )
        if model.pooling not in POOLINGS.values():
            raise ValueError(
                f"timm's VisionTransformer does not have pooling={model.pooling}. "
                "Export with --to huggingface, whose DINOv2 has, or safetensors."
            )
        if model.activation == Activation.SWIGLU and model.pooling == Pooling.ATTENTION:
            raise ValueError(
                "timm's attention pooling has no SwiGLU; use activation=gelu_tanh or "
                "another pooling."
            )
        if model.distillation_token and model.registers:
            raise ValueError(
                "timm's distilled DeiT does not read registers; use registers=0."
            )
        base = BASES.get(model.width, "vit_base_patch16_224")
        if model.distillation_token:
            base = "deit_base_distilled_patch16_224"
        if model.activation == Activation.SWIGLU:
            # Its MLP is a class, which no config.json can name: take a model of it.
            base = "vit_giant_patch14_dinov2"
        return {"architecture": base, "model_args": model_args(model, image_size)}


def encoder_entries(model: ViT) -> Iterator[Entry]:
    """Yields the entries of everything behind the positions."""
    for index in range(model.depth):
        yield from _block(model, f"blocks.{index}", f"encoder/block_{index:02d}")
    if model.final_norm == FinalNorm.TOKENS:
        yield from norm("norm", "encoder/norm")
    else:
        yield from norm("fc_norm", "pooled_norm")
    if model.pooling == Pooling.ATTENTION:
        yield same("attn_pool.latent", "pooling/probe")
        ours = "pooling/attention"
        for theirs, parts in (("q", ("query",)), ("kv", ("key", "value"))):
            names = [f"{ours}/{part}" for part in parts]
            yield from _projections(f"attn_pool.{theirs}", names, bias=True)
        yield output_projection("attn_pool.proj.weight", f"{ours}/out/kernel")
        yield same("attn_pool.proj.bias", f"{ours}/out/bias")
        yield from norm("attn_pool.norm", "pooling/norm")
        yield from _mlp("attn_pool.mlp", "pooling/mlp")
    if model.head is not None:
        yield from linear("head", "head")
        if model.distillation_token:
            yield from linear("head_dist", "distillation_head")


def _block(model: ViT, theirs: str, ours: str) -> Iterator[Entry]:
    yield from norm(f"{theirs}.norm1", f"{ours}/attention_norm")
    parts = [f"{ours}/attention/{part}" for part in ("query", "key", "value")]
    yield from _projections(f"{theirs}.attn.qkv", parts, bias=model.qkv_bias)
    if model.qk_norm:
        yield from norm(f"{theirs}.attn.q_norm", f"{ours}/attention/query_norm")
        yield from norm(f"{theirs}.attn.k_norm", f"{ours}/attention/key_norm")
    out = f"{ours}/attention/out"
    yield output_projection(f"{theirs}.attn.proj.weight", f"{out}/kernel")
    yield same(f"{theirs}.attn.proj.bias", f"{out}/bias")
    yield from norm(f"{theirs}.norm2", f"{ours}/mlp_norm")
    yield from _mlp(f"{theirs}.mlp", f"{ours}/mlp")
    if model.layer_scale is not None:
        yield same(f"{theirs}.ls1.gamma", f"{ours}/attention_scale")
        yield same(f"{theirs}.ls2.gamma", f"{ours}/mlp_scale")


def _mlp(theirs: str, ours: str) -> Iterator[Entry]:
    # With SwiGLU, both have the gate in the first half.
    yield from linear(f"{theirs}.fc1", f"{ours}/hidden")
    yield from linear(f"{theirs}.fc2", f"{ours}/out")


def _projections(theirs: str, ours: Sequence[str], *, bias: bool) -> Iterator[Entry]:
    yield projections(f"{theirs}.weight", *(f"{part}/kernel" for part in ours))
    if bias:
        yield projection_biases(f"{theirs}.bias", *(f"{part}/bias" for part in ours))


def _patches(model: ViT) -> Entry:
    """Ties the patch kernels; one stored for another patch size leaves resized."""
    plain = conv(PATCHES, "patch_embedding/kernel")
    return dataclasses.replace(
        plain,
        to_theirs=lambda arrays: plain.to_theirs(
            [patches.resize_kernel(arrays[0], model.patch_size)]
        ),
    )


FORMATS = (
    TimmViT(),
    TimmViT(name="timm ViT, class token unread", unread_class_token=True),
)
