"""Tiny models of other libraries, ours that go there, and both sides' outputs.

What tests/conversion/ compares; needs torch, timm, torchvision and transformers.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch_libraries
from foreign_models import randomise, relative_difference

from big_vision_lite.conversion import export, files, foreign, formats, preprocessing
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.bit import BiT, Block
from big_vision_lite.models.bit_v1 import BiTV1, Standardisation, Trunk
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import FinalNorm, Pooling
from big_vision_lite.models.mixer import MlpMixer
from big_vision_lite.models.resnet import ResNet
from big_vision_lite.models.vit import ViT
from big_vision_lite.models.vit_variants import hybrid
from big_vision_lite.training import state as state_lib

torch_libraries.import_torchvision()
import parity  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402
from timm.layers import GroupNormAct, HybridEmbed, StdConv2d  # noqa: E402
from timm.layers.std_conv import StdConv2dSame  # noqa: E402
from timm.models.mlp_mixer import MlpMixer as TheirMixer  # noqa: E402
from timm.models.resnetv2 import ResNetV2  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torchvision.models.resnet import BasicBlock, Bottleneck  # noqa: E402

BOUND = 1e-5  # max |difference| / max |value|, float32 on the CPU
CLASSES = 7
HEAD = Classifier(num_classes=CLASSES)
# Of convolutional networks: even at every stride, odd at every stride, and neither
# square nor of one kind.
EVEN, ODD, NOT_SQUARE = (64, 64), (65, 65), (48, 82)
TORCH_FORM = dict(standardisation=Standardisation.INSIDE_ROOT, norm_epsilon=1e-5)
Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A model of another library that comes in.

    `build()` makes it, `config` is the config.json beside it, None for that of
    save_pretrained. `form` is the format it is known by. At `sizes` it is compared, by
    default at the first. `goes_by_name` says that the library builds it by a name.
    """

    form: str
    build: Callable[[], Any]
    config: Mapping[str, Any] | None = None
    sizes: tuple[Size, ...] = (EVEN,)
    goes_by_name: bool = False


@dataclasses.dataclass(frozen=True)
class Ours:
    """A model of ours that goes out.

    `returns` says that what users load is read back as it was: not with fixed positions
    where they come back as the table that they are, nor with channels that no file has.
    """

    library: Library
    model: Any
    size: Size = EVEN
    channels: int = 3
    returns: bool = True


# ResNet


def timm_resnet(name: str = "resnet50", **arguments: Any) -> Any:
    narrow = dict(layers=(2, 1, 1, 2), channels=(8, 16, 32, 64), num_classes=CLASSES)
    return timm.create_model(name, **{**narrow, **arguments})


def torchvision_resnet(
    block: Any = Bottleneck, layers: Any = (1, 2, 1, 1), **more: Any
) -> Any:
    return torchvision.models.ResNet(block, list(layers), num_classes=CLASSES, **more)


def huggingface_resnet(
    kind: Any = transformers.ResNetForImageClassification, **arguments: Any
) -> Any:
    narrow = dict(
        embedding_size=8, hidden_sizes=[16, 32, 64], depths=[2, 1, 2], num_labels=7
    )
    return kind(transformers.ResNetConfig(**{**narrow, **arguments}))


def _resnet(
    library: str, build: Callable[..., Any], *given: Any, **more: Any
) -> Theirs:
    sizes = more.pop("sizes", (ODD,))
    config: Any = {"architecture": "resnet50"} if library == "timm" else {}
    return Theirs(
        f"{library} ResNet",
        functools.partial(build, *given, **more),
        None if library == "Hugging Face" else config,
        sizes,
    )


