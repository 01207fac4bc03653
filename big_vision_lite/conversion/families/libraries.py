"""The arguments with which timm, torchvision and Hugging Face build a model."""

from typing import Any

# The hint for a small stem, which no library has.
LARGE_STEM = {
    "stem": "A large stem is a 7x7 convolution and max-pooling: a model trained with "
    "stem=large goes there, or a ViT."
}


def timm(
    architecture: str, model: Any, channels: int, /, **arguments: Any
) -> dict[str, Any]:
    """Returns the name and arguments for `timm.create_model`."""
    head = model.head
    more = {"num_classes": 0 if head is None else head.num_classes}
    # Three is timm's default.
    more |= {} if channels == 3 else {"in_chans": channels}
    return {"architecture": architecture, "model_args": {**more, **arguments}}


def torchvision(
    builder: str, model: Any, channels: int, /, **arguments: Any
) -> dict[str, Any]:
    """Returns the function of torchvision.models and its arguments.

    Raises:
        ValueError: `channels` is not 3.
    """
    if channels != 3:
        raise ValueError(
            f"torchvision's models take 3 channels, this one takes {channels}."
        )
    classes = {"num_classes": model.head.num_classes}
    return {"builder": builder, "arguments": {**classes, **arguments}}


def width_ratio(hidden: int, width: int) -> float:
    """Returns the mlp_ratio from which timm computes a hidden width."""
    ratio = hidden / width
    # timm rounds the product down.
    return ratio if int(ratio * width) == hidden else (hidden + 0.5) / width


def labels(num_classes: int) -> dict[str, Any]:
    """Returns labels "LABEL_0", ..., which tell Hugging Face the number of classes."""
    names = {index: f"LABEL_{index}" for index in range(num_classes)}
    return {
        "id2label": {str(index): name for index, name in names.items()},
        "label2id": {name: index for index, name in names.items()},
    }
