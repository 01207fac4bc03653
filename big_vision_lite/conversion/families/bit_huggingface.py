"""Hugging Face's Bit: BiT (layer_type preactivation), BiTV1 (bottleneck)."""

from collections.abc import Mapping
from typing import Any

from big_vision_lite.conversion.families import libraries
from big_vision_lite.conversion.families.bit import (
    HINTS,
    PLAIN,
    TORCH_FORM,
    UNIT,
    UNIT_V1,
    check_multiple,
    hints_on,
    in_field,
    torch_units,
)
from big_vision_lite.conversion.formats import Architecture, Format, Library, Size
from big_vision_lite.conversion.tables import Rows, under
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.bit import BiT, Block, PoolPadding
from big_vision_lite.models.bit_v1 import BiTV1, Trunk

# Values of keys that a config.json leaves out: BitConfig.
DEFAULTS: Mapping[str, Any] = {
    "embedding_size": 64,
    "layer_type": "preactivation",
    "hidden_act": "relu",
    "global_padding": None,
    "num_groups": 32,
    "embedding_dynamic_padding": False,
    "output_stride": 32,
}
HUGGINGFACE: Rows = {
    "stem": "embedder.convolution",
    **torch_units(UNIT, "encoder.stages.{s-1}.layers.{u-1}"),
    "norm": "norm",
}
HUGGINGFACE_TRUNK: Rows = {
    "trunk/conv_root": "embedder.convolution",
    "trunk/gn_root": "embedder.norm",
    **torch_units(f"trunk/{UNIT_V1}", "encoder.stages.{s-1}.layers.{u-1}"),
}


class HuggingFaceBiT(Format):
    """Hugging Face's BitForImageClassification, and BitModel when there is no head.

    `layer_type` and `padding` are the values that its config.json must have.
    """

    name = "Hugging Face BiT"
    library = Library.HUGGINGFACE
    model = BiT
    requires = {
        **PLAIN,
        "block": Block.BOTTLENECK,
        "pool_padding": PoolPadding.ZEROS,
    }
    hints = HINTS
    table = HUGGINGFACE
    layer_type = "preactivation"
    padding: str | None = None

    def recognises(self, weights: Weights) -> bool:
        root = _root(weights)
        has_norm = f"{root}embedder.norm.weight" in weights.arrays
        return root is not None and has_norm == (self.padding is not None)

    def architecture(self, weights: Weights) -> Architecture:
        config = self._config(weights)
        stem = weights.sizes(
            {f"{_root(weights)}embedder.convolution.weight": "width channels 7 7"}
        )
        model = self._model(
            _stages(weights),
            stem["width"],
            config["num_groups"],
            weights.head("classifier.1.bias", "classes"),
        )
        return Architecture(model=model, channels=stem["channels"])

    def rows(self, model: Any) -> Rows:
        root = "" if model.head is None else "bit."
        return {**under(root, self.table), "head": "classifier.1"}

    def describe(self, model: Any, size: Size, channels: int) -> dict[str, Any]:
        trunk = getattr(model, "trunk", model)
        if not trunk.stages:
            raise ValueError(f"{self.name} has stages; this model has none.")
        check_multiple(self.name, trunk.width)
        head, stages = model.head, len(trunk.stages)
        return {
            "architectures": [
                "BitModel" if head is None else "BitForImageClassification"
            ],
            "model_type": "bit",
            "num_channels": channels,
            "embedding_size": trunk.width,
            # Not width_factor: the last norm does not follow it there.
            "hidden_sizes": [4 * trunk.width * 2**stage for stage in range(stages)],
            "depths": list(trunk.stages),
            "num_groups": trunk.groups,
            "output_stride": max(32, _output_stride(stages)),
            "layer_type": self.layer_type,
            "hidden_act": "relu",
            "global_padding": self.padding,
            "embedding_dynamic_padding": self.padding is not None,
            "width_factor": 1,
            **libraries.labels(2 if head is None else head.num_classes),
        }

    def _model(self, stages: Any, width: int, groups: int, head: Any) -> Any:
        padding = PoolPadding.ZEROS
        return BiT(
            stages=stages, width=width, groups=groups, pool_padding=padding, head=head
        )

    def _config(self, weights: Weights) -> dict[str, Any]:
        """Returns the configuration with defaults filled in.

        Raises:
            ValueError: it describes another model.
        """
        config = {**DEFAULTS, **weights.config}
        padding = config["global_padding"]
        config["global_padding"] = padding.upper() if padding else None
        wanted = {
            "hidden_act": "relu",
            "layer_type": self.layer_type,
            "global_padding": self.padding,
            "embedding_dynamic_padding": self.padding is not None,
        }
        for name, value in wanted.items():
            # Without a configuration the names decide alone.
            if weights.config and config[name] != value:
                raise ValueError(
                    f"{weights.path}: config.json has {name}={config[name]}; with "
                    f"these weights only {name}={value} is read."
                )
        smallest = _output_stride(len(_stages(weights)))
        if config["output_stride"] < smallest:
            raise ValueError(
                f"{weights.path}: config.json has output_stride="
                f"{config['output_stride']}, dilated convolutions; here all are "
                f"strided, output_stride={smallest}."
            )
        return config


class HuggingFaceBiTV1(HuggingFaceBiT):
    """Hugging Face's Bit with layer_type="bottleneck" and TensorFlow's padding."""

    name = "Hugging Face BiT, norms after convolutions"
    model = BiTV1
    requires = {"head.hidden_dim": None, **in_field("trunk", TORCH_FORM)}
    hints = hints_on("trunk")
    table = HUGGINGFACE_TRUNK
    layer_type = "bottleneck"
    padding = "SAME"

    def _model(self, stages: Any, width: int, groups: int, head: Any) -> Any:
        trunk = Trunk(stages=stages, width=width, groups=groups, **TORCH_FORM)
        return BiTV1(trunk=trunk, head=head)


def _root(weights: Weights) -> str | None:
    """Returns the prefix of the backbone's names, None if they are another model's."""
    for root in ("bit.", ""):
        first = f"{root}encoder.stages.0.layers.0.conv1.weight"
        if {f"{root}embedder.convolution.weight", first} <= weights.arrays.keys():
            return root
    return None


def _stages(weights: Weights) -> tuple[int, ...]:
    return weights.units(r"(?:bit\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.")


def _output_stride(num_stages: int) -> int:
    """Returns the stride of the last stage; Hugging Face dilates for smaller ones."""
    return 2 ** (num_stages + 1)


FORMATS = (HuggingFaceBiT(), HuggingFaceBiTV1())