ALL = (ODD, EVEN, NOT_SQUARE)
RESNETS = {
    "timm ResNet, bottleneck": _resnet("timm", timm_resnet),
    "timm ResNet, basic": _resnet("timm", timm_resnet, "resnet18", sizes=ALL),
    # As wide as the stem: the first unit has no projection.
    "timm ResNet, basic, 64": _resnet(
        "timm", timm_resnet, "resnet18", channels=(64, 128, 256, 512)
    ),
    "timm ResNet, groups": _resnet(
        "timm", timm_resnet, cardinality=4, base_width=32, sizes=ALL
    ),
    # Rounded down: 24 * 36 / 64 = 13.5.
    "timm ResNet, groups of a part": _resnet(
        "timm", timm_resnet, channels=(24, 48, 96, 192), cardinality=2, base_width=36
    ),
    "timm ResNet, wide": _resnet("timm", timm_resnet, base_width=128),
    "timm ResNet, no head": _resnet("timm", timm_resnet, num_classes=0),
    "timm ResNet, gray": _resnet("timm", timm_resnet, in_chans=1),
    "torchvision ResNet, basic": _resnet("torchvision", torchvision_resnet, BasicBlock),
    "torchvision ResNet, bottleneck": _resnet("torchvision", torchvision_resnet),
    "torchvision ResNet, groups": _resnet(
        "torchvision", torchvision_resnet, groups=32, width_per_group=4, sizes=ALL
    ),
    "torchvision ResNet, wide": _resnet(
        "torchvision", torchvision_resnet, width_per_group=128
    ),
    "HF ResNet, bottleneck": _resnet("Hugging Face", huggingface_resnet),
    "HF ResNet, basic": _resnet(
        "Hugging Face", huggingface_resnet, layer_type="basic", sizes=ALL
    ),
    "HF ResNet, gray": _resnet("Hugging Face", huggingface_resnet, num_channels=1),
    "HF ResNet, no head": dataclasses.replace(
        _resnet("Hugging Face", huggingface_resnet, transformers.ResNetModel),
        form="Hugging Face ResNet without a head",
    ),
}

# BiT


def timm_bit(
    *,
    epsilon: float = 1e-8,
    norm_epsilon: float = 1e-5,
    v1: bool = False,
    same: bool | None = None,
    **arguments: Any,
) -> Any:
    """Builds ResNetV2 with two stages; `same` is TensorFlow's padding."""
    same = v1 if same is None else same
    conv = StdConv2dSame if same else StdConv2d
    plain = dict(
        layers=(1, 2),
        channels=(128, 256),
        stem_chs=32,
        num_classes=CLASSES,
        preact=not v1,
        stem_type="same" if same else "fixed",
    )
    return ResNetV2(
        **{**plain, **arguments},
        conv_layer=functools.partial(conv, eps=epsilon),
        norm_layer=functools.partial(GroupNormAct, num_groups=32, eps=norm_epsilon),
    )


def huggingface_bit(*, layer_type: str = "preactivation", **arguments: Any) -> Any:
    v1 = layer_type == "bottleneck"
    plain = dict(
        embedding_size=32,
        hidden_sizes=(128, 256),
        depths=(1, 2),
        num_labels=CLASSES,
        layer_type=layer_type,
        global_padding="same" if v1 else None,
        embedding_dynamic_padding=v1,
    )
    config = transformers.BitConfig(**{**plain, **arguments})
    return transformers.BitForImageClassification(config)


NAMED_BIT = {"architecture": "resnetv2_50x1_bit"}
V1_CONFIG = {"model_args": {"stem_type": "same"}}
BASIC = dict(basic=True, bottle_ratio=1.0, channels=(32, 64))


def _bit(config: Any, sizes: Any = ALL, form: str = "timm BiT", **more: Any) -> Theirs:
    return Theirs(form, functools.partial(timm_bit, **more), config, sizes)


def _bit_of_huggingface(form: str = "Hugging Face BiT", **more: Any) -> Theirs:
    return Theirs(form, functools.partial(huggingface_bit, **more), None, ALL)


BITS = {
    "timm BiT, zeros": _bit(NAMED_BIT),
    "timm BiT, zeros assumed": _bit({}),
    "timm BiT, negative infinity": _bit(
        {"model_args": {"stem_type": ""}}, stem_type=""
    ),
    "timm BiT, basic": _bit(NAMED_BIT, **BASIC),
    "timm BiT, no head": _bit(NAMED_BIT, num_classes=0),
    "timm BiT, gray": _bit(NAMED_BIT, in_chans=1),
    "timm BiT, norms after convolutions": _bit(
        V1_CONFIG, form="timm ResNetV2, norms after convolutions", v1=True
    ),
    "HF BiT, preactivation": _bit_of_huggingface(),
    "HF BiT, bottleneck": _bit_of_huggingface(
        "Hugging Face BiT, norms after convolutions", layer_type="bottleneck"
    ),
    "HF BiT, groups": _bit_of_huggingface(num_groups=8),
    "HF BiT, gray": _bit_of_huggingface(num_channels=1),
}

# Hybrids: 32 wide, two blocks, a grid of ceil(side / 8) cells a side


def timm_hybrid(size: Size = EVEN, *, same: bool = True, **arguments: Any) -> Any:
    conv = functools.partial(StdConv2dSame if same else StdConv2d, eps=1e-8)
    backbone = ResNetV2(
        layers=(1, 2),
        channels=(128, 256),
        stem_chs=32,
        num_classes=0,
        global_pool="",
        preact=False,
        stem_type="same" if same else "fixed",
        conv_layer=conv,
    )
    return VisionTransformer(
        img_size=size,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=CLASSES,
        patch_size=1,
        embed_layer=functools.partial(HybridEmbed, backbone=backbone),
        act_layer="gelu_tanh",
        **arguments,
    )


