"""ResNet of Hugging Face: ResNetForImageClassification and ResNetModel."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from big_vision_lite.conversion.engine import Entry, conv, dense, same
from big_vision_lite.conversion.families.resnet_builders import check_exportable
from big_vision_lite.conversion.families.resnet_torch import (
    COUNTERS,
    check_doubling,
    counters,
    norm,
    places,
)
from big_vision_lite.conversion.formats import Architecture, Library, Weights
from big_vision_lite.models.bit import Block
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.resnet import ResNet

STEM = "embedder.embedder.convolution.weight"
# What their configuration must say, or leave out, for this to be its model.
REQUIRED = {
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceResNet:
    """`prefix` precedes all names but the classifier's."""

    name: str
    prefix: str
    library: Library = Library.HUGGINGFACE
    ignored: tuple[str, ...] = (COUNTERS,)
    model: type = ResNet

    def recognises(self, weights: Weights) -> bool:
        first = f"{self.prefix}encoder.stages.0.layers.0.layer.0.convolution.weight"
        return {f"{self.prefix}{STEM}", first} <= weights.arrays.keys()

    def architecture(self, weights: Weights) -> Architecture:
        config, path = weights.config, weights.path
        if config.get("model_type") != "resnet":
            raise ValueError(
                f"{path} has the names of Hugging Face's ResNet, but no config.json of "
                "one beside it, which says where it takes its strides. Give the folder "
                "that save_pretrained wrote."
            )
        for name, required in REQUIRED.items():
            if config.get(name, required) != required:
                raise ValueError(
                    f"{path} is a ResNet with {name}={config[name]}; here it is "
                    f"{required}: models/resnet.py is version 1.5 with the stride on "
                    "the 3x3 convolutions and none in the first stage."
                )
        # What the configuration leaves out is its default there.
        depths = tuple(config.get("depths", (3, 4, 6, 3)))
        outputs = list(config.get("hidden_sizes", (256, 512, 1024, 2048)))
        basic = config.get("layer_type", "bottleneck") == "basic"
        check_doubling(outputs, path)
        head = None
        if "classifier.1.weight" in weights.arrays:
            classes = weights.shape("classifier.1.weight", 2)[0]
            head = Classifier(num_classes=classes)
        stem_width, channels = weights.shape(f"{self.prefix}{STEM}", 4)[:2]
        return Architecture(
            model=ResNet(
                stages=depths,
                width=outputs[0] if basic else outputs[0] // 4,
                stem_width=stem_width,
                block=Block.BASIC if basic else Block.BOTTLENECK,
                head=head,
            ),
            channels=channels,
        )

    def entries(self, model: ResNet, image_size: tuple[int, int]) -> Sequence[Entry]:
        root = f"{self.prefix}embedder.embedder"
        table = [
            conv(f"{root}.convolution.weight", "stem/kernel"),
            *norm(f"{root}.normalization", "stem_norm"),
        ]
        for place in places(model):
            ours = place.ours
            unit = f"{self.prefix}encoder.stages.{place.stage}.layers.{place.unit}"
            pairs = {
                f"{unit}.layer.{index}": str(index + 1) for index in range(place.convs)
            }
            if place.projects:
                pairs[f"{unit}.shortcut"] = "_proj"
            for theirs, which in pairs.items():
                table += [
                    conv(f"{theirs}.convolution.weight", f"{ours}/conv{which}/kernel"),
                    *norm(f"{theirs}.normalization", f"{ours}/norm{which}"),
                ]
        if model.head is not None:
            table += [
                dense("classifier.1.weight", "head/kernel"),
                same("classifier.1.bias", "head/bias"),
            ]
        return table

    def constants(self, model: ResNet) -> dict[str, np.ndarray]:
        """Returns arrays that they have and we do not: counters of batches."""
        return counters(self.entries(model, (224, 224)))

    def describe(self, model: ResNet, image_size: tuple[int, int]) -> dict[str, Any]:
        check_exportable(model, "Hugging Face")
        if (model.groups, model.width_per_group) != (1, 64):
            raise ValueError(
                f"Hugging Face's ResNet has no groups={model.groups} of width_per_group"
                f"={model.width_per_group}. Export it with --to timm."
            )
        if (model.head is None) == bool(self.prefix):
            raise ValueError(f"{self.name} is written with the other names.")
        described: dict[str, Any] = {
            "architectures": [
                "ResNetModel" if model.head is None else "ResNetForImageClassification"
            ],
            "model_type": "resnet",
            "num_channels": len(model.mean) if len(model.mean) > 1 else 3,
            "embedding_size": model.stem_width,
            "hidden_sizes": [model.channels(i) for i in range(len(model.stages))],
            "depths": list(model.stages),
            "layer_type": model.block.value,
            **REQUIRED,
        }
        if model.head is not None:
            described["num_labels"] = model.head.num_classes
        return described


FORMATS = (
    HuggingFaceResNet(name="Hugging Face ResNet", prefix="resnet."),
    HuggingFaceResNet(name="Hugging Face ResNet without a head", prefix=""),
)
