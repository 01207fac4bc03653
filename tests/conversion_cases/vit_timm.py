"""ViTs of timm."""

import functools
from typing import Any

from big_vision_lite.conversion.formats import Library
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.blocks.pooling import FinalNorm, Pooling
from big_vision_lite.models.vit import ViT
from conversion_cases.case import CLASSES, HEAD, TOKEN, Case, Ours, Size, side, slow
from conversion_cases.vit_archives import TINY

TINY_VIT = dict(embed_dim=32, depth=3, num_heads=4, num_classes=CLASSES)
SQUARE = dict(img_size=48, patch_size=8)
SEVEN = dict(img_size=35, patch_size=7)
WIDE = dict(img_size=(16, 40), patch_size=8)
LARGE = dict(img_size=224, patch_size=16)
TINY_NAME = "vit_tiny_patch16_224"


def timm_vit(name: str, **arguments: Any) -> Any:
    import timm

    return timm.create_model(name, pretrained=False, **arguments)


def _named(name: str, form: str = "timm ViT", **arguments: Any) -> Case:
    given = {**TINY_VIT, **arguments}
    return Case(
        form=form,
        build=functools.partial(timm_vit, name, **given),
        config={"architecture": name, "model_args": given},
        sizes=(side(arguments["img_size"]),),
        goes_by_name=True,
    )


UNREAD = "timm ViT, class token unread"
_unread = functools.partial(_named, form=UNREAD)
# In a second block, a bias that the first has not is left over.
TINY_OF_TIMM = TINY.clone(depth=2, activation=Activation.GELU_ERF)
NUM_HEADS = {"model_args": {"num_heads": 2}}
CASES = {
    "timm ViT, token, odd": _named(TINY_NAME, **SEVEN),
    "timm ViT, token, 224": slow(_named(TINY_NAME, **LARGE)),
    "timm ViT, token, not square": slow(_named(TINY_NAME, **WIDE)),
    "timm ViT, token, tanh": slow(_named(TINY_NAME, **SQUARE, act_layer="gelu_tanh")),
    "timm ViT, token, no position": _named(
        TINY_NAME, **SQUARE, pos_embed="none", reg_tokens=2
    ),
    "timm ViT, token, class without position": slow(
        _named(TINY_NAME, **SEVEN, no_embed_class=True)
    ),
    "timm ViT, token, norm after pooling": slow(
        _named(TINY_NAME, **SEVEN, fc_norm=True)
    ),
    "timm ViT, token, no head": slow(_named(TINY_NAME, **SQUARE, num_classes=0)),
    "timm ViT, token, gray": _named(TINY_NAME, **SQUARE, in_chans=1),
    "timm ViT, qk norm": _named(TINY_NAME, **SQUARE, qk_norm=True),
    "timm ViT, average, class token unread": slow(
        _unread(TINY_NAME, **WIDE, global_pool="avg")
    ),
    "timm ViT, average, class token and registers unread": _unread(
        TINY_NAME, **SEVEN, global_pool="avg", reg_tokens=3, fc_norm=False
    ),
    "timm ViT, average, norm after pooling": slow(
        _named(TINY_NAME, **SEVEN, global_pool="avg", class_token=False)
    ),
    "timm ViT, average, gap": slow(_named("vit_medium_patch16_gap_240", **WIDE)),
    "timm ViT, average, gap with registers": slow(
        _named("vit_medium_patch16_reg4_gap_256", **SQUARE)
    ),
    "timm ViT, average, positions of registers": _named(
        "vit_so150m2_patch16_reg1_gap_256", **WIDE
    ),
    "timm ViT, attention, siglip": slow(_named("vit_base_patch16_siglip_224", **LARGE)),
    "timm ViT, attention, siglip tanh": _named("vit_so400m_patch16_siglip_256", **WIDE),
    "timm ViT, attention, registers": slow(
        _named("vit_so150m_patch16_reg4_map_256", **SEVEN)
    ),
    "timm ViT, deit": slow(_named("deit_tiny_patch16_224", **SEVEN)),
    "timm ViT, deit distilled": _named("deit_tiny_distilled_patch16_224", **WIDE),
    "timm ViT, deit distilled, odd": slow(
        _named("deit_tiny_distilled_patch16_224", **SEVEN)
    ),
    "timm ViT, deit distilled, no head": slow(
        _named("deit_tiny_distilled_patch16_224", **SQUARE, num_classes=0)
    ),
    "timm ViT, deit3": _named("deit3_small_patch16_224", **LARGE),
    "timm ViT, dinov2": slow(_named("vit_small_patch14_dinov2", **SEVEN)),
    "timm ViT, dinov2 registers": slow(_named("vit_small_patch14_reg4_dinov2", **WIDE)),
    "timm ViT, dinov2 giant": slow(_named("vit_giant_patch14_dinov2", **SEVEN)),
    "timm ViT, dinov2 giant registers": _named("vit_giant_patch14_reg4_dinov2", **WIDE),
    "timm ViT, flexivit": slow(_named("flexivit_small", **SEVEN)),
    "timm ViT, ours": Case(
        form="timm ViT",
        ours=TINY_OF_TIMM.clone(registers=1, qk_norm=True),
        config=NUM_HEADS,
    ),
    "timm ViT, class token unread, ours": Case(
        form=UNREAD,
        ours=TINY_OF_TIMM.clone(
            pooling=Pooling.AVERAGE, registers=1, final_norm=FinalNorm.POOLED
        ),
        config=NUM_HEADS,
    ),
}

SMALL = dict(width=32, depth=2, mlp_dim=64, num_heads=4, patch_size=8, head=HEAD)


def _to_timm(size: Size = (24, 24), *, returns: bool = True, **fields: Any) -> Ours:
    model = ViT(**{**SMALL, **fields})
    return Ours(library=Library.TIMM, model=model, size=size, returns=returns)


OURS = {
    "timm ViT": _to_timm(),
    "timm ViT, no positions": _to_timm(
        pooling=Pooling.CLASS_TOKEN, positions=Positions.NONE
    ),
    "timm ViT, attention": _to_timm(
        pooling=Pooling.ATTENTION, positions=Positions.LEARNED, registers=2
    ),
    "timm ViT, exact": slow(
        _to_timm(mlp_dim=43, activation=Activation.GELU_ERF, qk_norm=True)
    ),
    "timm ViT, pooled norm": _to_timm(
        final_norm=FinalNorm.POOLED, layer_scale=0.1, qkv_bias=False
    ),
    "timm ViT, swiglu": _to_timm(mlp_dim=43, activation=Activation.SWIGLU),
    "timm ViT, wide": slow(_to_timm(width=512, num_heads=8, depth=1)),
    "timm ViT, not square": slow(_to_timm((16, 40), **TOKEN)),
    # Stored for patches of 8 px and a grid of 5x5; goes at the size it is exported for.
    "timm ViT, flexivit": _to_timm(
        (36, 48),
        **TOKEN,
        patch_size=12,
        kernel_patch_size=8,
        position_grid=(5, 5),
        returns=False,
    ),
}
