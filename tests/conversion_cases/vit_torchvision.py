"""ViTs of torchvision."""

import functools
from typing import Any

from conversion_cases.case import CLASSES, Case, side, slow
from conversion_cases.vit_timm import TINY_OF_TIMM

TINY_TORCHVISION = dict(
    num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=CLASSES
)
TORCHVISION_VITS: dict[str, dict[str, Any]] = {
    "odd": dict(image_size=35, patch_size=7),
    "224": dict(image_size=224, patch_size=16),
    "representation": dict(image_size=24, patch_size=8, representation_size=20),
}


def torchvision_vit(**arguments: Any) -> Any:
    import torchvision

    return torchvision.models.VisionTransformer(**{**TINY_TORCHVISION, **arguments})


def _theirs(name: str) -> Case:
    arguments = TORCHVISION_VITS[name]
    return Case(
        form="torchvision ViT",
        build=functools.partial(torchvision_vit, **arguments),
        config={"builder": "VisionTransformer", "arguments": TINY_TORCHVISION},
        sizes=(side(arguments["image_size"]),),
        goes_by_name=True,
    )


CASES = {
    "torchvision ViT, odd": _theirs("odd"),
    "torchvision ViT, 224": slow(_theirs("224")),
    "torchvision ViT, representation": _theirs("representation"),
    "torchvision ViT, ours": Case(
        form="torchvision ViT",
        ours=TINY_OF_TIMM,
        config={"arguments": {"num_heads": 2}},
    ),
}
