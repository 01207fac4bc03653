"""ViT and DeiT of Hugging Face's transformers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from big_vision_lite.conversion.engine import Entry, linear, norm
from big_vision_lite.conversion.families.vit_huggingface_tables import (
    TO_TIMM,
    BlockNames,
    architecture_of,
    blocks,
    config_for,
    config_of,
    head_of,
    labels_for,
    patches,
    vit_fields,
)
from big_vision_lite.conversion.families.vit_tables import (
    check_fields,
    tokens_and_positions,
)
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import grid_size
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

# What a config.json that leaves a key out means: ViTConfig, DeiTConfig.
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
EXPRESSES = ("pooling", "positions", "activation", "norm_epsilon", "qkv_bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceViT(Format):
    """ViTForImageClassification, and ViTModel when there is no head."""

    name: str = "Hugging Face ViT"
    library: Library = Library.HUGGINGFACE
    model: type = ViT
    # Classification does not go through the pooler.
    ignored: tuple[str, ...] = (r"(vit\.)?pooler\.dense\.(weight|bias)",)

    def recognises(self, weights: Weights) -> bool:
        root = "vit." if "classifier.weight" in weights.arrays else ""
        wanted = {
            f"{root}embeddings.position_embeddings",
            f"{root}encoder.layer.0.layernorm_before.weight",
        }
        distilled = f"{root}embeddings.distillation_token"
        return wanted <= weights.arrays.keys() and distilled not in weights.arrays

    def architecture(self, weights: Weights) -> Architecture:
        config = config_of(weights, ("vit",), DEFAULTS)
        model = ViT(
            **vit_fields(config, weights.path),
            mlp_dim=config["intermediate_size"],
            qkv_bias=config["qkv_bias"],
            pooling=Pooling.CLASS_TOKEN,
            head=head_of(weights),
        )
        return architecture_of(model, config, _pooler_notes(weights))

    def entries(
        self, model: ViT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        root = "" if model.head is None else "vit."
        head = [] if model.head is None else linear("classifier", "head")
        tokens = {f"{root}embeddings.cls_token": "class_token"}
        return _entries(model, image_size, root, tokens) + head

    def describe(
        self, model: ViT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        if model.pooling != Pooling.CLASS_TOKEN:
            raise ValueError(
                "Hugging Face's ViT classifies by the class token, this model has "
                f"pooling={model.pooling}. {TO_TIMM}"
            )
        check_fields(
            model, what="Hugging Face's ViT", expresses=EXPRESSES, instead=TO_TIMM
        )
        _check_activation(model)
        kind = "ViTModel" if model.head is None else "ViTForImageClassification"
        return _config(model, image_size, "vit", kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceDeiT(Format):
    """DeiTForImageClassificationWithTeacher, ...ForImageClassification, DeiTModel.

    With one head the distillation token only takes part in attention, as a register
    does; its position is folded into it.
    """

    name: str = "Hugging Face DeiT"
    library: Library = Library.HUGGINGFACE
    model: type = ViT
    ignored: tuple[str, ...] = (r"(deit\.)?pooler\.dense\.(weight|bias)",)

    def recognises(self, weights: Weights) -> bool:
        first = "encoder.layer.0.layernorm_before.weight"
        return any(
            {f"{root}embeddings.distillation_token", f"{root}{first}"}
            <= weights.arrays.keys()
            for root in ("", "deit.")
        )

    def architecture(self, weights: Weights) -> Architecture:
        config = config_of(weights, ("deit",), DEFAULTS)
        single = head_of(weights)
        model = ViT(
            **vit_fields(config, weights.path),
            mlp_dim=config["intermediate_size"],
            qkv_bias=config["qkv_bias"],
            pooling=Pooling.CLASS_TOKEN,
            head=single or head_of(weights, "cls_classifier"),
            registers=int(single is not None),
            distillation_token=single is None,
        )
        return architecture_of(model, config, _pooler_notes(weights))

    def entries(
        self, model: ViT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        root = "" if model.head is None else "deit."
        second = "distillation_token" if model.distillation_token else "registers"
        tokens = {
            f"{root}embeddings.cls_token": "class_token",
            f"{root}embeddings.distillation_token": second,
        }
        table = _entries(model, image_size, root, tokens)
        if model.head is None:
            return table
        if not model.distillation_token:
            return table + linear("classifier", "head")
        table += linear("cls_classifier", "head")
        return table + linear("distillation_classifier", "distillation_head")

    def describe(
        self, model: ViT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        one_head = (model.registers, model.distillation_token) == (1, False)
        two_heads = (model.registers, model.distillation_token) == (0, True)
        if not two_heads and (not one_head or model.head is None):
            raise ValueError(
                "Hugging Face's DeiT has a distillation token; this model has "
                f"distillation_token={model.distillation_token} and "
                f"registers={model.registers}. {TO_TIMM}"
            )
        check_fields(
            model,
            what="Hugging Face's DeiT",
            expresses=(*EXPRESSES, "registers", "distillation_token"),
            instead=TO_TIMM,
        )
        _check_activation(model)
        teacher = "WithTeacher" if two_heads else ""
        kind = "DeiTModel"
        if model.head is not None:
            kind = f"DeiTForImageClassification{teacher}"
        return _config(model, image_size, "deit", kind)


def _pooler_notes(weights: Weights) -> list[str]:
    """Says that a pooler is left out, where there is one."""
    if not any("pooler.dense" in name for name in weights.arrays):
        return []
    return ["the pooler (a tanh layer) is left out: classification never uses it"]


def _entries(
    model: ViT, image_size: tuple[int, int], root: str, tokens: Mapping[str, str]
) -> list[Entry]:
    return [
        *patches(f"{root}embeddings.patch_embeddings.projection"),
        tokens_and_positions(
            model,
            grid_size(*image_size, model.patch_size),
            positions=f"{root}embeddings.position_embeddings",
            tokens=tokens,
        ),
        *blocks(model, root, BlockNames()),
        *norm(f"{root}layernorm", "encoder/norm"),
    ]


def _config(
    model: ViT, image_size: tuple[int, int], model_type: str, kind: str
) -> dict[str, Any]:
    return {
        "architectures": [kind],
        "model_type": model_type,
        **config_for(model, image_size),
        "intermediate_size": model.mlp_dim,
        "qkv_bias": model.qkv_bias,
        **labels_for(model),
    }


def _check_activation(model: ViT) -> None:
    if model.activation == Activation.SWIGLU:
        raise ValueError(
            f"Hugging Face's ViT has no activation={model.activation}. {TO_TIMM}"
        )


FORMATS = (HuggingFaceViT(), HuggingFaceDeiT())
