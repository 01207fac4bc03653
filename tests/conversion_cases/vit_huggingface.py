"""ViTs of Hugging Face: ViT, DeiT, SigLIP and DINOv2."""

import functools
from typing import Any

from big_vision_lite.conversion.formats import Library
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT
from conversion_cases.case import (
    CLASSES,
    HEAD,
    NO_HEAD,
    TOKEN,
    Case,
    Ours,
    Size,
    side,
    slow,
)
from conversion_cases.vit_archives import PROBE, TINY

LABELS = {index: f"class {index}" for index in range(CLASSES)}
TINY_HF = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "image_size": 24,
    "patch_size": 8,
}
# DINOv2 counts its MLP in widths.
TINY_DINO = {k: v for k, v in TINY_HF.items() if k != "intermediate_size"}
TEXT = {**TINY_HF, "vocab_size": 11, "max_position_embeddings": 4}
HF_SEVEN = {"image_size": 35, "patch_size": 7}
HF_WIDE = {"image_size": [16, 32]}


def huggingface_vit(kind: str, config: str, **arguments: Any) -> Any:
    import transformers

    made = getattr(transformers, config)(**arguments)
    return getattr(transformers, kind)(made)


def vit(kind: str = "ViTForImageClassification", **more: Any) -> Case:
    return huggingface("ViT", kind, "ViTConfig", {**TINY_HF, **more})


def deit(kind: str, **more: Any) -> Case:
    return huggingface("DeiT", kind, "DeiTConfig", {**TINY_HF, **more})


def siglip(kind: str = "SiglipVisionModel", **more: Any) -> Case:
    tower = {**TINY_HF, **more}
    if kind == "SiglipVisionModel":
        return huggingface("SigLIP tower", kind, "SiglipVisionConfig", tower)
    both = {"vision_config": tower, "text_config": TEXT}
    return huggingface("SigLIP", kind, "SiglipConfig", both)


def dino(kind: str = "Dinov2Model", **more: Any) -> Case:
    given = {**TINY_DINO, **more}
    if "Registers" not in kind:
        return huggingface("DINOv2", kind, "Dinov2Config", given)
    config = "Dinov2WithRegistersConfig"
    return huggingface("DINOv2 with registers", kind, config, given)


def huggingface(form: str, kind: str, config: str, given: Any) -> Case:
    labels = {} if config == "SiglipVisionConfig" else {"id2label": LABELS}
    build = functools.partial(huggingface_vit, kind, config, **given, **labels)
    size = side(given.get("vision_config", given)["image_size"])
    return Case(form=f"Hugging Face {form}", build=build, sizes=(size,))