def hybrid_config(size: Size = EVEN, **arguments: Any) -> dict[str, Any]:
    # As timm writes them: in pixels.
    told = {"img_size": list(size), "num_heads": 2, "act_layer": "gelu_tanh"}
    return {"architecture": "vit_small_r26_s32_224", "model_args": told | arguments}


def _hybrid(size: Size = EVEN, **more: Any) -> Theirs:
    build = functools.partial(timm_hybrid, size, no_embed_class=True, **more)
    return Theirs("timm hybrid ViT", build, hybrid_config(size, **more), (size,))


HYBRIDS = {
    "timm hybrid, token": _hybrid(),
    "timm hybrid, token, odd": _hybrid(ODD),
    "timm hybrid, token, not square": _hybrid(NOT_SQUARE),
    "timm hybrid, average": _hybrid(global_pool="avg", class_token=False),
    "timm hybrid, attention": _hybrid(global_pool="map", class_token=False),
    "timm hybrid, attention, odd": _hybrid(ODD, global_pool="map", class_token=False),
}

# MLP-Mixer: timm's own names fix width and depth, so that tiny ones go by its class

MIXER_SIZES: dict[str, dict[str, Any]] = {
    "224": dict(img_size=224, patch_size=32),
    "odd": dict(img_size=35, patch_size=7),
    "not square": dict(img_size=(16, 40), patch_size=8),
    "no head": dict(img_size=35, patch_size=7, num_classes=0),
    "gray": dict(img_size=35, patch_size=7, in_chans=1),
}


def timm_mixer(**arguments: Any) -> Any:
    tiny = dict(embed_dim=32, num_blocks=3, num_classes=CLASSES)
    return TheirMixer(**{**tiny, **arguments})


def _side(size: Any) -> Size:
    return (size, size) if isinstance(size, int) else tuple(size)


MIXERS = {
    f"timm mixer, {name}": Theirs(
        "timm MLP-Mixer",
        functools.partial(timm_mixer, **arguments),
        {"model_args": {"img_size": list(_side(arguments["img_size"]))}},
        (_side(arguments["img_size"]),),
    )
    for name, arguments in MIXER_SIZES.items()
}

# ViTs of timm

TINY_VIT = dict(embed_dim=32, depth=3, num_heads=4, num_classes=CLASSES)
SQUARE = dict(img_size=48, patch_size=8)
SEVEN = dict(img_size=35, patch_size=7)
WIDE = dict(img_size=(16, 40), patch_size=8)
LARGE = dict(img_size=224, patch_size=16)
TINY_NAME = "vit_tiny_patch16_224"
TIMM_VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "token, odd": (TINY_NAME, SEVEN),
    "token, 224": (TINY_NAME, LARGE),
    "token, not square": (TINY_NAME, WIDE),
    "token, tanh": (TINY_NAME, SQUARE | dict(act_layer="gelu_tanh")),
    "token, no position": (TINY_NAME, SQUARE | dict(pos_embed="none", reg_tokens=2)),
    "token, class without position": (TINY_NAME, SEVEN | dict(no_embed_class=True)),
    "token, norm after pooling": (TINY_NAME, SEVEN | dict(fc_norm=True)),
    "token, no head": (TINY_NAME, SQUARE | dict(num_classes=0)),
    "token, gray": (TINY_NAME, SQUARE | dict(in_chans=1)),
    "qk norm": (TINY_NAME, SQUARE | dict(qk_norm=True)),
    "average, class token unread": (TINY_NAME, WIDE | dict(global_pool="avg")),
    "average, class token and registers unread": (
        TINY_NAME,
        SEVEN | dict(global_pool="avg", reg_tokens=3, fc_norm=False),
    ),
    "average, norm after pooling": (
        TINY_NAME,
        SEVEN | dict(global_pool="avg", class_token=False),
    ),
    "average, gap": ("vit_medium_patch16_gap_240", WIDE),
    "average, gap with registers": ("vit_medium_patch16_reg4_gap_256", SQUARE),
    "average, positions of registers": ("vit_so150m2_patch16_reg1_gap_256", WIDE),
    "attention, siglip": ("vit_base_patch16_siglip_224", LARGE),
    "attention, siglip tanh": ("vit_so400m_patch16_siglip_256", WIDE),
    "attention, registers": ("vit_so150m_patch16_reg4_map_256", SEVEN),
    "deit": ("deit_tiny_patch16_224", SEVEN),
    "deit distilled": ("deit_tiny_distilled_patch16_224", WIDE),
    "deit distilled, odd": ("deit_tiny_distilled_patch16_224", SEVEN),
    "deit distilled, no head": (
        "deit_tiny_distilled_patch16_224",
        SQUARE | dict(num_classes=0),
    ),
    "deit3": ("deit3_small_patch16_224", LARGE),
    "dinov2": ("vit_small_patch14_dinov2", SEVEN),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", WIDE),
    "dinov2 giant": ("vit_giant_patch14_dinov2", SEVEN),
    "dinov2 giant registers": ("vit_giant_patch14_reg4_dinov2", WIDE),
    "flexivit": ("flexivit_small", SEVEN),
}


