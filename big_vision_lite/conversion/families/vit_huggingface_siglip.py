"""The image tower of SigLIP in Hugging Face's transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

from big_vision_lite.conversion.engine import Entry
from big_vision_lite.conversion.families import vit
from big_vision_lite.conversion.families.vit_huggingface import (
    DEFAULTS,
    HuggingFaceViT,
    labels_of,
    sizes_of,
)
from big_vision_lite.conversion.formats import Size
from big_vision_lite.conversion.tables import Rows, under
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.patches import grid_size
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

# Values of keys that a config.json leaves out, as published ones do with most:
# SiglipVisionConfig.
SIGLIP: Mapping[str, Any] = {
    **{key: value for key, value in DEFAULTS.items() if key != "qkv_bias"},
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


class HuggingFaceSigLIP(HuggingFaceViT):
    """Hugging Face's SiglipVisionModel; SiglipForImageClassification if it has a head.

    The classifier reads the mean of all tokens, not the attention pooling that
    SiglipVisionModel ends in; so any ViT with average pooling can be exported to it.
    """

    name = "Hugging Face SigLIP"
    # The text tower, temperature and bias; the pooling that a classifier does not use.
    ignored = (
        r"text_model\..*",
        r"logit_(scale|bias)",
        r"vision_model\.head\..*",
        r".*\.position_ids",
    )
    requires = vit.requires(
        *("positions", "norm_epsilon"),
        pooling=[Pooling.ATTENTION, Pooling.AVERAGE],
        activation=vit.GELUS,
    )
    root = "vision_model."
    model_types = ("siglip_vision_model", "siglip")
    defaults = SIGLIP
    patches = "embeddings.patch_embedding"
    positions = "embeddings.position_embedding.weight"
    block = "encoder.layers.{b}."
    last_norm = "post_layernorm"
    parts = {
        "attention_norm": "layer_norm1",
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/out": "self_attn.out_proj",
        "mlp_norm": "layer_norm2",
        "mlp/hidden": "mlp.fc1",
        "mlp/out": "mlp.fc2",
    }
    pooling: Rows = {
        "probe": "probe",
        vit.QUERY_KEY_VALUE: "attention.in_proj_{leaf}",
        "attention/out": "attention.out_proj",
        "norm": "layernorm",
        "mlp/hidden": "mlp.fc1",
        "mlp/out": "mlp.fc2",
    }

    def recognises(self, weights: Weights) -> bool:
        root, names = self.root, weights.arrays.keys()
        wanted = {
            f"{root}embeddings.patch_embedding.weight",
            f"{root}encoder.layers.0.layer_norm1.weight",
        }
        # CLIP has the same names and these two.
        others = {f"{root}embeddings.class_embedding", f"{root}pre_layrnorm.weight"}
        return wanted <= names and not others & names

    def rows(self, model: ViT) -> Rows:
        pooling = under(f"{self.root}head.", self.pooling, ours="pooling/")
        return {**super().rows(model), **pooling}

    def special(self, model: ViT, size: Size) -> Sequence[Entry]:
        return [
            vit.tokens_and_positions(
                model,
                grid_size(*size, model.patch_size),
                positions=f"{self.root}{self.positions}",
                leading=(),
            )
        ]

    def describe(self, model: ViT, size: Size, channels: int) -> dict[str, Any]:
        probes = model.pooling == Pooling.ATTENTION
        if probes and model.head is not None:
            raise ValueError(
                f"{self.name} classifies by the average of the tokens, this model has "
                f"pooling={model.pooling} and a head."
            )
        vit.check_square(self.name, size)
        vision = {
            "model_type": "siglip_vision_model",
            **sizes_of(model, size, channels),
            "intermediate_size": model.mlp_dim,
            "vision_use_head": probes,
        }
        if model.head is None:
            return {"architectures": ["SiglipVisionModel"], **vision}
        return {
            "architectures": ["SiglipForImageClassification"],
            "model_type": "siglip",
            "vision_config": vision,
            "text_config": {"model_type": "siglip_text_model"},
            "dtype": vision["dtype"],
            **labels_of(model),
        }

    def _root(self, model: ViT) -> str:
        return self.root

    def _fields(self, config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        fields = super()._fields(config, weights)
        start = f"{self.root}head."
        probes = any(name.startswith(start) for name in weights.arrays)
        pools = fields["head"] is None and probes
        return {**fields, "pooling": Pooling.ATTENTION if pools else Pooling.AVERAGE}


class HuggingFaceSigLIPTower(HuggingFaceSigLIP):
    """SiglipVisionModel as transformers 5 saves it: read, but not written."""

    name = "Hugging Face SigLIP tower"
    root = ""

    def describe(self, model: ViT, size: Size, channels: int) -> dict[str, Any]:
        raise ValueError(f"{self.name} is written with names in vision_model.")


FORMATS = (HuggingFaceSigLIP(), HuggingFaceSigLIPTower())
