"""What the ViTs of Hugging Face's transformers share: config.json and layers.

Names are those in files, which transformers 5 translates when it loads them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from big_vision_lite.conversion.engine import (
    Entry,
    conv,
    linear,
    norm,
    output_projection,
    projection_biases,
    projections,
    same,
)
from big_vision_lite.conversion.formats import Architecture
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions
from big_vision_lite.models.vit import ViT

ACTIVATIONS = {
    "gelu": Activation.GELU_ERF,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
}
TO_TIMM = "Export it with --to timm or --to safetensors."


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockNames:
    """What the layers of a block are called; `layers` is the list of blocks."""

    layers: str = "encoder.layer"
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    query_key_value: tuple[str, str, str] = (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    )
    out: str = "attention.output.dense"
    mlp: tuple[str, str] = ("intermediate.dense", "output.dense")


def config_of(
    weights: Weights, model_types: Sequence[str], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the keys of `defaults` as config.json has them; its absence is refused.

    The vision part of a config of image and text is taken.
    """
    kind = model_types[0]
    if not weights.config:
        raise ValueError(
            f"{weights.path} has the names of a Hugging Face {kind}, whose number of "
            "heads, activation and norm constant stand in its config.json: put that "
            "file beside the weights, or give the folder that holds both."
        )
    config = weights.config.get("vision_config", weights.config)
    for named in (weights.config, config):
        found = named.get("model_type", kind)
        if found not in model_types:
            raise ValueError(
                f"{weights.path} has the names of a Hugging Face {kind}, but its "
                f'config.json says model_type "{found}", which is not read here; '
                f"{', '.join(model_types)} is."
            )
    return {key: config.get(key, default) for key, default in defaults.items()}


def vit_fields(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns the fields of our ViT that all these configs have.

    Raises:
        ValueError: an activation or patches that our ViT does not have.
    """
    act, patch = config["hidden_act"], config["patch_size"]
    if act not in ACTIVATIONS:
        raise ValueError(
            f'{path}: hidden_act "{act}" is not known here; '
            f"{', '.join(ACTIVATIONS)} are."
        )
    sides = set(patch) if isinstance(patch, list | tuple) else {patch}
    if len(sides) != 1:
        raise ValueError(f"{path}: patches of {patch} px; only squares are known here.")
    return {
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "patch_size": sides.pop(),
        "positions": Positions.LEARNED,
        "activation": ACTIVATIONS[act],
        "norm_epsilon": config["layer_norm_eps"],
    }


def architecture_of(
    model: ViT, config: Mapping[str, Any], notes: Sequence[str]
) -> Architecture:
    """Returns a model at its config's image size, less the edge that fills no patch."""
    given, patch = config["image_size"], model.patch_size
    height, width = given if isinstance(given, list | tuple) else (given, given)
    size = (height // patch * patch, width // patch * patch)
    if size != (height, width):
        notes = [
            *notes,
            f"of {height}x{width} px the model sees {size[0]}x{size[1]}: what fills no "
            f"patch of {patch} px is cut off, here before and not after resizing",
        ]
    return Architecture(
        model=model,
        image_size=size,
        channels=config["num_channels"],
        notes=tuple(notes),
    )


def config_for(model: ViT, image_size: tuple[int, int]) -> dict[str, Any]:
    """Returns the keys of config.json that all these models have."""
    height, width = image_size
    acts = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "hidden_act": acts.get(model.activation, "gelu"),
        "layer_norm_eps": model.norm_epsilon,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        # One mean may stand for every channel, of which there are mostly three.
        "num_channels": len(model.mean) if len(model.mean) > 1 else 3,
        "dtype": "float32",
    }


def labels_for(model: ViT) -> dict[str, Any]:
    """Returns names for the classes, which say how many there are; {} with no head."""
    if model.head is None:
        return {}
    names = {index: f"LABEL_{index}" for index in range(model.head.num_classes)}
    return {
        "id2label": {str(index): name for index, name in names.items()},
        "label2id": {name: index for index, name in names.items()},
    }


def head_of(weights: Weights, name: str = "classifier") -> Classifier | None:
    """Returns a head of as many classes as the named layer has, None without it."""
    weight = f"{name}.weight"
    if weight not in weights.arrays:
        return None
    return Classifier(num_classes=weights.shape(weight, 2)[0])


def patches(theirs: str) -> list[Entry]:
    """Ties the convolution that makes tokens."""
    return [
        conv(f"{theirs}.weight", "patch_embedding/kernel"),
        same(f"{theirs}.bias", "patch_embedding/bias"),
    ]


def blocks(model: ViT, root: str, names: BlockNames) -> list[Entry]:
    """Ties all blocks."""
    table: list[Entry] = []
    for index in range(model.depth):
        theirs, ours = f"{root}{names.layers}.{index}", f"encoder/block_{index:02d}"
        for layer, part in zip(names.norms, ("attention", "mlp"), strict=True):
            table += norm(f"{theirs}.{layer}", f"{ours}/{part}_norm")
        for layer, part in zip(
            names.query_key_value, ("query", "key", "value"), strict=True
        ):
            name = f"{ours}/attention/{part}"
            table += [projections(f"{theirs}.{layer}.weight", f"{name}/kernel")]
            if model.qkv_bias:
                table += [projection_biases(f"{theirs}.{layer}.bias", f"{name}/bias")]
        name = f"{ours}/attention/out"
        table += [
            output_projection(f"{theirs}.{names.out}.weight", f"{name}/kernel"),
            same(f"{theirs}.{names.out}.bias", f"{name}/bias"),
        ]
        for layer, part in zip(names.mlp, ("hidden", "out"), strict=True):
            table += linear(f"{theirs}.{layer}", f"{ours}/mlp/{part}")
    return table