def _timm_vit(name: str, arguments: Mapping[str, Any], form: str) -> Theirs:
    given = {**TINY_VIT, **arguments}
    return Theirs(
        form,
        functools.partial(timm.create_model, name, pretrained=False, **given),
        {"architecture": name, "model_args": given},
        (_side(arguments["img_size"]),),
        goes_by_name=True,
    )


TIMMS = {
    f"timm ViT, {case}": _timm_vit(
        *given, "timm ViT" + (", class token unread" if "unread" in case else "")
    )
    for case, given in TIMM_VITS.items()
}

# ViTs of torchvision

TINY_TORCHVISION = dict(
    num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=CLASSES
)
TORCHVISION_VITS: dict[str, dict[str, Any]] = {
    "odd": dict(image_size=35, patch_size=7),
    "224": dict(image_size=224, patch_size=16),
    "representation": dict(image_size=24, patch_size=8, representation_size=20),
}


def torchvision_vit(**arguments: Any) -> Any:
    return torchvision.models.VisionTransformer(**{**TINY_TORCHVISION, **arguments})


TORCHVISIONS = {
    f"torchvision ViT, {name}": Theirs(
        "torchvision ViT",
        functools.partial(torchvision_vit, **arguments),
        {"builder": "VisionTransformer", "arguments": TINY_TORCHVISION},
        (_side(arguments["image_size"]),),
        goes_by_name=True,
    )
    for name, arguments in TORCHVISION_VITS.items()
}

# ViTs of Hugging Face

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
    made = getattr(transformers, config)(**arguments)
    return getattr(transformers, kind)(made)


def vit(kind: str = "ViTForImageClassification", **more: Any) -> Theirs:
    return _huggingface("ViT", kind, "ViTConfig", {**TINY_HF, **more})


def deit(kind: str, **more: Any) -> Theirs:
    return _huggingface("DeiT", kind, "DeiTConfig", {**TINY_HF, **more})


def siglip(kind: str = "SiglipVisionModel", **more: Any) -> Theirs:
    tower = {**TINY_HF, **more}
    if kind == "SiglipVisionModel":
        return _huggingface("SigLIP tower", kind, "SiglipVisionConfig", tower)
    both = {"vision_config": tower, "text_config": TEXT}
    return _huggingface("SigLIP", kind, "SiglipConfig", both)


def dino(kind: str = "Dinov2Model", **more: Any) -> Theirs:
    given = {**TINY_DINO, **more}
    if "Registers" not in kind:
        return _huggingface("DINOv2", kind, "Dinov2Config", given)
    config = "Dinov2WithRegistersConfig"
    return _huggingface("DINOv2 with registers", kind, config, given)


def _huggingface(form: str, kind: str, config: str, given: Any) -> Theirs:
    labels = {} if config == "SiglipVisionConfig" else {"id2label": LABELS}
    build = functools.partial(huggingface_vit, kind, config, **given, **labels)
    size = _side(given.get("vision_config", given)["image_size"])
    return Theirs(f"Hugging Face {form}", build, None, (size,))


