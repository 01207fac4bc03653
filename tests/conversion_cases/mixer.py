"""MLP-Mixers of timm, whose own names fix width and depth: tiny ones go by its class.

And those of the archives.
"""

import functools
from typing import Any

from big_vision_lite.conversion.formats import Library
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.mixer import MlpMixer
from conversion_cases.case import CLASSES, HEAD, Case, Ours, side, slow


def timm_mixer(**arguments: Any) -> Any:
    from timm.models.mlp_mixer import MlpMixer as TheirMixer

    tiny = dict(embed_dim=32, num_blocks=3, num_classes=CLASSES)
    return TheirMixer(**{**tiny, **arguments})


def _timm(**arguments: Any) -> Case:
    size = side(arguments["img_size"])
    return Case(
        form="timm MLP-Mixer",
        build=functools.partial(timm_mixer, **arguments),
        config={"model_args": {"img_size": list(size)}},
        sizes=(size,),
    )


TINY = MlpMixer(
    **dict(width=16, depth=1, token_mlp_dim=8, channel_mlp_dim=8, patch_size=8),
    head=HEAD,
)
CASES = {
    "timm mixer, 224": slow(_timm(img_size=224, patch_size=32)),
    "timm mixer, odd": _timm(img_size=35, patch_size=7),
    "timm mixer, not square": _timm(img_size=(16, 40), patch_size=8),
    "timm mixer, no head": _timm(img_size=35, patch_size=7, num_classes=0),
    "timm mixer, gray": slow(_timm(img_size=35, patch_size=7, in_chans=1)),
    "timm mixer, ours": Case(
        form="timm MLP-Mixer",
        ours=TINY.clone(activation=Activation.GELU_ERF),
        config={},
    ),
    "npz of a mixer": Case(form="big_vision MLP-Mixer (npz)", ours=TINY, config={}),
}
OURS = {
    "timm mixer, S/32": Ours(
        library=Library.TIMM,
        model=MlpMixer.of("S/32", head=HEAD, activation=Activation.GELU_ERF),
        size=(64, 96),
    ),
}
