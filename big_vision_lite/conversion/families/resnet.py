"""ResNet, ResNeXt and Wide ResNet of torchvision, timm and Hugging Face."""

import re
from collections.abc import Sequence
from typing import Any

from big_vision_lite.conversion import preprocessing
from big_vision_lite.conversion.assumption import of_architecture
from big_vision_lite.conversion.families import libraries
from big_vision_lite.conversion.formats import Architecture, Format, Library, Size
from big_vision_lite.conversion.tables import Rows, under
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.bit import Block, Stem
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.resnet import SIZES, ResNet

UNIT = "stage_{s}/unit_{u}"
TORCH: Rows = {
    "stem": "conv1",
    "stem_norm": "bn1",
    f"{UNIT}/conv{{i}}": "layer{s}.{u-1}.conv{i}",
    f"{UNIT}/norm{{i}}": "layer{s}.{u-1}.bn{i}",
    f"{UNIT}/conv_proj": "layer{s}.{u-1}.downsample.0",
    f"{UNIT}/norm_proj": "layer{s}.{u-1}.downsample.1",
    "head": "fc",
}
HUGGINGFACE: Rows = {
    "stem": "embedder.embedder.convolution",
    "stem_norm": "embedder.embedder.normalization",
    f"{UNIT}/conv{{i}}": "encoder.stages.{s-1}.layers.{u-1}.layer.{i-1}.convolution",
    f"{UNIT}/norm{{i}}": "encoder.stages.{s-1}.layers.{u-1}.layer.{i-1}.normalization",
    f"{UNIT}/conv_proj": "encoder.stages.{s-1}.layers.{u-1}.shortcut.convolution",
    f"{UNIT}/norm_proj": "encoder.stages.{s-1}.layers.{u-1}.shortcut.normalization",
}
# No library has small stems or a hidden layer in the head.
PLAIN = {"stem": Stem.LARGE, "head.hidden_dim": None}
HINTS = {**Format.hints, **libraries.LARGE_STEM}

# Architectures of timm that are exactly this model; the prefixes are old names.
NAMED = re.compile(
    r"((tv|ig|ssl|swsl)_)?(resnet\d+|wide_resnet\d+_2|resnext\d+_\d+x\d+d)(\..*)?"
)
# timm's arguments that shapes show, and those that change no evaluation.
SHOWN = ("layers", "channels", "cardinality", "base_width", "num_classes", "in_chans")
TRAINING = ("drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last")
# Defaults of arguments, which a configuration may write out.
AT_DEFAULT = {
    "output_stride": 32,
    "global_pool": "avg",
    "stem_type": "",
    "stem_width": 64,
    "avg_down": False,
    "replace_stem_pool": False,
    "down_kernel_size": 1,
    "block_reduce_first": 1,
}
# What names that match a pattern show about a model that is not plain.
UNSUPPORTED = {
    r"conv1\.\d+\..*": "a stem of three convolutions (timm's c, d, s and t variants)",
    r"maxpool\..*": "a convolution instead of the max-pooling",
    r".*\.(se|sk|eca|attn|conv2_attn)\..*": "attention between channels (SE, ECA, ...)",
    r".*\.downsample\.2\..*": "average pooling in the shortcuts (timm's d variants)",
    r".*\.conv2\.(conv|fc|bn)\d*\..*": "split or selective convolutions",
}
# Other ResNets have the same names and shapes.
PLAIN_BLOCKS = (
    "version 1.5 assumed (strides on the 3x3 convolutions, no dilation, ReLU, norms "
    "with epsilon 1e-5): no configuration came along"
)
# {our size: its name in timm and torchvision}.
NAMES = {
    size: {"R": "resnet", "X": "resnext", "W": "wide_resnet"}[size[0]] + size[1:]
    for size in SIZES
}