HUGGINGFACES = {
    "HF ViT": vit(),
    "HF ViT, odd": vit(**HF_SEVEN),
    "HF ViT, not square": vit(**HF_WIDE),
    "HF ViT, tanh": vit(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
    "HF ViT, new": vit(hidden_act="gelu_new"),
    "HF ViT, no biases": vit(qkv_bias=False),
    "HF ViT, no head": vit("ViTModel"),
    "HF ViT, gray": vit(num_channels=1),
    "HF DeiT, two heads": deit("DeiTForImageClassificationWithTeacher"),
    "HF DeiT, two heads, not square": deit(
        "DeiTForImageClassificationWithTeacher", **HF_WIDE
    ),
    "HF DeiT, one head": deit("DeiTForImageClassification"),
    "HF DeiT, no head": deit("DeiTModel"),
    "HF SigLIP": siglip(),
    "HF SigLIP, odd": siglip(**HF_SEVEN),
    "HF SigLIP, no pooling": siglip(vision_use_head=False),
    "HF SigLIP, classifier": siglip("SiglipForImageClassification"),
    "HF SigLIP, with text": siglip("SiglipModel"),
    "HF DINOv2": dino(),
    "HF DINOv2, odd": dino(**HF_SEVEN),
    "HF DINOv2, swiglu": dino(use_swiglu_ffn=True),
    "HF DINOv2, classifier": dino("Dinov2ForImageClassification"),
    "HF DINOv2, registers": dino("Dinov2WithRegistersModel", num_register_tokens=3),
    "HF DINOv2, registers, classifier": dino(
        "Dinov2WithRegistersForImageClassification"
    ),
}

THEIRS = {
    **RESNETS,
    **BITS,
    **HYBRIDS,
    **MIXERS,
    **TIMMS,
    **TORCHVISIONS,
    **HUGGINGFACES,
}
# What by default runs as theirs, one of each way in which a format differs; all others
# are slow.
FEW_THEIRS = (
    *(
        "timm ResNet, groups",
        "timm ResNet, groups of a part",
        "torchvision ResNet, basic",
    ),
    *("timm ResNet, no head", "HF ResNet, bottleneck", "HF ResNet, no head"),
    *("timm BiT, zeros", "timm BiT, negative infinity", "timm BiT, basic"),
    *("timm BiT, norms after convolutions", "HF BiT, preactivation"),
    *("HF BiT, bottleneck", "timm hybrid, token", "timm hybrid, attention, odd"),
    *("timm mixer, odd", "timm mixer, not square", "timm mixer, no head"),
    *("timm ViT, token, odd", "timm ViT, token, gray", "timm ViT, token, no position"),
    *("timm ViT, average, class token and registers unread", "timm ViT, qk norm"),
    *("timm ViT, average, positions of registers", "timm ViT, attention, siglip tanh"),
    *(
        "timm ViT, deit distilled",
        "timm ViT, deit3",
        "timm ViT, dinov2 giant registers",
    ),
    *("torchvision ViT, odd", "torchvision ViT, representation"),
    *("HF ViT", "HF ViT, not square", "HF ViT, tanh", "HF ViT, no biases"),
    *("HF ViT, no head", "HF ViT, gray", "HF DeiT, two heads", "HF DeiT, one head"),
    *("HF SigLIP", "HF SigLIP, no pooling", "HF SigLIP, classifier"),
    *("HF SigLIP, with text", "HF DINOv2, odd", "HF DINOv2, swiglu"),
    *("HF DINOv2, registers", "HF DINOv2, registers, classifier"),
)

# Ours

NARROW = dict(stages=(1, 1, 1, 1), width=8, head=HEAD)
SMALL = dict(width=32, depth=2, mlp_dim=64, num_heads=4, patch_size=8, head=HEAD)
TOKEN = dict(pooling=Pooling.CLASS_TOKEN, positions=Positions.LEARNED)
EXACT = {"activation": Activation.GELU_ERF, "norm_epsilon": 1e-12}
BOTH = Pooling.CLASS_TOKEN_AND_AVERAGE
GREY = (127.5,) * 4


def to_timm(size: Size = (24, 24), **fields: Any) -> Ours:
    return Ours(Library.TIMM, ViT(**{**SMALL, **fields}), size)


def to_huggingface(
    size: Size = (24, 24), channels: int = 3, returns: bool = True, **fields: Any
) -> Ours:
    sizes = {"width": 16, "depth": 3, "num_heads": 2, "mlp_dim": 32, "patch_size": 8}
    model = ViT(**{**sizes, **TOKEN, "head": HEAD, **fields})
    return Ours(Library.HUGGINGFACE, model, size, channels, returns)


def small_hybrid(name: str, size: Size) -> Ours:
    """Returns a hybrid with the trunk of a published one and a small transformer."""
    plain = dict(width=32, depth=2, num_heads=2, mlp_dim=128, head=HEAD)
    form = Standardisation.INSIDE_ROOT
    model = hybrid(name, **plain, standardisation=form, trunk_norm_epsilon=1e-5)
    return Ours(Library.TIMM, model, size)


NO_HEAD: dict[str, Any] = {"head": None}
OURS = {
    "timm ResNet": Ours(Library.TIMM, ResNet(**NARROW, groups=2, width_per_group=64)),
    "timm ResNet, basic": Ours(Library.TIMM, ResNet(**NARROW, block=Block.BASIC)),
    "timm ResNet, published": Ours(Library.TIMM, ResNet.of("R18")),
    "torchvision ResNet": Ours(Library.TORCHVISION, ResNet.of("R18", head=HEAD)),
    "HF ResNet": Ours(
        Library.HUGGINGFACE, ResNet(**{**NARROW, "stages": (2, 1)}, stem_width=16)
    ),
    "HF ResNet, no head": Ours(
        Library.HUGGINGFACE, ResNet(**{**NARROW, **NO_HEAD}, block=Block.BASIC)
    ),
    "HF ResNet, gray": Ours(Library.HUGGINGFACE, ResNet(**NARROW), channels=1),
    "timm BiT, two stages": Ours(Library.TIMM, BiT(stages=(3, 4), width=32, head=HEAD)),
    "timm BiT, two stages of 152 layers": Ours(
        Library.TIMM, BiT(stages=(3, 8), width=32)
    ),
    "timm BiT, wide": Ours(Library.TIMM, BiT(stages=(3,), width=96, head=HEAD)),
    "timm BiT, basic": Ours(
        Library.TIMM, BiT(stages=(3, 4), width=32, block=Block.BASIC, head=HEAD)
    ),
    "HF BiT, preactivation": Ours(
        Library.HUGGINGFACE, BiT(stages=(1, 2), width=32, groups=8, head=HEAD)
    ),
    "HF BiT, no head": Ours(Library.HUGGINGFACE, BiT(stages=(2,), width=32)),
    "HF BiT, five stages": Ours(
        Library.HUGGINGFACE, BiT(stages=(1,) * 5, width=8, groups=4), (128, 128)
    ),
    "HF BiT, bottleneck": Ours(
        Library.HUGGINGFACE,
        BiTV1(trunk=Trunk(stages=(1, 2), width=32, groups=8, **TORCH_FORM), head=HEAD),
    ),
    "HF BiT, bottleneck, no head": Ours(
        Library.HUGGINGFACE,
        BiTV1(trunk=Trunk(stages=(1, 1), width=32, **TORCH_FORM)),
    ),
    "timm hybrid, R+Ti/16": small_hybrid("R+Ti/16", (64, 96)),
    "timm hybrid, R26+S/32": small_hybrid("R26+S/32", (96, 64)),
    "timm mixer, S/32": Ours(
        Library.TIMM,
        MlpMixer.of("S/32", head=HEAD, activation=Activation.GELU_ERF),
        (64, 96),
    ),
    "timm ViT": to_timm(),
    "timm ViT, no positions": to_timm(
        pooling=Pooling.CLASS_TOKEN, positions=Positions.NONE
    ),
    "timm ViT, attention": to_timm(
        pooling=Pooling.ATTENTION, positions=Positions.LEARNED, registers=2
    ),
    "timm ViT, exact": to_timm(
        mlp_dim=43, activation=Activation.GELU_ERF, qk_norm=True
    ),
    "timm ViT, pooled norm": to_timm(
        final_norm=FinalNorm.POOLED, layer_scale=0.1, qkv_bias=False
    ),
    "timm ViT, swiglu": to_timm(mlp_dim=43, activation=Activation.SWIGLU),
    "timm ViT, wide": to_timm(width=512, num_heads=8, depth=1),
    "timm ViT, not square": to_timm((16, 40), **TOKEN),
    # Stored for patches of 8 px and a grid of 5x5; goes at the size it is exported for.
    "timm ViT, flexivit": dataclasses.replace(
        to_timm(
            (36, 48),
            **TOKEN,
            patch_size=12,
            kernel_patch_size=8,
            position_grid=(5, 5),
        ),
        returns=False,
    ),
    "HF ViT": to_huggingface(),
    "HF ViT, exact": to_huggingface(**EXACT),
    "HF ViT, sines": to_huggingface(returns=False, positions=Positions.SINCOS),
    "HF ViT, no positions": to_huggingface(returns=False, positions=Positions.NONE),
    "HF ViT, no biases": to_huggingface(qkv_bias=False),
    "HF ViT, no head": to_huggingface(**NO_HEAD),
    "HF ViT, not square": to_huggingface((16, 40)),
    "HF ViT, four channels": to_huggingface(
        channels=4, returns=False, mean=GREY, std=GREY
    ),
    "HF DeiT, two heads": to_huggingface(distillation_token=True),
    "HF DeiT, two heads, not square": to_huggingface((16, 40), distillation_token=True),
    "HF DeiT, no head": to_huggingface(distillation_token=True, **NO_HEAD),
    "HF DeiT, one head": to_huggingface(registers=1),
    "HF SigLIP": to_huggingface(pooling=Pooling.ATTENTION, **NO_HEAD),
    "HF SigLIP, sines": to_huggingface(
        returns=False,
        pooling=Pooling.ATTENTION,
        positions=Positions.SINCOS,
        **NO_HEAD,
    ),
    "HF SigLIP, average": to_huggingface(pooling=Pooling.AVERAGE, **NO_HEAD),
    "HF SigLIP, classifier": to_huggingface(pooling=Pooling.AVERAGE),
    "HF SigLIP, classifier, sines": to_huggingface(
        returns=False, pooling=Pooling.AVERAGE, positions=Positions.SINCOS
    ),
    "HF SigLIP, classifier, four channels": to_huggingface(
        channels=4, returns=False, pooling=Pooling.AVERAGE, mean=GREY, std=GREY
    ),
    "HF DINOv2": to_huggingface(layer_scale=0.3, **NO_HEAD),
    "HF DINOv2, exact": to_huggingface(layer_scale=0.3, **NO_HEAD, **EXACT),
    "HF DINOv2, classifier": to_huggingface(layer_scale=0.3),
    "HF DINOv2, swiglu": to_huggingface(layer_scale=1.0, activation=Activation.SWIGLU),
    "HF DINOv2, registers": to_huggingface(layer_scale=0.3, registers=2, **NO_HEAD),
    "HF DINOv2, registers, four channels": to_huggingface(
        channels=4,
        returns=False,
        layer_scale=0.3,
        registers=2,
        **NO_HEAD,
        mean=GREY,
        std=GREY,
    ),
    "HF DINOv2, registers, classifier": to_huggingface(layer_scale=0.3, registers=2),
    "HF DINOv2, mean": to_huggingface(layer_scale=0.3, pooling=BOTH),
    "HF DINOv2, registers, mean": to_huggingface(
        layer_scale=0.3, registers=2, pooling=BOTH
    ),
}
FEW_OURS = (
    *("timm ResNet", "torchvision ResNet", "HF ResNet", "HF ResNet, no head"),
    *("timm BiT, two stages", "timm BiT, basic", "HF BiT, preactivation"),
    *("HF BiT, bottleneck", "timm hybrid, R+Ti/16", "timm mixer, S/32"),
    *("timm ViT", "timm ViT, attention", "timm ViT, pooled norm", "timm ViT, swiglu"),
    *("timm ViT, flexivit", "timm ViT, no positions", "HF ViT, not square"),
    *("HF ViT, four channels", "HF ViT, sines", "HF ViT, no head"),
    *("HF DeiT, two heads", "HF DeiT, one head", "HF SigLIP", "HF SigLIP, classifier"),
    *("HF DINOv2, registers, mean", "HF DINOv2, swiglu", "HF DINOv2, classifier"),
)


# Both sides


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model of theirs in our terms, and itself."""

    form: Format
    architecture: Architecture
    variables: dict[str, np.ndarray]
    theirs: Any

    @property
    def model(self) -> Any:
        return self.architecture.model


def weights_of(theirs: Any, config: Any = None, path: str = "file") -> Weights:
    """Returns what a module holds, under the names it has in memory."""
    if config is None and isinstance(theirs, transformers.PreTrainedModel):
        config = json.loads(theirs.config.to_json_string())
    arrays = {n: t.detach().numpy().copy() for n, t in theirs.state_dict().items()}
    return Weights(arrays=arrays, path=path, config=config or {})


def read(weights: Weights, size: Size | None = None, theirs: Any = None) -> Imported:
    """Reads weights by what they hold, at a size or that which they fix."""
    form = foreign.recognise(weights)
    architecture = form.architecture(weights)
    size = size or architecture.image_size_px
    assert size is not None
    variables = formats.load(weights, form, architecture, size)
    return Imported(form, architecture, variables, theirs)


def imported(case: str, folder: pathlib.Path, size: Size | None = None) -> Imported:
    """Builds one of THEIRS with random weights, and reads it."""
    made = THEIRS[case]
    torch.manual_seed(0)
    theirs = randomise(made.build(), seed=len(case))
    if made.config is None:
        # Files have other names than modules in memory.
        theirs.save_pretrained(folder)
        return read(files.read(str(folder)), size or made.sizes[0], theirs)
    return read(weights_of(theirs, made.config), size or made.sizes[0], theirs)


def pixels(size: Size, channels: int = 3, seed: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (2, *size, channels), np.uint8)


@functools.cache
def _compiled(model: Any) -> Any:
    return jax.jit(model.apply)


def our_outputs(model: Any, variables: Any, image: np.ndarray) -> dict[str, Any]:
    """Returns our outputs; what `theirs` have as "tokens" is the grid."""
    params, collections = state_lib.split_variables(variables)
    found = _compiled(model)({"params": params, **collections}, image)
    outputs = {name: np.asarray(value) for name, value in found.items()}
    if "grid" in outputs:
        grid = outputs["grid"]
        outputs["tokens"] = grid.reshape(len(grid), -1, grid.shape[-1])
    return outputs


def their_outputs(model: Any, scaled: np.ndarray) -> dict[str, np.ndarray]:
    """Returns "pooled" and, if there is a head, "logits"; "tokens" where they have it.

    `scaled` is [B, H, W, C], as our "image".
    """
    x = torch.from_numpy(np.moveaxis(scaled, -1, 1).astype(np.float32).copy())
    x = x.to(next(model.parameters()).dtype)
    with torch.no_grad():
        if isinstance(model, transformers.PreTrainedModel):
            found = _of_huggingface(model, x)
        elif type(model).__module__.startswith("torchvision"):
            found = _of_torchvision(model, x)
        else:
            found = _of_timm(model, x)
    return {name: value.numpy() for name, value in found.items()}


def _of_timm(model: Any, x: Any) -> dict[str, Any]:
    features = model.forward_features(x)
    if features.ndim == 4:
        found = {"pooled": features.mean((2, 3))}
        return found | ({"logits": model(x)} if model.num_classes else {})
    pooled = model.forward_head(features, pre_logits=True)
    found = {"pooled": pooled, "logits": model.forward_head(features)}
    return found | ({"tokens": features} if isinstance(model, TheirMixer) else {})


def _of_torchvision(model: Any, x: Any) -> dict[str, Any]:
    """Catches what goes into the head: the mean of a map, the first of tokens."""
    is_vit = hasattr(model, "encoder")
    kept: list[Any] = []
    module = model.encoder if is_vit else model.avgpool
    handle = module.register_forward_hook(lambda *given: kept.append(given[2]))
    logits = model(x)
    handle.remove()
    pooled = kept[0][:, 0] if is_vit else kept[0][:, :, 0, 0]
    return {"logits": logits, "pooled": pooled}


def _of_huggingface(model: Any, x: Any) -> dict[str, Any]:
    for name in ("resnet", "bit"):
        if name == model.config.model_type:
            body = getattr(model, name, model)
            found = {"pooled": body(x).pooler_output[:, :, 0, 0]}
            return found if body is model else found | {"logits": model(x).logits}
    tower = model.vision_model if isinstance(model, transformers.SiglipModel) else model
    found = tower(x, output_hidden_states=True)
    if "logits" in found:
        return {"logits": found.logits}
    tokens = found.last_hidden_state
    match type(model).__name__:
        case "SiglipVisionModel" | "SiglipModel":
            pooled = found.pooler_output
            return {
                "pooled": tokens.mean(1) if pooled is None else pooled,
                "tokens": tokens,
            }
        case "DeiTModel":
            return {"pooled": tokens[:, :2].mean(1), "tokens": tokens[:, 2:]}
        case _:
            before = 1 + getattr(model.config, "num_register_tokens", 0)
            return {"pooled": tokens[:, 0], "tokens": tokens[:, before:]}


def worst(
    model: Any, variables: Any, theirs: Any, size: Size = EVEN, channels: int = 3
) -> float:
    """Returns the largest difference of all outputs that both sides have."""
    ours = our_outputs(model, variables, pixels(size, channels))
    expected = their_outputs(theirs, ours["image"])
    names = [name for name in expected if name in ours]
    assert names
    return max(relative_difference(ours[name], expected[name]) for name in names)


def load_strictly(module: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Puts arrays into a torch module: none missing, left over or of another shape."""
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    module.load_state_dict(state, strict=True)
    return module.eval()


def put(ours: Ours, variables: Any, folder: pathlib.Path) -> tuple[Any, Any]:
    """Writes a model as users do; returns what was exported, and theirs of the folder.

    Theirs are loaded strictly.
    """
    if ours.library == Library.TORCHVISION:
        steps = preprocessing.from_torchvision(ours.size)
    else:
        steps = preprocessing.from_big_vision(ours.size)
    exported = export.export(
        *(
            ours.model,
            variables,
            steps,
            ours.channels,
            (),
            None,
            ours.library,
            str(folder),
        )
    )
    export.write(exported, folder)
    if ours.library != Library.HUGGINGFACE:
        return exported, parity.load(exported, folder)
    kind = exported.described["architectures"][0]
    more = {"add_pooling_layer": False} if kind in ("ViTModel", "DeiTModel") else {}
    theirs, report = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, **more
    )
    for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[trouble], report[trouble]
    return exported, theirs.eval()
