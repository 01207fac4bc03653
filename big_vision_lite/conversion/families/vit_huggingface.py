"""ViT and DeiT of Hugging Face's transformers, and what all ViTs there share.

Names are those in files; transformers 5 translates them when it loads a file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from big_vision_lite.conversion.assumption import of_architecture
from big_vision_lite.conversion.engine import Entry
from big_vision_lite.conversion.families import libraries, vit
from big_vision_lite.conversion.formats import Architecture, Format, Library, Size
from big_vision_lite.conversion.tables import Rows, under
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.blocks.mlp import Activation
from big_vision_lite.models.blocks.patches import Positions, grid_size
from big_vision_lite.models.blocks.pooling import Pooling
from big_vision_lite.models.vit import ViT

ACTIVATIONS = {
    "gelu": Activation.GELU_ERF,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
}
# Values of keys that a config.json leaves out: ViTConfig, DeiTConfig.
DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}


class HuggingFaceViT(Format):
    """Hugging Face's ViTForImageClassification, and ViTModel when there is no head.

    With a head, `root` precedes all names but the classifier's. `model_types` are those
    that a config.json may have; `defaults` are the keys that are read, with defaults.
    """

    name = "Hugging Face ViT"
    library = Library.HUGGINGFACE
    model = ViT
    # Classification does not go through the pooler.
    ignored: Sequence[str] = (r"(vit\.)?pooler\.dense\.(weight|bias)",)
    requires = vit.requires(
        *("positions", "norm_epsilon", "qkv_bias"),
        pooling=Pooling.CLASS_TOKEN,
        activation=vit.GELUS,
    )
    root = "vit."
    model_types: Sequence[str] = ("vit",)
    defaults = DEFAULTS
    kind, kind_of_body = "ViTForImageClassification", "ViTModel"
    patches = "embeddings.patch_embeddings.projection"
    positions = "embeddings.position_embeddings"
    block = "encoder.layer.{b}."
    last_norm = "layernorm"
    parts: Rows = {
        "attention_norm": "layernorm_before",
        "attention/query": "attention.attention.query",
        "attention/key": "attention.attention.key",
        "attention/value": "attention.attention.value",
        "attention/out": "attention.output.dense",
        "mlp_norm": "layernorm_after",
        "mlp/hidden": "intermediate.dense",
        "mlp/out": "output.dense",
    }

    def recognises(self, weights: Weights) -> bool:
        root = self.root if "classifier.weight" in weights.arrays else ""
        wanted = {
            f"{root}{self.positions}",
            f"{root}encoder.layer.0.layernorm_before.weight",
        }
        distilled = f"{root}embeddings.distillation_token"
        return wanted <= weights.arrays.keys() and distilled not in weights.arrays

    def architecture(self, weights: Weights) -> Architecture:
        config = self._config(weights)
        model = ViT(**self._fields(config, weights))
        note = "the pooler (a tanh layer) is left out: classification never uses it"
        has_pooler = any("pooler.dense" in name for name in weights.arrays)
        return _architecture(model, config, [note] if has_pooler else [])

    def rows(self, model: ViT) -> Rows:
        inside = {
            "patch_embedding": self.patches,
            **under(self.block, self.parts, ours=vit.BLOCK),
            "encoder/norm": self.last_norm,
        }
        return {**under(self._root(model), inside), "head": "classifier"}

    def special(self, model: ViT, size: Size) -> Sequence[Entry]:
        root, tokens = self._root(model), self.tokens(model)
        return [
            vit.tokens_and_positions(
                model,
                grid_size(*size, model.patch_size),
                positions=f"{root}{self.positions}",
                theirs={f"{root}{name}": 1 for name in tokens},
                ours=dict.fromkeys(tokens.values(), 1),
                rows=(len(tokens),),
            )
        ]

    def tokens(self, model: ViT) -> dict[str, str]:
        """Returns {theirs: ours} of the tokens that have a position there."""
        return {"embeddings.cls_token": "class_token"}

    def describe(self, model: ViT, size: Size, channels: int) -> dict[str, Any]:
        return {
            "architectures": [self.kind_of_body if model.head is None else self.kind],
            "model_type": self.model_types[0],
            **sizes_of(model, size, channels),
            "intermediate_size": model.mlp_dim,
            "qkv_bias": model.qkv_bias,
            **labels_of(model),
        }

    def _root(self, model: ViT) -> str:
        return "" if model.head is None else self.root

    def _config(self, weights: Weights) -> dict[str, Any]:
        """Returns the values of config.json, or of its vision part, for `defaults`.

        Raises:
            ValueError: config.json is missing or has another model_type.
        """
        kind = self.model_types[0]
        if not weights.config:
            raise ValueError(
                f"{weights.path} has the names of a Hugging Face {kind}, whose number "
                "of heads, activation and norm constant stand in its config.json: put "
                "that file beside the weights, or give the folder that holds both."
            )
        config = weights.config.get("vision_config", weights.config)
        for named in (weights.config, config):
            found = named.get("model_type", kind)
            if found not in self.model_types:
                raise ValueError(
                    f"{weights.path} has the names of a Hugging Face {kind}, but its "
                    f'config.json says model_type "{found}", which is not read here; '
                    f"{', '.join(self.model_types)} is."
                )
        return {key: config.get(key, value) for key, value in self.defaults.items()}

    def _fields(self, config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        """Returns the fields of our ViT that all these configurations have.

        Raises:
            ValueError: our ViT does not have the activation or the patches.
        """
        act, patch = config["hidden_act"], config["patch_size"]
        if act not in ACTIVATIONS:
            raise ValueError(
                f'{weights.path}: hidden_act "{act}" is not known here; '
                f"{', '.join(ACTIVATIONS)} are."
            )
        sides = set(patch) if isinstance(patch, list | tuple) else {patch}
        if len(sides) != 1:
            raise ValueError(
                f"{weights.path}: patches of {patch} px; only squares are known here."
            )
        return {
            "width": config["hidden_size"],
            "depth": config["num_hidden_layers"],
            "mlp_dim": config.get("intermediate_size"),
            "num_heads": config["num_attention_heads"],
            "patch_size": sides.pop(),
            "pooling": Pooling.CLASS_TOKEN,
            "positions": Positions.LEARNED,
            "activation": ACTIVATIONS[act],
            "norm_epsilon": config["layer_norm_eps"],
            "qkv_bias": config.get("qkv_bias", True),
            "head": weights.head("classifier.weight"),
        }


class HuggingFaceDeiT(HuggingFaceViT):
    """Hugging Face's DeiTForImageClassification, with and without teacher, DeiTModel.

    With one head the distillation token only takes part in attention, as a register
    does; its position is added to it.
    """

    name = "Hugging Face DeiT"
    ignored = (r"(deit\.)?pooler\.dense\.(weight|bias)",)
    requires = vit.requires(
        *("positions", "norm_epsilon", "qkv_bias", "registers", "distillation_token"),
        pooling=Pooling.CLASS_TOKEN,
        activation=vit.GELUS,
    )
    root = "deit."
    model_types = ("deit",)
    kind, kind_of_body = "DeiTForImageClassification", "DeiTModel"

    def recognises(self, weights: Weights) -> bool:
        first = "encoder.layer.0.layernorm_before.weight"
        return any(
            {f"{root}embeddings.distillation_token", f"{root}{first}"}
            <= weights.arrays.keys()
            for root in ("", "deit.")
        )

    def rows(self, model: ViT) -> Rows:
        if not model.distillation_token:
            return super().rows(model)
        heads = {
            "head": "cls_classifier",
            "distillation_head": "distillation_classifier",
        }
        return {**super().rows(model), **heads}

    def tokens(self, model: ViT) -> dict[str, str]:
        second = "distillation_token" if model.distillation_token else "registers"
        return {**super().tokens(model), "embeddings.distillation_token": second}

    def describe(self, model: ViT, size: Size, channels: int) -> dict[str, Any]:
        one_head = (model.registers, model.distillation_token) == (1, False)
        two_heads = (model.registers, model.distillation_token) == (0, True)
        if not two_heads and (not one_head or model.head is None):
            raise ValueError(
                f"{self.name} has a distillation token; this model has "
                f"distillation_token={model.distillation_token} and "
                f"registers={model.registers}."
            )
        described = super().describe(model, size, channels)
        if two_heads and model.head is not None:
            described["architectures"] = [f"{self.kind}WithTeacher"]
        return described

    def _fields(self, config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
        fields = super()._fields(config, weights)
        single = fields["head"] is not None
        head = fields["head"] or weights.head("cls_classifier.weight")
        tokens = {"registers": int(single), "distillation_token": not single}
        return {**fields, "head": head, **tokens}


def _architecture(
    model: ViT, config: Mapping[str, Any], notes: Sequence[str]
) -> Architecture:
    """Returns a model for the image size of its config, cut to whole patches."""
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
        image_size_px=size,
        channels=config["num_channels"],
        assumptions=of_architecture(*notes),
    )


def sizes_of(model: ViT, size: Size, channels: int) -> dict[str, Any]:
    """Returns the keys of config.json that all these models have."""
    height, width = size
    acts = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "hidden_act": acts.get(model.activation, "gelu"),
        "layer_norm_eps": model.norm_epsilon,
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_size,
        "num_channels": channels,
        "dtype": "float32",
    }


def labels_of(model: ViT) -> dict[str, Any]:
    return {} if model.head is None else libraries.labels(model.head.num_classes)


FORMATS = (HuggingFaceViT(), HuggingFaceDeiT())
