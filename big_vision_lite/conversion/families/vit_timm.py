"""timm's VisionTransformer (vit_*, deit_*, deit3_*, *_siglip, *_dinov2) and our ViT.

Facebook's own files of DINOv2 and DeiT III are read, too; a few of their names differ.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from big_vision_lite.conversion import engine
from big_vision_lite.conversion.assumption import of_architecture
from big_vision_lite.conversion.engine import Entry
from big_vision_lite.conversion.families import libraries, vit
from big_vision_lite.conversion.families.vit_timm_config import (
    ACTIVATIONS,
    BASES,
    POOLINGS,
    activation_of,
    arguments_of,
    num_heads_of,
    pooling_of,
    positions_of,
)
from big_vision_lite.conversion.formats import Architecture, Format, Library, Size
from big_vision_lite.conversion.tables import Rows, under
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks import patches
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions, grid_size
from big_vision_lite.models.blocks.pooling import FinalNorm, Pooling
from big_vision_lite.models.vit import ViT

PATCHES = "patch_embed.proj.weight"
ROWS: Rows = {
    "patch_embedding": "patch_embed.proj",
    **under(
        "blocks.{b}.",
        {
            "attention_norm": "norm1",
            vit.QUERY_KEY_VALUE: "attn.qkv",
            "attention/query_norm": "attn.q_norm",
            "attention/key_norm": "attn.k_norm",
            "attention/out": "attn.proj",
            "attention_scale": "ls1.gamma",
            "mlp_norm": "norm2",
            # With SwiGLU, both have the gate in the first half.
            "mlp/hidden": "mlp.fc1",
            "mlp/out": "mlp.fc2",
            "mlp_scale": "ls2.gamma",
        },
        ours=vit.BLOCK,
    ),
    "encoder/norm": "norm",
    "pooled_norm": "fc_norm",
    "pooling/probe": "attn_pool.latent",
    "pooling/attention/query": "attn_pool.q",
    ("pooling/attention/key", "pooling/attention/value"): "attn_pool.kv",
    "pooling/attention/out": "attn_pool.proj",
    "pooling/norm": "attn_pool.norm",
    "pooling/mlp/hidden": "attn_pool.mlp.fc1",
    "pooling/mlp/out": "attn_pool.mlp.fc2",
    "head": "head",
    "distillation_head": "head_dist",
}
# {Facebook's: timm's}. w12 of DINOv2's SwiGLU has the gate first, as fc1 does.
RENAMED = {
    r"(blocks\.\d+\.)gamma_([12])": r"\1ls\2.gamma",  # DeiT III
    r"(blocks\.\d+\.mlp\.)w12(\..*)": r"\1fc1\2",  # DINOv2, giant
    r"(blocks\.\d+\.mlp\.)w3(\..*)": r"\1fc2\2",
    r"register_tokens": "reg_token",  # DINOv2, with registers
}
# Parts that some models of timm have and ours do not, by a name that shows them.
UNKNOWN_PARTS = {
    "norm_pre.weight": "a norm before the first block (CLIP)",
    "patch_embed.norm.weight": "a norm of patches (AIMv2)",
    "blocks.0.attn.norm.weight": "a norm inside attention (BEiT-3)",
    "blocks.0.attn.lambda_q1": "differential attention",
    "blocks.0.attn.q_bias": "BEiT's attention",
}


class TimmViT(Format):
    """timm's VisionTransformer, with or without a class token that the pooling reads.

    `unread_class_token` means that the pooling does not read it: it is then the first
    register of ours. Such models are read only; they are exported with a register token
    instead, which computes the same.
    """

    name = "timm ViT"
    library = Library.TIMM
    model = ViT
    table = ROWS
    signs = (PATCHES, "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight")
    requires = vit.requires(
        *("positions", "activation", "final_norm", "layer_scale", "qkv_bias"),
        *("qk_norm", "registers", "distillation_token", "kernel_patch_size"),
        "position_grid",
        pooling=list(POOLINGS.values()),
    )
    unread_class_token = False

    def normalised_names(self, weights: Weights) -> Weights:
        """Returns the weights in timm's names, also from Facebook's.

        Raises:
            ValueError: class token or positions do not have 3 axes.
        """
        arrays = {
            _renamed(name): array
            for name, array in weights.arrays.items()
            # It replaces masked patches in pretraining.
            if name != "mask_token"
        }
        theirs = {"register_tokens", "cls_token", "pos_embed"}
        if theirs <= weights.arrays.keys():
            # The first position is the class token's; registers have none.
            weights.shape("cls_token", 3)
            weights.shape("pos_embed", 3)
            first, rest = np.split(arrays["pos_embed"], [1], axis=1)
            arrays |= {"cls_token": arrays["cls_token"] + first, "pos_embed": rest}
        return dataclasses.replace(weights, arrays=arrays)

    def recognises(self, weights: Weights) -> bool:
        if not super().recognises(weights):
            return False
        weights = self.normalised_names(weights)
        reads = pooling_of(weights) == Pooling.CLASS_TOKEN
        return ("cls_token" in weights.arrays and not reads) == self.unread_class_token

    def architecture(self, weights: Weights) -> Architecture:
        weights = self.normalised_names(weights)
        arrays = weights.arrays
        _check_parts(weights)
        sizes = weights.sizes(
            {
                PATCHES: "width channels patch_size patch_size",
                "blocks.0.mlp.fc1.weight": "made width",
                "blocks.0.mlp.fc2.weight": "width mlp_dim",
            }
        )
        num_heads = num_heads_of(weights)
        gated = sizes["made"] == 2 * sizes["mlp_dim"]
        activation = activation_of(weights, gated=gated)
        registers = sum(
            weights.shape(name, 3)[1]
            for name in ("reg_token", "cls_token" if self.unread_class_token else "")
            if name in arrays
        )
        placed = positions_of(weights, sizes["patch_size"])
        scale = arguments_of(weights).get("init_values")
        model = ViT(
            width=sizes["width"],
            depth=weights.count(r"blocks\.(\d+)\."),
            mlp_dim=sizes["mlp_dim"],
            num_heads=num_heads.value,
            patch_size=sizes["patch_size"],
            pooling=pooling_of(weights),
            positions=placed.positions,
            head=weights.head("head.weight"),
            activation=activation.value,
            final_norm=FinalNorm.POOLED
            if "fc_norm.weight" in arrays
            else FinalNorm.TOKENS,
            # The initial value, DINOv2's by default; these weights have their own.
            layer_scale=(scale or 1e-5) if "blocks.0.ls1.gamma" in arrays else None,
            qkv_bias="blocks.0.attn.qkv.bias" in arrays,
            qk_norm="blocks.0.attn.q_norm.weight" in arrays,
            registers=registers,
            distillation_token="dist_token" in arrays,
        )
        notes = (num_heads.note, activation.note, placed.note)
        return Architecture(
            model=model,
            image_size_px=placed.image_size_px,
            channels=sizes["channels"],
            assumptions=of_architecture(*filter(None, notes)),
        )

    def special(self, model: ViT, size: Size) -> Sequence[Entry]:
        unread = self.unread_class_token
        class_token = int(model.pooling == Pooling.CLASS_TOKEN)
        distilled = int(model.distillation_token)
        count = class_token + distilled + model.registers
        return [
            *([] if model.kernel_patch_size is None else [_resized_patches(model)]),
            vit.tokens_and_positions(
                model,
                grid_size(*size, model.patch_size),
                positions=None if model.positions == Positions.NONE else "pos_embed",
                theirs=_present(
                    cls_token=class_token + unread,
                    dist_token=distilled,
                    reg_token=model.registers - unread,
                ),
                ours=_present(
                    class_token=class_token,
                    distillation_token=distilled,
                    registers=model.registers,
                ),
                # The distilled DeiT always has positions of tokens; other models are
                # exported without, as no_embed_class=True.
                rows=(count, 0) if distilled else (0, count),
            ),
        ]

    def describe(self, model: ViT, size: Size, channels: int) -> dict[str, Any]:
        gated = model.activation == Activation.SWIGLU
        if gated and model.pooling == Pooling.ATTENTION:
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
        if gated:
            # No config.json can name the class of its MLP, so it starts from a model
            # that has it.
            base = "vit_giant_patch14_dinov2"
        pools = {ours: theirs for theirs, ours in POOLINGS.items()}
        acts = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
        act = {} if gated else {"act_layer": acts[model.activation]}
        return libraries.timm(
            base,
            model,
            channels,
            img_size=list(size),
            patch_size=model.patch_size,
            global_pool=pools[model.pooling],
            class_token=model.pooling == Pooling.CLASS_TOKEN,
            embed_dim=model.width,
            depth=model.depth,
            num_heads=model.num_heads,
            mlp_ratio=libraries.width_ratio(model.mlp_dim * (1 + gated), model.width),
            qkv_bias=model.qkv_bias,
            qk_norm=model.qk_norm,
            # timm takes 0 for none, and drops arguments that are None.
            init_values=0.0 if model.layer_scale is None else model.layer_scale or 1e-5,
            no_embed_class=not model.distillation_token,
            reg_tokens=model.registers,
            pos_embed="none" if model.positions == Positions.NONE else "learn",
            fc_norm=model.final_norm == FinalNorm.POOLED,
            **act,
        )


class TimmViTUnread(TimmViT):
    """timm's VisionTransformer with a class token that the pooling does not read."""

    name = "timm ViT, class token unread"
    unread_class_token = True

    def describe(self, model: ViT, size: Size, channels: int) -> dict[str, Any]:
        raise ValueError("A ViT leaves in the format timm ViT.")


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED.items():
        if found := re.fullmatch(pattern, name):
            return found.expand(replacement)
    return name


def _check_parts(weights: Weights) -> None:
    arrays = weights.arrays
    for name, what in UNKNOWN_PARTS.items():
        if name in arrays:
            raise ValueError(f"{weights.path} has {what}, which no ViT here has.")
    if "blocks.0.norm1.bias" not in arrays:
        raise ValueError(f"{weights.path} has RMS norms, which no ViT here has.")
    if not arrays.keys() & {"norm.weight", "fc_norm.weight"}:
        raise ValueError(f"{weights.path} has no norm after the last block.")


def _resized_patches(model: ViT) -> Entry:
    """Ties the patch kernels; exports one stored for another patch size resized."""
    plain = engine.conv(PATCHES, "patch_embedding/kernel")
    return dataclasses.replace(
        plain,
        to_theirs=lambda arrays: plain.to_theirs(
            [patches.resize_kernel(arrays[0], model.patch_size)]
        ),
    )


def _present(**counts: int) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


FORMATS = (TimmViT(), TimmViTUnread())
