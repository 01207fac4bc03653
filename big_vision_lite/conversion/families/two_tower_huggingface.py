"""SigLIP and SigLIP 2 of Hugging Face's transformers, both towers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from big_vision_lite.conversion.engine import Arrays, Entry, Shape
from big_vision_lite.conversion.families import vit
from big_vision_lite.conversion.families.vit_huggingface import ACTIVATIONS
from big_vision_lite.conversion.families.vit_huggingface_siglip import (
    HuggingFaceSigLIP,
)
from big_vision_lite.conversion.formats import Architecture, Format, Library, Size
from big_vision_lite.conversion.tables import Rows, under
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.text_transformer import TextPooling, TextTransformer
from big_vision_lite.models.two_tower import TwoTower
from big_vision_lite.models.vit import ViT

# Values of keys that the text part of a config.json leaves out: SiglipTextConfig.
TEXT: Mapping[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "projection_size": None,
}
IMAGE, WORDS = "image_tower", "text_tower"


class HuggingFaceTwoTower(Format):
    """Hugging Face's SiglipModel, which holds SigLIP 2 of one resolution, too.

    The image's embedding is its pooling's result, the text's a projection of its last
    token. SigLIP 2 of any aspect (siglip2) is another model.
    """

    name = "Hugging Face SigLIP, both towers"
    library = Library.HUGGINGFACE
    model = TwoTower
    ignored = (r".*\.position_ids",)
    image = HuggingFaceSigLIP()
    requires = {
        IMAGE: ViT,
        **{f"{IMAGE}.{n}": x for n, x in image.requires.items()},
        f"{IMAGE}.head": None,
        f"{WORDS}.pooling": TextPooling.LAST,
        f"{WORDS}.causal": False,
        f"{WORDS}.activation": vit.GELUS,
        "project_image": False,
        "projection_bias": True,
        "temperature_max": None,
    }
    hints = {
        **Format.hints,
        "project_image": "Without --whole the image tower alone goes out.",
    }

    def recognises(self, weights: Weights) -> bool:
        texts = any(name.startswith("text_model.") for name in weights.arrays)
        return texts and self.image.recognises(weights)

    def architecture(self, weights: Weights) -> Architecture:
        found = self.image.architecture(weights)
        given = weights.config.get("text_config", {})
        text = {key: given.get(key, value) for key, value in TEXT.items()}
        act = text["hidden_act"]
        if act not in ACTIVATIONS:
            raise ValueError(
                f'{weights.path}: hidden_act "{act}" of the text tower is not known '
                f"here; {', '.join(ACTIVATIONS)} are."
            )
        tower = TextTransformer(
            vocabulary=text["vocab_size"],
            width=text["hidden_size"],
            depth=text["num_hidden_layers"],
            mlp_dim=text["intermediate_size"],
            num_heads=text["num_attention_heads"],
            length=text["max_position_embeddings"],
            activation=ACTIVATIONS[act],
            norm_epsilon=text["layer_norm_eps"],
        )
        both = TwoTower(
            image_tower=found.model,
            text_tower=tower,
            features=text["projection_size"] or text["hidden_size"],
            project_image=False,
        )
        return dataclasses.replace(found, model=both)

    def rows(self, model: TwoTower) -> Rows:
        image = self.image.rows(_image(model))
        block = under(self.image.block, self.image.parts, ours=vit.BLOCK)
        text = {
            "embedding/tokens": "embeddings.token_embedding.weight",
            "embedding/positions": "embeddings.position_embedding.weight",
            **block,
            "encoder/norm": "final_layer_norm",
        }
        return {
            **under("", image, ours=f"{IMAGE}/"),
            **under("text_model.", text, ours=f"{WORDS}/"),
            "text_projection": "text_model.head",
        }

    def special(self, model: TwoTower, size: Size) -> Sequence[Entry]:
        return [
            *(
                dataclasses.replace(
                    entry, ours=tuple(f"{IMAGE}/{name}" for name in entry.ours)
                )
                for entry in self.image.special(_image(model), size)
            ),
            _number("logit_scale", "log_temperature"),
            _number("logit_bias", "bias"),
        ]

    def describe(self, model: TwoTower, size: Size, channels: int) -> dict[str, Any]:
        if model.bias is None:
            raise ValueError(f"{self.name} has a bias, this model bias=none.")
        vision = self.image.describe(_image(model), size, channels)
        vision.pop("architectures")
        if model.features != vision["hidden_size"]:
            raise ValueError(
                f"{self.name} compares the {vision['hidden_size']} values that the "
                f"image tower gives, this model features={model.features}."
            )
        tower = model.text_tower
        acts = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
        text = {
            "model_type": "siglip_text_model",
            "vocab_size": tower.vocabulary,
            "hidden_size": tower.width,
            "intermediate_size": tower.mlp_dim,
            "num_hidden_layers": tower.depth,
            "num_attention_heads": tower.num_heads,
            "max_position_embeddings": tower.length,
            "hidden_act": acts[tower.activation],
            "layer_norm_eps": tower.norm_epsilon,
            "projection_size": model.features,
        }
        return {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "vision_config": vision,
            "text_config": text,
            "dtype": vision["dtype"],
        }


def _image(model: TwoTower) -> ViT:
    tower = model.image_tower
    assert isinstance(tower, ViT)  # `requires` says so
    return tower


def _number(theirs: str, ours: str) -> Entry:
    """Ties a number [1] of theirs to ours []."""

    def to_ours(arrays: Arrays, shapes: Sequence[Shape]) -> Arrays:
        if arrays[0].shape != (1,):
            raise ValueError(f"{arrays[0].shape} must be (1,)")
        return [np.reshape(arrays[0], ())]

    return Entry(
        theirs=(theirs,),
        ours=(ours,),
        to_ours=to_ours,
        to_theirs=lambda arrays: [np.reshape(arrays[0], (1,))],
    )


FORMATS = (HuggingFaceTwoTower(),)
