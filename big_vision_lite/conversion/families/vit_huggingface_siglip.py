"""The image tower of SigLIP in Hugging Face's transformers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from big_vision_lite.conversion.engine import (
    Entry,
    linear,
    norm,
    output_projection,
    projection_biases,
    projections,
    same,
)
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
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

# What a config.json that leaves a key out means: SiglipVisionConfig. Published ones
# leave out most.
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
}
BLOCK = BlockNames(
    layers="encoder.layers",
    norms=("layer_norm1", "layer_norm2"),
    query_key_value=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    mlp=("mlp.fc1", "mlp.fc2"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceSigLIP(Format):
    """SiglipVisionModel, and SiglipForImageClassification when there is a head.

    The classifier reads the mean of all tokens, not the attention pooling that
    SiglipVisionModel ends in; so any ViT that averages can go there.
    """

    name: str = "Hugging Face SigLIP"
    library: Library = Library.HUGGINGFACE
    model: type = ViT
    root: str = "vision_model."
    # Text, temperature and bias; the pooling that a classifier leaves unused.
    ignored: tuple[str, ...] = (
        r"text_model\..*",
        r"logit_(scale|bias)",
        r"vision_model\.head\..*",
        r".*\.position_ids",
    )

    def recognises(self, weights: Weights) -> bool:
        wanted = {
            f"{self.root}embeddings.patch_embedding.weight",
            f"{self.root}encoder.layers.0.layer_norm1.weight",
        }
        # CLIP has the same names and these two.
        others = {
            f"{self.root}embeddings.class_embedding",
            f"{self.root}pre_layrnorm.weight",
        }
        names = weights.arrays.keys()
        return wanted <= names and not others & names

    def architecture(self, weights: Weights) -> Architecture:
        config = config_of(weights, ("siglip_vision_model", "siglip"), DEFAULTS)
        head = head_of(weights)
        probes = head is None and any(
            name.startswith(f"{self.root}head.") for name in weights.arrays
        )
        model = ViT(
            **vit_fields(config, weights.path),
            mlp_dim=config["intermediate_size"],
            pooling=Pooling.ATTENTION if probes else Pooling.AVERAGE,
            head=head,
        )
        return architecture_of(model, config, ())

    def entries(
        self, model: ViT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        root = self.root
        table = [
            *patches(f"{root}embeddings.patch_embedding"),
            tokens_and_positions(
                model,
                grid_size(*image_size, model.patch_size),
                positions=f"{root}embeddings.position_embedding.weight",
                leading=(),
            ),
            *blocks(model, root, BLOCK),
            *norm(f"{root}post_layernorm", "encoder/norm"),
        ]
        if model.pooling == Pooling.ATTENTION:
            table += _attention_pooling(f"{root}head")
        return table if model.head is None else table + linear("classifier", "head")

    def describe(
        self, model: ViT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        what = "Hugging Face's SigLIP"
        probes = model.pooling == Pooling.ATTENTION
        if not probes and model.pooling != Pooling.AVERAGE:
            raise ValueError(f"{what} has no pooling={model.pooling}. {TO_TIMM}")
        if probes and model.head is not None:
            raise ValueError(
                f"{what} classifies by the average of the tokens, this model has "
                f"pooling={model.pooling} and a head. {TO_TIMM}"
            )
        if self.root != FORMATS[0].root:
            raise ValueError(f"{what} is written with names in {FORMATS[0].root}")
        expresses = ("pooling", "positions", "activation", "norm_epsilon")
        check_fields(model, what=what, expresses=expresses, instead=TO_TIMM)
        if model.activation == Activation.SWIGLU:
            raise ValueError(f"{what} has no activation=swiglu. {TO_TIMM}")
        if image_size[0] != image_size[1]:
            raise ValueError(
                f"{what} knows square images only, this model is for "
                f"{image_size[0]}x{image_size[1]} px. {TO_TIMM}"
            )
        vision = {
            "model_type": "siglip_vision_model",
            **config_for(model, image_size),
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
            **labels_for(model),
        }


def _attention_pooling(root: str) -> list[Entry]:
    attention = "pooling/attention"
    parts = [f"{attention}/{part}" for part in ("query", "key", "value")]
    return [
        same(f"{root}.probe", "pooling/probe"),
        projections(
            f"{root}.attention.in_proj_weight", *(f"{part}/kernel" for part in parts)
        ),
        projection_biases(
            f"{root}.attention.in_proj_bias", *(f"{part}/bias" for part in parts)
        ),
        output_projection(
            f"{root}.attention.out_proj.weight", f"{attention}/out/kernel"
        ),
        same(f"{root}.attention.out_proj.bias", f"{attention}/out/bias"),
        *norm(f"{root}.layernorm", "pooling/norm"),
        *linear(f"{root}.mlp.fc1", "pooling/mlp/hidden"),
        *linear(f"{root}.mlp.fc2", "pooling/mlp/out"),
    ]


FORMATS = (
    HuggingFaceSigLIP(),
    # As transformers 5 saves a SiglipVisionModel.
    HuggingFaceSigLIP(name="Hugging Face SigLIP tower", root=""),
)
