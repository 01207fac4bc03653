"""ResNets of timm, torchvision and Hugging Face."""

import functools
from collections.abc import Callable
from typing import Any

from big_vision_lite.conversion.formats import Library
from big_vision_lite.models.bit import Block
from big_vision_lite.models.resnet import ResNet
from conversion_cases.case import (
    ALL,
    CLASSES,
    HEAD,
    NO_HEAD,
    ODD,
    Case,
    Ours,
    Size,
    slow,
)

TIMM_CONFIG = {"architecture": "resnet50"}


def timm_resnet(name: str = "resnet50", **arguments: Any) -> Any:
    import timm

    narrow = dict(layers=(2, 1, 1, 2), channels=(8, 16, 32, 64), num_classes=CLASSES)
    return timm.create_model(name, **{**narrow, **arguments})


def torchvision_resnet(
    block: str = "Bottleneck", layers: Any = (1, 2, 1, 1), **more: Any
) -> Any:
    from torchvision.models import resnet

    kind = getattr(resnet, block)
    return resnet.ResNet(kind, list(layers), num_classes=CLASSES, **more)


def huggingface_resnet(
    kind: str = "ResNetForImageClassification", **arguments: Any
) -> Any:
    import transformers

    narrow = dict(
        embedding_size=8, hidden_sizes=[16, 32, 64], depths=[2, 1, 2], num_labels=7
    )
    config = transformers.ResNetConfig(**{**narrow, **arguments})
    return getattr(transformers, kind)(config)


def _case(
    form: str,
    config: Any,
    build: Callable[..., Any],
    *given: Any,
    sizes: tuple[Size, ...] = (ODD,),
    **more: Any,
) -> Case:
    made = functools.partial(build, *given, **more)
    return Case(form=form, build=made, config=config, sizes=sizes)


_timm = functools.partial(_case, "timm ResNet", TIMM_CONFIG, timm_resnet)
_torchvision = functools.partial(_case, "torchvision ResNet", {}, torchvision_resnet)
_huggingface = functools.partial(_case, "Hugging Face ResNet", None, huggingface_resnet)
_headless = functools.partial(
    _case, "Hugging Face ResNet without a head", None, huggingface_resnet
)
TINY = ResNet(stages=(1, 1), width=8, head=HEAD)
CASES = {
    "timm ResNet, bottleneck": slow(_timm()),
    "timm ResNet, basic": slow(_timm("resnet18", sizes=ALL)),
    # As wide as the stem: the first unit has no projection.
    "timm ResNet, basic, 64": slow(_timm("resnet18", channels=(64, 128, 256, 512))),
    "timm ResNet, groups": _timm(cardinality=4, base_width=32, sizes=ALL),
    # Rounded down: 24 * 36 / 64 = 13.5.
    "timm ResNet, groups of a part": _timm(
        channels=(24, 48, 96, 192), cardinality=2, base_width=36
    ),
    "timm ResNet, wide": slow(_timm(base_width=128)),
    "timm ResNet, no head": _timm(num_classes=0),
    "timm ResNet, gray": slow(_timm(in_chans=1)),
    "timm ResNet, ours": Case(form="timm ResNet", ours=TINY, config=TIMM_CONFIG),
    "torchvision ResNet, basic": _torchvision("BasicBlock"),
    "torchvision ResNet, bottleneck": slow(_torchvision()),
    "torchvision ResNet, groups": slow(
        _torchvision(groups=32, width_per_group=4, sizes=ALL)
    ),
    "torchvision ResNet, wide": slow(_torchvision(width_per_group=128)),
    "torchvision ResNet, ours": Case(form="torchvision ResNet", ours=TINY, config={}),
    "HF ResNet, bottleneck": _huggingface(),
    "HF ResNet, basic": slow(_huggingface(layer_type="basic", sizes=ALL)),
    "HF ResNet, gray": slow(_huggingface(num_channels=1)),
    "HF ResNet, ours": Case(form="Hugging Face ResNet", ours=TINY),
    "HF ResNet, no head": _headless("ResNetModel"),
    "HF ResNet, no head, ours": Case(
        form="Hugging Face ResNet without a head", ours=TINY.clone(head=None)
    ),
}

NARROW = dict(stages=(1, 1, 1, 1), width=8, head=HEAD)


def _ours(library: Library, *, channels: int = 3, **fields: Any) -> Ours:
    model = ResNet(**{**NARROW, **fields})
    return Ours(library=library, model=model, channels=channels)


OURS = {
    "timm ResNet": _ours(Library.TIMM, groups=2, width_per_group=64),
    "timm ResNet, basic": slow(_ours(Library.TIMM, block=Block.BASIC)),
    "timm ResNet, published": slow(Ours(library=Library.TIMM, model=ResNet.of("R18"))),
    "torchvision ResNet": Ours(
        library=Library.TORCHVISION, model=ResNet.of("R18", head=HEAD)
    ),
    "HF ResNet": _ours(Library.HUGGINGFACE, stages=(2, 1), stem_width=16),
    "HF ResNet, no head": _ours(Library.HUGGINGFACE, **NO_HEAD, block=Block.BASIC),
    "HF ResNet, gray": slow(_ours(Library.HUGGINGFACE, channels=1)),
}