TOWER = {
    **dict(patch_size=8, image_size=16, hidden_size=32, num_hidden_layers=1),
    **dict(num_attention_heads=2, intermediate_size=32),
}
SCALED = TINY.clone(layer_scale=0.5)
CASES = {
    "HF ViT": vit(),
    "HF ViT, odd": slow(vit(**HF_SEVEN)),
    "HF ViT, not square": vit(**HF_WIDE),
    "HF ViT, tanh": vit(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
    "HF ViT, new": slow(vit(hidden_act="gelu_new")),
    "HF ViT, no biases": vit(qkv_bias=False),
    "HF ViT, no head": vit("ViTModel"),
    "HF ViT, gray": vit(num_channels=1),
    "HF DeiT, two heads": deit("DeiTForImageClassificationWithTeacher"),
    "HF DeiT, two heads, not square": slow(
        deit("DeiTForImageClassificationWithTeacher", **HF_WIDE)
    ),
    "HF DeiT, one head": deit("DeiTForImageClassification"),
    "HF DeiT, no head": slow(deit("DeiTModel")),
    "HF SigLIP": siglip(),
    "HF SigLIP, odd": slow(siglip(**HF_SEVEN)),
    "HF SigLIP, no pooling": siglip(vision_use_head=False),
    "HF SigLIP, classifier": siglip("SiglipForImageClassification"),
    "HF DINOv2": slow(dino()),
    "HF DINOv2, odd": dino(**HF_SEVEN),
    "HF DINOv2, swiglu": dino(use_swiglu_ffn=True),
    "HF DINOv2, classifier": slow(dino("Dinov2ForImageClassification")),
    "HF DINOv2, registers": dino("Dinov2WithRegistersModel", num_register_tokens=3),
    "HF DINOv2, registers, classifier": dino(
        "Dinov2WithRegistersForImageClassification"
    ),
    "HF ViT, ours": Case(form="Hugging Face ViT", ours=TINY),
    "HF DeiT, ours": Case(form="Hugging Face DeiT", ours=TINY.clone(registers=1)),
    "HF SigLIP, ours": Case(
        form="Hugging Face SigLIP tower", ours=PROBE.clone(head=None), config=TOWER
    ),
    "HF SigLIP, with text, ours": Case(
        form="Hugging Face SigLIP", ours=PROBE.clone(head=None)
    ),
    "HF DINOv2, ours": Case(form="Hugging Face DINOv2", ours=SCALED),
    "HF DINOv2, registers, ours": Case(
        form="Hugging Face DINOv2 with registers", ours=SCALED.clone(registers=2)
    ),
}

EXACT = {"activation": Activation.GELU_ERF, "norm_epsilon": 1e-12}
BOTH = Pooling.CLASS_TOKEN_AND_AVERAGE
GREY = (127.5,) * 4


def _ours(
    size: Size = (24, 24), *, channels: int = 3, returns: bool = True, **fields: Any
) -> Ours:
    sizes = {"width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 32, "patch_size": 8}
    return Ours(
        library=Library.HUGGINGFACE,
        model=ViT(**{**sizes, **TOKEN, "head": HEAD, **fields}),
        size=size,
        channels=channels,
        returns=returns,
    )


OURS = {
    "HF ViT": slow(_ours()),
    "HF ViT, exact": slow(_ours(**EXACT)),
    "HF ViT, sines": _ours(returns=False, positions=Positions.SINCOS),
    "HF ViT, no positions": slow(_ours(returns=False, positions=Positions.NONE)),
    "HF ViT, no biases": slow(_ours(qkv_bias=False)),
    "HF ViT, no head": _ours(**NO_HEAD),
    "HF ViT, not square": _ours((16, 40)),
    "HF ViT, four channels": _ours(channels=4, mean=GREY, std=GREY),
    "HF DeiT, two heads": _ours(distillation_token=True),
    "HF DeiT, two heads, not square": slow(_ours((16, 40), distillation_token=True)),
    "HF DeiT, no head": slow(_ours(distillation_token=True, **NO_HEAD)),
    "HF DeiT, one head": _ours(registers=1),
    "HF SigLIP": _ours(pooling=Pooling.ATTENTION, **NO_HEAD),
    "HF SigLIP, sines": slow(
        _ours(
            returns=False,
            pooling=Pooling.ATTENTION,
            positions=Positions.SINCOS,
            **NO_HEAD,
        )
    ),
    "HF SigLIP, average": slow(_ours(pooling=Pooling.AVERAGE, **NO_HEAD)),
    "HF SigLIP, classifier": _ours(pooling=Pooling.AVERAGE),
    "HF SigLIP, classifier, sines": slow(
        _ours(returns=False, pooling=Pooling.AVERAGE, positions=Positions.SINCOS)
    ),
    "HF SigLIP, classifier, four channels": slow(
        _ours(channels=4, pooling=Pooling.AVERAGE, mean=GREY, std=GREY)
    ),
    "HF DINOv2": slow(_ours(layer_scale=0.3, **NO_HEAD)),
    "HF DINOv2, exact": slow(_ours(layer_scale=0.3, **NO_HEAD, **EXACT)),
    "HF DINOv2, classifier": _ours(layer_scale=0.3),
    "HF DINOv2, swiglu": _ours(layer_scale=1.0, activation=Activation.SWIGLU),
    "HF DINOv2, registers": slow(_ours(layer_scale=0.3, registers=2, **NO_HEAD)),
    "HF DINOv2, registers, four channels": slow(
        _ours(
            channels=4,
            layer_scale=0.3,
            registers=2,
            **NO_HEAD,
            mean=GREY,
            std=GREY,
        )
    ),
    "HF DINOv2, registers, classifier": slow(_ours(layer_scale=0.3, registers=2)),
    "HF DINOv2, mean": slow(_ours(layer_scale=0.3, pooling=BOTH)),
    "HF DINOv2, registers, mean": _ours(layer_scale=0.3, registers=2, pooling=BOTH),
}
