"""DINOv2, with and without registers, in Hugging Face's transformers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from big_vision_lite.conversion.engine import Arrays, Entry, Shape, dense, norm, same
from big_vision_lite.conversion.families.vit_huggingface_tables import (
    TO_TIMM,
    BlockNames,
    architecture_of,
    blocks,
    config_for,
    config_of,
    head_of,
    labels_for,
    patches,
    vit_fields,
)
from big_vision_lite.conversion.families.vit_tables import (
    check_fields,
    tokens_and_positions,
)
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import grid_size
from big_vision_lite.models.blocks.pooling import WITH_CLASS_TOKEN, Pooling
from big_vision_lite.models.vit import ViT

# What a config.json that leaves a key out means: Dinov2Config; with registers the
# default of the patches is 16.
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
}
REGISTERS: Mapping[str, Any] = {**DEFAULTS, "patch_size": 16, "num_register_tokens": 4}
EXPRESSES = (
    *("pooling", "positions", "activation", "norm_epsilon", "qkv_bias"),
    *("layer_scale", "registers"),
)


def swiglu_dim(width: int, ratio: int) -> int:
    """Returns the hidden width: two thirds of `ratio` widths, up to a multiple of 8."""
    return (int(width * ratio * 2 / 3) + 7) // 8 * 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceDINOv2(Format):
    """Dinov2ForImageClassification, and Dinov2Model when there is no head.

    The classifier reads the class token and the mean of the patches, one after the
    other: pooling=class_token_and_average. A head of ours on the class token alone goes
    out with zeros for the mean and comes back from there.
    """

    name: str = "Hugging Face DINOv2"
    library: Library = Library.HUGGINGFACE
    model: type = ViT
    # Stands for masked patches in pretraining.
    ignored: tuple[str, ...] = (r"(.*\.)?embeddings\.mask_token",)
    model_type: str = "dinov2"
    kind: str = "Dinov2"

    def recognises(self, weights: Weights) -> bool:
        head = weights.arrays.get("classifier.weight")
        root = "" if head is None else f"{self.model_type}."
        registers = f"{root}embeddings.register_tokens" in weights.arrays
        wanted = {
            f"{root}embeddings.position_embeddings",
            f"{root}encoder.layer.0.layer_scale1.lambda1",
        }
        return wanted <= weights.arrays.keys() and registers == self._has_registers

    def architecture(self, weights: Weights) -> Architecture:
        defaults = REGISTERS if self._has_registers else DEFAULTS
        config = config_of(weights, (self.model_type,), defaults)
        fields = vit_fields(config, weights.path)
        width, ratio = config["hidden_size"], config["mlp_ratio"]
        mlp_dim = int(width * ratio)
        if config["use_swiglu_ffn"]:
            fields["activation"] = Activation.SWIGLU
            mlp_dim = swiglu_dim(width, ratio)
        model = ViT(
            **fields,
            mlp_dim=mlp_dim,
            qkv_bias=config["qkv_bias"],
            pooling=_pooling_of(weights),
            layer_scale=config["layerscale_value"],
            registers=config.get("num_register_tokens", 0),
            head=head_of(weights),
        )
        return architecture_of(model, config, ())

    def entries(
        self, model: ViT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        root = self._root(model)
        mlp = ("mlp.fc1", "mlp.fc2")
        if model.activation == Activation.SWIGLU:
            mlp = ("mlp.weights_in", "mlp.weights_out")
        table = [
            *patches(f"{root}embeddings.patch_embeddings.projection"),
            tokens_and_positions(
                model,
                grid_size(*image_size, model.patch_size),
                positions=f"{root}embeddings.position_embeddings",
                tokens={f"{root}embeddings.cls_token": "class_token"},
            ),
            *blocks(model, root, BlockNames(norms=("norm1", "norm2"), mlp=mlp)),
            *norm(f"{root}layernorm", "encoder/norm"),
        ]
        if model.registers:
            # Without positions on both sides.
            table += [same(f"{root}embeddings.register_tokens", "registers")]
        for index in range(model.depth):
            theirs, ours = f"{root}encoder.layer.{index}", f"encoder/block_{index:02d}"
            table += [
                same(f"{theirs}.layer_scale1.lambda1", f"{ours}/attention_scale"),
                same(f"{theirs}.layer_scale2.lambda1", f"{ours}/mlp_scale"),
            ]
        if model.head is None:
            return table
        if model.pooling == Pooling.CLASS_TOKEN_AND_AVERAGE:
            table += [dense("classifier.weight", "head/kernel")]
        else:
            table += [_first_half("classifier.weight", "head/kernel")]
        return [*table, same("classifier.bias", "head/bias")]

    def constants(self, model: ViT) -> dict[str, np.ndarray]:
        """Returns what the other side has and nothing of ours corresponds to."""
        name = f"{self._root(model)}embeddings.mask_token"
        return {name: np.zeros((1, model.width), np.float32)}

    def describe(
        self, model: ViT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        what = "Hugging Face's DINOv2"
        if model.layer_scale is None or model.pooling not in WITH_CLASS_TOKEN:
            raise ValueError(
                f"{what} has layer scale and a class token; this model has "
                f"layer_scale={model.layer_scale} and pooling={model.pooling}. "
                f"{TO_TIMM}"
            )
        if bool(model.registers) != self._has_registers:
            raise ValueError(
                f"{self.kind} does not have registers={model.registers}. {TO_TIMM}"
            )
        check_fields(model, what=what, expresses=EXPRESSES, instead=TO_TIMM)
        if model.head is None and model.pooling != Pooling.CLASS_TOKEN:
            raise ValueError(
                f"{what} without a head gives the class token alone, not pooling="
                f"{model.pooling}. Export with --to safetensors, or with a head."
            )
        if image_size[0] != image_size[1]:
            raise ValueError(
                f"{what} takes its positions for a square, this model is for "
                f"{image_size[0]}x{image_size[1]} px. {TO_TIMM}"
            )
        kind = "Model" if model.head is None else "ForImageClassification"
        registers = {"num_register_tokens": model.registers}
        return {
            "architectures": [f"{self.kind}{kind}"],
            "model_type": self.model_type,
            **config_for(model, image_size),
            "mlp_ratio": _ratio(model),
            "use_swiglu_ffn": model.activation == Activation.SWIGLU,
            "qkv_bias": model.qkv_bias,
            "layerscale_value": model.layer_scale,
            **(registers if self._has_registers else {}),
            **labels_for(model),
        }

    @property
    def _has_registers(self) -> bool:
        return self.model_type != "dinov2"

    def _root(self, model: ViT) -> str:
        return "" if model.head is None else f"{self.model_type}."


def _pooling_of(weights: Weights) -> Pooling:
    name = "classifier.weight"
    if name in weights.arrays:
        _, inputs = weights.shape(name, 2)
        if weights.arrays[name][:, inputs // 2 :].any():
            return Pooling.CLASS_TOKEN_AND_AVERAGE
    return Pooling.CLASS_TOKEN


def _first_half(theirs: str, ours: str) -> Entry:
    """Ties a weight [C, 2D] that is zero from D on to a kernel [D, C]."""

    def to_ours(arrays: Arrays, shapes: Sequence[Shape]) -> Arrays:
        width = shapes[0][0]
        if arrays[0][:, width:].any():
            raise ValueError("reads the mean of the patches, which the model does not")
        return [arrays[0][:, :width].T]

    def to_theirs(arrays: Arrays) -> Arrays:
        return [np.concatenate([arrays[0].T, np.zeros_like(arrays[0].T)], axis=1)]

    return Entry(theirs=(theirs,), ours=(ours,), to_ours=to_ours, to_theirs=to_theirs)


def _ratio(model: ViT) -> int:
    """Returns the whole number that gives the MLP's width, which has no other place."""
    ratios = range(1, 33)
    for ratio in ratios:
        if model.activation == Activation.SWIGLU:
            found = swiglu_dim(model.width, ratio)
        else:
            found = model.width * ratio
        if found == model.mlp_dim:
            return ratio
    raise ValueError(
        "Hugging Face's DINOv2 makes its MLP a whole number of times as wide as the "
        f"tokens, this model has mlp_dim={model.mlp_dim} at width={model.width}. "
        f"{TO_TIMM}"
    )


_PLAIN = HuggingFaceDINOv2()
_REGISTERS = dataclasses.replace(
    _PLAIN,
    name="Hugging Face DINOv2 with registers",
    model_type="dinov2_with_registers",
    kind="Dinov2WithRegisters",
)
FORMATS = (_PLAIN, _REGISTERS)
