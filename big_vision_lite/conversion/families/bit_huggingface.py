"""Hugging Face's Bit: BiT (layer_type preactivation), BiTV1 (bottleneck)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from big_vision_lite.conversion.engine import Entry, conv, norm
from big_vision_lite.conversion.families import bit_tables
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.bit import BiT, Block, PoolPadding
from big_vision_lite.models.bit_v1 import BiTV1, Standardisation, Trunk

# What a config.json that leaves a key out means: BitConfig.
DEFAULTS: Mapping[str, Any] = {
    "embedding_size": 64,
    "layer_type": "preactivation",
    "hidden_act": "relu",
    "global_padding": None,
    "num_groups": 32,
    "embedding_dynamic_padding": False,
    "output_stride": 32,
}
UNIT = "encoder.stages.{stage}.layers.{index}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceBiT(Format):
    """BitForImageClassification, and BitModel when there is no head."""

    name: str = "Hugging Face BiT"
    library: Library = Library.HUGGINGFACE
    model: type = BiT
    ignored: tuple[str, ...] = ()

    def recognises(self, weights: Weights) -> bool:
        return _root(weights) is not None and not _has_stem_norm(weights)

    def architecture(self, weights: Weights) -> Architecture:
        config = _config_of(
            weights,
            layer_type="preactivation",
            global_padding=None,
            embedding_dynamic_padding=False,
        )
        stem = _stem(weights)
        model = BiT(
            stages=_stages(weights),
            width=stem[0],
            pool_padding=PoolPadding.ZEROS,
            groups=config["num_groups"],
            head=bit_tables.head_of(weights, "classifier.1.bias"),
        )
        return Architecture(model=model, channels=stem[1])

    def entries(
        self, model: BiT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        root = _root_for(model)
        units = bit_tables.units_of_bit(model)
        return [
            conv(f"{root}embedder.convolution.weight", "stem/kernel"),
            *bit_tables.torch_units(units, f"{root}{UNIT}", v1=False),
            *norm(f"{root}norm", "norm"),
            *_head(model),
        ]

    def describe(
        self, model: BiT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        what = "Hugging Face's BiT"
        bit_tables.check_expressible(model, what=what)
        bit_tables.check_multiple(what, model.width)
        if model.block != Block.BOTTLENECK or model.pool_padding != PoolPadding.ZEROS:
            raise ValueError(
                f"{what} has block=bottleneck and pool_padding=zeros, this model has "
                f"block={model.block} and pool_padding={model.pool_padding}. Export it "
                "with --to npz or safetensors."
            )
        sizes = _sizes(model.stages, model.width, model.groups)
        return _described(model, sizes, "preactivation", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceBiTV1(Format):
    """Bit with layer_type="bottleneck" and TensorFlow's padding."""

    name: str = "Hugging Face BiT, norms after convolutions"
    library: Library = Library.HUGGINGFACE
    model: type = BiTV1
    ignored: tuple[str, ...] = ()

    def recognises(self, weights: Weights) -> bool:
        return _root(weights) is not None and _has_stem_norm(weights)

    def architecture(self, weights: Weights) -> Architecture:
        config = _config_of(
            weights,
            layer_type="bottleneck",
            global_padding="SAME",
            embedding_dynamic_padding=True,
        )
        stem = _stem(weights)
        model = BiTV1(
            trunk=Trunk(
                stages=_stages(weights),
                width=stem[0],
                groups=config["num_groups"],
                standardisation=Standardisation.INSIDE_ROOT,
                norm_epsilon=1e-5,
            ),
            head=bit_tables.head_of(weights, "classifier.1.bias"),
        )
        return Architecture(model=model, channels=stem[1])

    def entries(
        self, model: BiTV1, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        root = _root_for(model)
        units = bit_tables.units_of_trunk(model.trunk, "trunk")
        return [
            conv(f"{root}embedder.convolution.weight", "trunk/conv_root/kernel"),
            *norm(f"{root}embedder.norm", "trunk/gn_root"),
            *bit_tables.torch_units(units, f"{root}{UNIT}", v1=True),
            *_head(model),
        ]

    def describe(
        self, model: BiTV1, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        what = "Hugging Face's BiT with norms after convolutions"
        trunk = model.trunk
        bit_tables.check_head(model.head, what=what)
        bit_tables.check_torch_form(trunk, what=what)
        if not trunk.stages:
            raise ValueError(f"{what} has stages; this model has none.")
        sizes = _sizes(trunk.stages, trunk.width, trunk.groups)
        return _described(model, sizes, "bottleneck", "SAME")


def _root(weights: Weights) -> str | None:
    """Returns what stands before the names of the backbone, None in other models."""
    for root in ("bit.", ""):
        first = f"{root}encoder.stages.0.layers.0.conv1.weight"
        if {f"{root}embedder.convolution.weight", first} <= weights.arrays.keys():
            return root
    return None


def _root_for(model: BiT | BiTV1) -> str:
    return "" if model.head is None else "bit."


def _has_stem_norm(weights: Weights) -> bool:
    return f"{_root(weights)}embedder.norm.weight" in weights.arrays


def _stem(weights: Weights) -> tuple[int, ...]:
    """Returns (width, channels, ...) of the root convolution."""
    stem = weights.shape(f"{_root(weights)}embedder.convolution.weight", 4)
    bit_tables.check_root(weights.path, stem[2:])
    return stem


def _stages(weights: Weights) -> tuple[int, ...]:
    root = _root(weights) or ""
    pattern = r"encoder\.stages\.(\d+)\.layers\.(\d+)\."
    names = [name.removeprefix(root) for name in weights.arrays]
    return bit_tables.count_units(names, pattern)


def _config_of(weights: Weights, **wanted: Any) -> dict[str, Any]:
    """Returns the configuration with defaults filled in.

    Raises:
        ValueError: it has another value than wanted, or another activation.
    """
    config = {**DEFAULTS, **weights.config}
    padding = config["global_padding"]
    config["global_padding"] = padding.upper() if padding else None
    for name, value in {"hidden_act": "relu", **wanted}.items():
        # Without a configuration the names must do.
        if weights.config and config[name] != value:
            raise ValueError(
                f"{weights.path}: config.json has {name}={config[name]}; with these "
                f"weights only {name}={value} is read."
            )
    smallest = _output_stride(len(_stages(weights)))
    if config["output_stride"] < smallest:
        raise ValueError(
            f"{weights.path}: config.json has output_stride={config['output_stride']}, "
            f"dilated convolutions; here all are strided, output_stride={smallest}."
        )
    return config


def _head(model: BiT | BiTV1) -> Iterator[Entry]:
    if model.head is not None:
        yield from bit_tables.torch_head("classifier.1", convolution=False)


def _sizes(stages: tuple[int, ...], width: int, groups: int) -> dict[str, Any]:
    return {
        "embedding_size": width,
        # Not width_factor: the last norm does not follow it there.
        "hidden_sizes": [4 * width * 2**stage for stage in range(len(stages))],
        "depths": list(stages),
        "num_groups": groups,
        "output_stride": max(32, _output_stride(len(stages))),
    }


def _output_stride(num_stages: int) -> int:
    """Returns the stride of the last stage; below it the other side would dilate."""
    return 2 ** (num_stages + 1)


def _described(
    model: BiT | BiTV1, sizes: dict[str, Any], layer_type: str, padding: str | None
) -> dict[str, Any]:
    head = model.head
    count = 2 if head is None else head.num_classes
    kind = "BitModel" if head is None else "BitForImageClassification"
    return {
        "architectures": [kind],
        "model_type": "bit",
        "num_channels": len(model.mean) if len(model.mean) > 1 else 3,
        **sizes,
        "layer_type": layer_type,
        "hidden_act": "relu",
        "global_padding": padding,
        "embedding_dynamic_padding": padding is not None,
        "width_factor": 1,
        "id2label": {str(index): f"LABEL_{index}" for index in range(count)},
        "label2id": {f"LABEL_{index}": index for index in range(count)},
    }


FORMATS = (HuggingFaceBiT(), HuggingFaceBiTV1())
