"""BiT, ResNets with group norm: timm, Hugging Face, and the papers' archives."""

import dataclasses
import functools
from typing import Any

from big_vision_lite.conversion.formats import Library
from big_vision_lite.models.bit import BiT, Block, PoolPadding
from big_vision_lite.models.bit_v1 import BiTV1, Standardisation, Trunk
from conversion_cases.case import ALL, CLASSES, HEAD, Case, Ours, slow


def timm_bit(
    *,
    epsilon: float = 1e-8,
    norm_epsilon: float = 1e-5,
    v1: bool = False,
    same: bool | None = None,
    **arguments: Any,
) -> Any:
    """Builds ResNetV2 with two stages; `same` is TensorFlow's padding."""
    from timm.layers import GroupNormAct, StdConv2d
    from timm.layers.std_conv import StdConv2dSame
    from timm.models.resnetv2 import ResNetV2

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
    import transformers

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
TIMM_V1 = "timm ResNetV2, norms after convolutions"
HF_V1 = "Hugging Face BiT, norms after convolutions"


def _timm(config: Any, form: str = "timm BiT", **more: Any) -> Case:
    build = functools.partial(timm_bit, **more)
    return Case(form=form, build=build, config=config, sizes=ALL)


def _huggingface(form: str = "Hugging Face BiT", **more: Any) -> Case:
    return Case(form=form, build=functools.partial(huggingface_bit, **more), sizes=ALL)


TINY = BiT(stages=(1, 1), width=32, head=HEAD)
TINY_TRUNK = Trunk(stages=(1,), width=32)
TORCH_FORM = dict(standardisation=Standardisation.INSIDE_ROOT, norm_epsilon=1e-5)
TORCH_TRUNK = dataclasses.replace(TINY_TRUNK, **TORCH_FORM)
TINY_V1 = BiTV1(trunk=TORCH_TRUNK, head=HEAD)
CASES = {
    "timm BiT, zeros": _timm(NAMED_BIT),
    "timm BiT, zeros assumed": slow(_timm({})),
    "timm BiT, negative infinity": _timm(
        {"model_args": {"stem_type": ""}}, stem_type=""
    ),
    "timm BiT, basic": _timm(NAMED_BIT, **BASIC),
    "timm BiT, no head": slow(_timm(NAMED_BIT, num_classes=0)),
    "timm BiT, gray": slow(_timm(NAMED_BIT, in_chans=1)),
    "timm BiT, ours": Case(form="timm BiT", ours=TINY, config={}),
    "timm BiT, norms after convolutions": _timm(V1_CONFIG, TIMM_V1, v1=True),
    "timm BiT, norms after convolutions, ours": Case(
        form=TIMM_V1, ours=TINY_V1, config={}
    ),
    "HF BiT, preactivation": _huggingface(),
    "HF BiT, bottleneck": _huggingface(HF_V1, layer_type="bottleneck"),
    "HF BiT, groups": slow(_huggingface(num_groups=8)),
    "HF BiT, gray": slow(_huggingface(num_channels=1)),
    "HF BiT, ours": Case(form="Hugging Face BiT", ours=TINY),
    "HF BiT, bottleneck, ours": Case(form=HF_V1, ours=TINY_V1),
    "npz of BiT": Case(form="BiT (npz)", ours=TINY, config={}),
    "npz of big_vision": Case(
        form="big_vision bit (npz)",
        ours=BiTV1(trunk=TINY_TRUNK, head=HEAD),
        config={},
    ),
    "npz of big_vision, bit_paper": Case(
        form="big_vision bit_paper (npz)",
        ours=TINY.clone(pool_padding=PoolPadding.NEGATIVE_INFINITY),
        config={},
    ),
}

_to_timm = functools.partial(Ours, library=Library.TIMM)
_to_huggingface = functools.partial(Ours, library=Library.HUGGINGFACE)
OURS = {
    "timm BiT, two stages": _to_timm(model=BiT(stages=(3, 4), width=32, head=HEAD)),
    "timm BiT, two stages of 152 layers": slow(
        _to_timm(model=BiT(stages=(3, 8), width=32))
    ),
    "timm BiT, wide": slow(_to_timm(model=BiT(stages=(3,), width=96, head=HEAD))),
    "timm BiT, basic": _to_timm(
        model=BiT(stages=(3, 4), width=32, block=Block.BASIC, head=HEAD)
    ),
    "HF BiT, preactivation": _to_huggingface(
        model=BiT(stages=(1, 2), width=32, groups=8, head=HEAD)
    ),
    "HF BiT, no head": slow(_to_huggingface(model=BiT(stages=(2,), width=32))),
    "HF BiT, five stages": slow(
        _to_huggingface(model=BiT(stages=(1,) * 5, width=8, groups=4), size=(128, 128))
    ),
    "HF BiT, bottleneck": _to_huggingface(
        model=BiTV1(
            trunk=Trunk(stages=(1, 2), width=32, groups=8, **TORCH_FORM), head=HEAD
        )
    ),
    "HF BiT, bottleneck, no head": slow(
        _to_huggingface(model=BiTV1(trunk=Trunk(stages=(1, 1), width=32, **TORCH_FORM)))
    ),
}