class TorchvisionResNet(Format):
    """torchvision's names: convolutions conv1, norms bn1, stages layer1 to layer4."""

    name = "torchvision ResNet"
    library = Library.TORCHVISION
    model = ResNet
    table = TORCH
    assumes = preprocessing.OF_TORCHVISION
    signs = ("layer1.0.conv1.weight", "layer1.0.bn1.weight", "bn1.weight")
    requires = {**PLAIN, "stem_width": 64, "head": Classifier}
    hints = HINTS

    def recognises(self, weights: Weights) -> bool:
        # timm's files have their architecture in a config.json.
        of_timm = "architecture" in weights.config
        return super().recognises(weights) and of_timm == (self.library == Library.TIMM)

    def architecture(self, weights: Weights) -> Architecture:
        _check_plain(weights)
        stages = weights.units(r"layer(\d+)\.(\d+)\.conv1\.weight")
        basic = "layer1.0.conv3.weight" not in weights.arrays
        last = "conv2" if basic else "conv3"
        outputs = [
            weights.shape(f"layer{index + 1}.0.{last}.weight", 4)[0]
            for index in range(len(stages))
        ]
        width = _width(outputs, basic, weights.path)
        # Read from the last stage, where rounding to whole channels matters least.
        inner, in_group = weights.shape(f"layer{len(stages)}.0.conv2.weight", 4)[:2]
        planes = width * 2 ** (len(stages) - 1)
        stem = weights.sizes({"conv1.weight": "width channels 7 7"})
        model = ResNet(
            stages=stages,
            width=width,
            stem_width=stem["width"],
            block=Block.BASIC if basic else Block.BOTTLENECK,
            groups=1 if basic else inner // in_group,
            # The smallest that gives `in_group` channels.
            width_per_group=64 if basic else -(-64 * in_group // planes),
            head=weights.head("fc.weight"),
        )
        return Architecture(
            model=model,
            channels=stem["channels"],
            assumptions=() if weights.config else of_architecture(PLAIN_BLOCKS),
        )

    def describe(self, model: ResNet, size: Size, channels: int) -> dict[str, Any]:
        plain = {n: name for n, name in NAMES.items() if n.startswith("R")}
        fitting = [
            name
            for published, name in plain.items()
            if _same(model, published, "stages", "block", "width")
        ]
        if not fitting:
            raise ValueError(
                f"torchvision builds no ResNet of stages={model.stages} and width="
                f"{model.width} with {model.block} units."
            )
        groups = {"groups": model.groups, "width_per_group": model.width_per_group}
        given = {} if tuple(groups.values()) == (1, 64) else groups
        return libraries.torchvision(fitting[0], model, channels, **given)


class TimmResNet(TorchvisionResNet):
    """timm's ResNet, in torchvision's names: four stages of any width."""

    name = "timm ResNet"
    library = Library.TIMM
    requires = {**PLAIN, "stem_width": 64}

    def describe(self, model: ResNet, size: Size, channels: int) -> dict[str, Any]:
        if len(model.stages) != 4:
            raise ValueError(
                f"timm's ResNet has 4 stages, this model has stages={model.stages}."
            )
        fields = ("stages", "width", "block", "groups", "width_per_group")
        # timm has no name for the widest ResNeXt.
        known = {n: NAMES[n] for n in SIZES if n != "X101_32x48d"}
        for published, name in known.items():
            if _same(model, published, *fields):
                return libraries.timm(name, model, channels)
        basic = model.block == Block.BASIC
        arguments: dict[str, Any] = {
            "layers": list(model.stages),
            "channels": [model.width * 2**index for index in range(4)],
        }
        if not basic:
            arguments["cardinality"] = model.groups
            arguments["base_width"] = model.width_per_group
        name = "resnet18" if basic else "resnet50"
        return libraries.timm(name, model, channels, **arguments)


class HuggingFaceResNet(Format):
    """Hugging Face's ResNetForImageClassification; `root` precedes backbone names."""

    name = "Hugging Face ResNet"
    library = Library.HUGGINGFACE
    model = ResNet
    root = "resnet."
    signs = (
        "resnet.embedder.embedder.convolution.weight",
        "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight",
    )
    requires = {**PLAIN, "groups": 1, "width_per_group": 64}
    hints = HINTS
    # Values that the configuration must have, or leave out.
    fixed = {
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }

    def architecture(self, weights: Weights) -> Architecture:
        config, path = weights.config, weights.path
        if config.get("model_type") != "resnet":
            raise ValueError(
                f"{path} has the names of Hugging Face's ResNet, but no config.json of "
                "one beside it, which says where it takes its strides. Give the folder "
                "that save_pretrained wrote."
            )
        for name, value in self.fixed.items():
            if config.get(name, value) != value:
                raise ValueError(
                    f"{path} is a ResNet with {name}={config[name]}; here it is "
                    f"{value}: models/resnet.py is version 1.5 with the stride on "
                    "the 3x3 convolutions and none in the first stage."
                )
        # Hugging Face's defaults for keys that the configuration leaves out.
        outputs = list(config.get("hidden_sizes", (256, 512, 1024, 2048)))
        basic = config.get("layer_type", "bottleneck") == "basic"
        convolution = f"{self.root}{HUGGINGFACE['stem']}.weight"
        stem = weights.sizes({convolution: "width channels _ _"})
        model = ResNet(
            stages=tuple(config.get("depths", (3, 4, 6, 3))),
            width=_width(outputs, basic, path),
            stem_width=stem["width"],
            block=Block.BASIC if basic else Block.BOTTLENECK,
            head=weights.head("classifier.1.weight"),
        )
        return Architecture(model=model, channels=stem["channels"])

    def rows(self, model: ResNet) -> Rows:
        return {**under(self.root, HUGGINGFACE), "head": "classifier.1"}

    def describe(self, model: ResNet, size: Size, channels: int) -> dict[str, Any]:
        if (model.head is None) == bool(self.root):
            raise ValueError(f"{self.name} is written with the other names.")
        head = model.head
        kind = "ResNetModel" if head is None else "ResNetForImageClassification"
        return {
            "architectures": [kind],
            "model_type": "resnet",
            "num_channels": channels,
            "embedding_size": model.stem_width,
            "hidden_sizes": [model.channels(i) for i in range(len(model.stages))],
            "depths": list(model.stages),
            "layer_type": model.block.value,
            **self.fixed,
            **({} if head is None else {"num_labels": head.num_classes}),
        }


class HuggingFaceResNetModel(HuggingFaceResNet):
    """Hugging Face's ResNetModel, which has no classifier."""

    name = "Hugging Face ResNet without a head"
    root = ""
    signs = tuple(sign.removeprefix("resnet.") for sign in HuggingFaceResNet.signs)


def _same(model: ResNet, size: str, *fields: str) -> bool:
    published = ResNet.of(size)
    return all(getattr(model, f) == getattr(published, f) for f in fields)


def _width(outputs: Sequence[int], basic: bool, path: str) -> int:
    """Returns the width of a ResNet whose stages end in `outputs` channels.

    Raises:
        ValueError: a stage does not have twice the channels of the one before.
    """
    expected = [outputs[0] * 2**index for index in range(len(outputs))]
    if list(outputs) != expected:
        raise ValueError(
            f"{path} is a ResNet whose stages end in {list(outputs)} channels; here "
            f"every stage has twice those of the stage before, {expected}."
        )
    return outputs[0] if basic else outputs[0] // 4


def _check_plain(weights: Weights) -> None:
    found = [
        f"{what} ({name})"
        for pattern, what in UNSUPPORTED.items()
        for name in sorted(weights.arrays)
        if re.fullmatch(pattern, name)
    ]
    config = weights.config
    architecture = config.get("architecture")
    if architecture is not None and not NAMED.fullmatch(architecture):
        found.append(f'the architecture "{architecture}"')
    for name, value in (config.get("model_args") or {}).items():
        if name in SHOWN or name in TRAINING or AT_DEFAULT.get(name) == value:
            continue
        found.append(f"{name}={value}")
    if "bn1.running_mean" not in weights.arrays:
        found.append("another norm than batch norm (no bn1.running_mean)")
    if found:
        raise ValueError(
            f"{weights.path} is a ResNet with {found[0]}, which models/resnet.py does "
            "not have. It has the plain ones: resnet18 to 152, resnext, wide_resnet."
        )


FORMATS = (
    HuggingFaceResNet(),
    HuggingFaceResNetModel(),
    TimmResNet(),
    TorchvisionResNet(),
)
