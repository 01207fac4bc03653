"""Hybrids: 32 wide, two blocks, a grid of ceil(side / 8) cells a side."""

import functools
from typing import Any

from big_vision_lite.conversion.formats import Library
from big_vision_lite.models.vit_variants import hybrid
from conversion_cases.bit import TINY_TRUNK, TORCH_FORM, TORCH_TRUNK
from conversion_cases.case import (
    CLASSES,
    EVEN,
    HEAD,
    NOT_SQUARE,
    ODD,
    Case,
    Ours,
    Size,
    slow,
)
from conversion_cases.vit_archives import TINY
from conversion_cases.vit_timm import NUM_HEADS, TINY_OF_TIMM


def timm_hybrid(size: Size = EVEN, *, same: bool = True, **arguments: Any) -> Any:
    from timm.layers import HybridEmbed, StdConv2d
    from timm.layers.std_conv import StdConv2dSame
    from timm.models.resnetv2 import ResNetV2
    from timm.models.vision_transformer import VisionTransformer

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


def _hybrid(size: Size = EVEN, **more: Any) -> Case:
    return Case(
        form="timm hybrid ViT",
        build=functools.partial(timm_hybrid, size, no_embed_class=True, **more),
        config=hybrid_config(size, **more),
        sizes=(size,),
    )


CASES = {
    "timm hybrid, token": _hybrid(),
    "timm hybrid, token, odd": slow(_hybrid(ODD)),
    "timm hybrid, token, not square": slow(_hybrid(NOT_SQUARE)),
    "timm hybrid, average": slow(_hybrid(global_pool="avg", class_token=False)),
    "timm hybrid, attention": slow(_hybrid(global_pool="map", class_token=False)),
    "timm hybrid, attention, odd": _hybrid(ODD, global_pool="map", class_token=False),
    "timm hybrid, ours": Case(
        form="timm hybrid ViT",
        ours=TINY_OF_TIMM.clone(patch_size=1, stem=TORCH_TRUNK),
        config=NUM_HEADS,
    ),
    "npz of vision_transformer, hybrid": Case(
        form="vision_transformer hybrid ViT (npz)",
        ours=TINY.clone(patch_size=1, stem=TINY_TRUNK),
        config={},
    ),
}


def _ours(name: str, size: Size) -> Ours:
    """Returns a hybrid with the trunk of a published one and a small transformer."""
    plain = dict(width=32, depth=2, num_heads=2, mlp_dim=128, head=HEAD)
    trunk = dict(
        standardisation=TORCH_FORM["standardisation"],
        trunk_norm_epsilon=TORCH_FORM["norm_epsilon"],
    )
    return Ours(library=Library.TIMM, model=hybrid(name, **plain, **trunk), size=size)


OURS = {
    "timm hybrid, R+Ti/16": _ours("R+Ti/16", (64, 96)),
    "timm hybrid, R26+S/32": slow(_ours("R26+S/32", (96, 64))),
}
