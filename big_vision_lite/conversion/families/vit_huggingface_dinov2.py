"""DINOv2, with and without registers, in Hugging Face's transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from big_vision_lite.conversion import engine
from big_vision_lite.conversion.engine import Arrays, Entry, Shape
from big_vision_lite.conversion.families import vit
from big_vision_lite.conversion.families.vit_huggingface import (
    DEFAULTS,
    HuggingFaceViT,
)
from big_vision_lite.conversion.formats import Size
from big_vision_lite.conversion.tables import Rows, To, under
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

# Values of keys that a config.json leaves out: Dinov2Config; with registers the default
# patch size is 16.
DINOV2: Mapping[str, Any] = {
    **{key: value for key, value in DEFAULTS.items() if key != "intermediate_size"},
    "mlp_ratio": 4,
    "layer_norm_eps": 1e-6,
    "patch_size": 14,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
}
REGISTERS: Mapping[str, Any] = {**DINOV2, "patch_size": 16, "num_register_tokens": 4}


class HuggingFaceDINOv2(HuggingFaceViT):
    """Hugging Face's Dinov2ForImageClassification, and Dinov2Model without a head.

    The classifier reads the class token and the mean of the patches, concatenated:
    pooling=class_token_and_average. A head of ours on the class token alone is exported
    with zeros for the mean, and read back as such.
    """

    name = "Hugging Face DINOv2"
    # It replaces masked patches in pretraining.
    ignored = (r"(.*\.)?embeddings\.mask_token",)
    requires = vit.requires(
        *("positions", "activation", "norm_epsilon", "qkv_bias"),
        layer_scale=float,
        pooling=[Pooling.CLASS_TOKEN, Pooling.CLASS_TOKEN_AND_AVERAGE],
    )
    root = "dinov2."
    model_types = ("dinov2",)
    defaults = DINOV2
    kind, kind_of_body = "Dinov2ForImageClassification", "Dinov2Model"
    parts = {
        **HuggingFaceViT.parts,
        "attention_norm": "norm1",
        "attention_scale": "layer_scale1.lambda1",
        "mlp_norm": "norm2",
        "mlp/hidden": "mlp.fc1",
        "mlp/out": "mlp.fc2",
        "mlp_scale": "layer_scale2.lambda1",
    }

    def recognises(self, weights: Weights) -> bool:
        root = self.root if "classifier.weight" in weights.arrays else ""
        registers = f"{root}embeddings.register_tokens" in weights.arrays
        wanted = {
            f"{root}{self.positions}",
            f"{root}encoder.layer.0.layer_scale1.lambda1",
        }
        has_registers = self.defaults is REGISTERS
        return wanted <= weights.arrays.keys() and registers == has_registers

    def rows(self, model: ViT) -> Rows:
        root, block = self._root(model), self._root(model) + self.block
        rows: Rows = {
            **super().rows(model),
            # Neither side adds positions to them.
            "registers": f"{root}embeddings.register_tokens",
        }
        if model.activation == Activation.SWIGLU:
            mlp = {"mlp/hidden": "mlp.weights_in", "mlp/out": "mlp.weights_out"}
            rows = {**rows, **under(block, mlp, ours=vit.BLOCK)}
        if model.pooling == Pooling.CLASS_TOKEN:
            rows = {**rows, "head": To(theirs="classifier", layout=_first_half)}
        return rows

    def constants(self, model: ViT) -> dict[str, np.ndarray]:
        name = f"{self._root(model)}embeddings.mask_token"
        return {name: np.zeros((1, model.width), np.float32)}

    def describe(self, model: ViT, size: Size, channels: int) -> dict[str, Any]:
        has_registers = self.defaults is REGISTERS
        if bool(model.registers) != has_registers:
            raise ValueError(f"{self.name} does not have registers={model.registers}.")
        if model.head is None and model.pooling != Pooling.CLASS_TOKEN:
            raise ValueError(
                f"{self.name} without a head gives the class token alone, not pooling="
                f"{model.pooling}; a head makes it one that goes there."
            )
        vit.check_square(self.name, size)
        described = super().describe(model, size, channels)
        del described["intermediate_size"]
        registers = {"num_register_tokens": model.registers} if has_registers else {}
        return {
            **described,
            "mlp_ratio": _ratio(model),
            "use_swiglu_ffn": model.activation == Activation.SWIGLU,
            "layerscale_value": model.layer_scale,
            **registers,
        }

    def _fields(self, config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        width, ratio = config["hidden_size"], config["mlp_ratio"]
        gated = config["use_swiglu_ffn"]
        more = {"activation": Activation.SWIGLU} if gated else {}
        return {
            **super()._fields(config, weights),
            **more,
            "mlp_dim": swiglu_dim(width, ratio) if gated else int(width * ratio),
            "pooling": _pooling_of(weights),
            "layer_scale": config["layerscale_value"],
            "registers": config.get("num_register_tokens", 0),
        }


class HuggingFaceDINOv2Registers(HuggingFaceDINOv2):
    """DINOv2 with registers."""

    name = "Hugging Face DINOv2 with registers"
    requires = {k: v for k, v in HuggingFaceDINOv2.requires.items() if k != "registers"}
    root = "dinov2_with_registers."
    model_types = ("dinov2_with_registers",)
    defaults = REGISTERS
    kind = "Dinov2WithRegistersForImageClassification"
    kind_of_body = "Dinov2WithRegistersModel"


def swiglu_dim(width: int, ratio: int) -> int:
    """Returns the hidden width: 2/3 of width * ratio, rounded up to a multiple of 8."""
    return (int(width * ratio * 2 / 3) + 7) // 8 * 8


def _pooling_of(weights: Weights) -> Pooling:
    name = "classifier.weight"
    if name in weights.arrays:
        _, inputs = weights.shape(name, 2)
        if weights.arrays[name][:, inputs // 2 :].any():
            return Pooling.CLASS_TOKEN_AND_AVERAGE
    return Pooling.CLASS_TOKEN


def _first_half(theirs: str, ours: Sequence[str], shapes: Sequence[Shape]) -> Entry:
    """Ties a weight [C, 2D] that is zero from D on to a kernel [D, C]."""
    if len(shapes[0]) == 1:
        return engine.same(theirs, ours[0])

    def to_ours(arrays: Arrays, shapes: Sequence[Shape]) -> Arrays:
        width = shapes[0][0]
        if arrays[0][:, width:].any():
            raise ValueError("reads the mean of the patches, which the model does not")
        return [arrays[0][:, :width].T]

    def to_theirs(arrays: Arrays) -> Arrays:
        return [np.concatenate([arrays[0].T, np.zeros_like(arrays[0].T)], axis=1)]

    return Entry(
        theirs=(theirs,), ours=tuple(ours), to_ours=to_ours, to_theirs=to_theirs
    )


def _ratio(model: ViT) -> int:
    """Returns the integer mlp_ratio, the only key of config.json for the MLP's width.

    Raises:
        ValueError: no integer gives this width.
    """
    for ratio in range(1, 33):
        found = model.width * ratio
        if model.activation == Activation.SWIGLU:
            found = swiglu_dim(model.width, ratio)
        if found == model.mlp_dim:
            return ratio
    raise ValueError(
        "Hugging Face's DINOv2 makes its MLP a whole number of times as wide as the "
        f"tokens, this model has mlp_dim={model.mlp_dim} at width={model.width}."
    )


FORMATS = (HuggingFaceDINOv2(), HuggingFaceDINOv2Registers())
