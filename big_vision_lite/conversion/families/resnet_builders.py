"""How timm and torchvision build a ResNet of ours."""

from typing import Any

from big_vision_lite.models.bit import Block, Stem
from big_vision_lite.models.resnet import SIZES, ResNet

# How both name the published sizes, ours first.
NAMES = {
    size: {"R": "resnet", "X": "resnext", "W": "wide_resnet"}[size[0]] + size[1:]
    for size in SIZES
}


def timm(model: ResNet) -> dict[str, Any]:
    """Returns the name and arguments for `timm.create_model`."""
    _check_stem_and_stages(model, "timm")
    classes = 0 if model.head is None else model.head.num_classes
    arguments: dict[str, Any] = {"num_classes": classes}
    if len(model.mean) not in (1, 3):
        arguments["in_chans"] = len(model.mean)
    size = _published(model)
    # timm has no name for the widest ResNeXt.
    if size is not None and size != "X101_32x48d":
        return {"architecture": NAMES[size], "model_args": arguments}
    arguments["layers"] = list(model.stages)
    arguments["channels"] = [model.width * 2**index for index in range(4)]
    if model.block == Block.BASIC:
        return {"architecture": "resnet18", "model_args": arguments}
    arguments |= {"cardinality": model.groups, "base_width": model.width_per_group}
    return {"architecture": "resnet50", "model_args": arguments}


def torchvision(model: ResNet) -> dict[str, Any]:
    """Returns the function of torchvision.models and its arguments."""
    _check_stem_and_stages(model, "torchvision")
    if model.head is None:
        raise ValueError(
            "torchvision's ResNet always has a head, this model has none. Export it "
            "with --to timm, or --to huggingface."
        )
    if len(model.mean) not in (1, 3):
        raise ValueError(
            f"torchvision's ResNet takes images of 3 channels, this model of "
            f"{len(model.mean)}. Export it with --to timm."
        )
    depths = {
        (ResNet.of(size).stages, ResNet.of(size).block): NAMES[size]
        for size in SIZES
        if size.startswith("R")
    }
    builder = depths.get((model.stages, model.block))
    if builder is None or model.width != 64:
        raise ValueError(
            f"torchvision builds no ResNet of stages={model.stages} and width="
            f"{model.width} with {model.block} units. Export it with --to timm."
        )
    arguments: dict[str, Any] = {"num_classes": model.head.num_classes}
    if model.groups != 1 or model.width_per_group != 64:
        arguments |= {
            "groups": model.groups,
            "width_per_group": model.width_per_group,
        }
    return {"builder": builder, "arguments": arguments}


def _published(model: ResNet) -> str | None:
    """Returns the size in SIZES that has the shapes of a model, or None."""
    fields = ("stages", "width", "stem_width", "block", "groups", "width_per_group")
    for size in SIZES:
        published = ResNet.of(size)
        if all(getattr(model, f) == getattr(published, f) for f in fields):
            return size
    return None


def _check_stem_and_stages(model: ResNet, what: str) -> None:
    check_exportable(model, what)
    if model.stem_width != 64 or len(model.stages) != 4:
        raise ValueError(
            f"{what}'s ResNet has 4 stages after 64 channels, this model "
            f"{len(model.stages)} after {model.stem_width}. Export it with --to "
            "safetensors, or --to huggingface."
        )


def check_exportable(model: ResNet, what: str) -> None:
    """Refuses what no other library has: small stems, a hidden layer in the head."""
    if model.stem != Stem.LARGE:
        raise ValueError(
            f"{what}'s ResNet begins with a 7x7 convolution, this model has "
            f"stem={model.stem}. Export it with --to safetensors."
        )
    if model.head is not None and model.head.hidden_dim is not None:
        raise ValueError(
            f"{what}'s ResNet has no layer before its head, this model has "
            f"head.hidden_dim={model.head.hidden_dim}. Export it with --to safetensors."
        )
