"""ResNet, ResNeXt and Wide ResNet of torchvision and timm, which share their names."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from big_vision_lite.conversion.engine import Entry, conv, dense, same
from big_vision_lite.conversion.families import resnet_builders
from big_vision_lite.conversion.formats import (
    STATISTICS,
    Architecture,
    Library,
    Weights,
)
from big_vision_lite.models.bit import Block
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.resnet import ResNet

COUNTERS = r".*\.num_batches_tracked"
# Theirs, ours.
NORM = {
    "weight": "{}/scale",
    "bias": "{}/bias",
    "running_mean": f"{STATISTICS}{{}}/mean",
    "running_var": f"{STATISTICS}{{}}/variance",
}
# Architectures of timm that are nothing but this model; the prefixes are old names.
PLAIN = re.compile(
    r"((tv|ig|ssl|swsl)_)?(resnet\d+|wide_resnet\d+_2|resnext\d+_\d+x\d+d)(\..*)?"
)
# Of timm's arguments: those that shapes show, and those that change no evaluation.
SHOWN = ("layers", "channels", "cardinality", "base_width", "num_classes", "in_chans")
TRAINING = ("drop_rate", "drop_path_rate", "drop_block_rate", "zero_init_last")
# What plain arguments are, given though they need not be.
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
# What a part of a name says about a model that is not plain.
UNSUPPORTED = {
    r"conv1\.\d+\..*": "a stem of three convolutions (timm's c, d, s and t variants)",
    r"maxpool\..*": "a convolution instead of the max-pooling",
    r".*\.(se|sk|eca|attn|conv2_attn)\..*": "attention between channels (SE, ECA, ...)",
    r".*\.downsample\.2\..*": "average pooling in the shortcuts (timm's d variants)",
    r".*\.conv2\.(conv|fc|bn)\d*\..*": "split or selective convolutions",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a residual unit is: stage and unit count from 0, `convs` in its branch."""

    stage: int
    unit: int
    convs: int
    projects: bool

    @property
    def ours(self) -> str:
        return f"stage_{self.stage + 1}/unit_{self.unit + 1:02d}"


def places(model: ResNet) -> Iterator[Place]:
    """Yields the units of a model, from the image on."""
    for stage, units in enumerate(model.stages):
        narrows = stage > 0 or model.channels(0) != model.stem_width
        for unit in range(units):
            yield Place(
                stage=stage,
                unit=unit,
                convs=2 if model.block == Block.BASIC else 3,
                projects=narrows and unit == 0,
            )


def norm(theirs: str, ours: str) -> list[Entry]:
    """Ties the four arrays of a batch norm."""
    return [same(f"{theirs}.{leaf}", name.format(ours)) for leaf, name in NORM.items()]


def counters(entries: Sequence[Entry]) -> dict[str, np.ndarray]:
    """Returns the numbers of batches that torch keeps beside the statistics: 0.

    Only a norm without momentum reads them.
    """
    names = [name for entry in entries for name in entry.theirs]
    return {
        name.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64)
        for name in names
        if name.endswith("running_var")
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchResNet:
    """Convolutions and norms are conv1, bn1, ...; stages layer1 to layer4."""

    name: str
    library: Library
    ignored: tuple[str, ...] = (COUNTERS,)
    model: type = ResNet

    def recognises(self, weights: Weights) -> bool:
        # timm's files say what they are in a config.json.
        of_timm = "architecture" in weights.config
        wanted = {"layer1.0.conv1.weight", "layer1.0.bn1.weight", "bn1.weight"}
        return wanted <= weights.arrays.keys() and (
            of_timm == (self.library == Library.TIMM)
        )

    def architecture(self, weights: Weights) -> Architecture:
        _check_plain(weights)
        arrays = weights.arrays
        stages = _stages(arrays, weights.path)
        basic = "layer1.0.conv3.weight" not in arrays
        last = "conv2" if basic else "conv3"
        outputs = [
            weights.shape(f"layer{index + 1}.0.{last}.weight", 4)[0]
            for index in range(len(stages))
        ]
        check_doubling(outputs, weights.path)
        width = outputs[0] if basic else outputs[0] // 4
        # Of the last stage, where rounding to whole channels hides least.
        inner, in_group = weights.shape(f"layer{len(stages)}.0.conv2.weight", 4)[:2]
        planes = width * 2 ** (len(stages) - 1)
        stem_width, channels, *_ = weights.shape("conv1.weight", 4)
        head = None
        if "fc.weight" in arrays:
            head = Classifier(num_classes=weights.shape("fc.weight", 2)[0])
        return Architecture(
            model=ResNet(
                stages=stages,
                width=width,
                stem_width=stem_width,
                block=Block.BASIC if basic else Block.BOTTLENECK,
                groups=1 if basic else inner // in_group,
                # The smallest that gives so many channels.
                width_per_group=64 if basic else -(-64 * in_group // planes),
                head=head,
            ),
            channels=channels,
        )

    def entries(self, model: ResNet, image_size: tuple[int, int]) -> Sequence[Entry]:
        table = [conv("conv1.weight", "stem/kernel"), *norm("bn1", "stem_norm")]
        for place in places(model):
            theirs, ours = f"layer{place.stage + 1}.{place.unit}", place.ours
            for index in range(1, place.convs + 1):
                table += [
                    conv(f"{theirs}.conv{index}.weight", f"{ours}/conv{index}/kernel"),
                    *norm(f"{theirs}.bn{index}", f"{ours}/norm{index}"),
                ]
            if place.projects:
                table += [
                    conv(f"{theirs}.downsample.0.weight", f"{ours}/conv_proj/kernel"),
                    *norm(f"{theirs}.downsample.1", f"{ours}/norm_proj"),
                ]
        if model.head is not None:
            table += [dense("fc.weight", "head/kernel"), same("fc.bias", "head/bias")]
        return table

    def constants(self, model: ResNet) -> dict[str, np.ndarray]:
        """Returns arrays that they have and we do not: counters of batches."""
        return counters(self.entries(model, (224, 224)))

    def describe(self, model: ResNet, image_size: tuple[int, int]) -> dict[str, Any]:
        if self.library == Library.TIMM:
            return resnet_builders.timm(model)
        return resnet_builders.torchvision(model)


def check_doubling(outputs: Sequence[int], path: str) -> None:
    """Refuses stages of which one does not have twice the channels of that before."""
    expected = [outputs[0] * 2**index for index in range(len(outputs))]
    if list(outputs) != expected:
        raise ValueError(
            f"{path} is a ResNet whose stages end in {list(outputs)} channels; here "
            f"every stage has twice those of the stage before, {expected}."
        )


def _check_plain(weights: Weights) -> None:
    found = [
        f"{what} ({name})"
        for pattern, what in UNSUPPORTED.items()
        for name in sorted(weights.arrays)
        if re.fullmatch(pattern, name)
    ]
    config = weights.config
    architecture = config.get("architecture")
    if architecture is not None and not PLAIN.fullmatch(architecture):
        found.append(f'the architecture "{architecture}"')
    for name, value in (config.get("model_args") or {}).items():
        if name in SHOWN or name in TRAINING or AT_DEFAULT.get(name) == value:
            continue
        found.append(f"{name}={value}")
    if "bn1.running_mean" not in weights.arrays:
        found.append("another norm than batch norm (no bn1.running_mean)")
    if "conv1.weight" in weights.arrays:
        height, width = weights.shape("conv1.weight", 4)[2:]
        if (height, width) != (7, 7):
            found.append(f"a stem of {height}x{width} (conv1.weight), not 7x7")
    if found:
        raise ValueError(
            f"{weights.path} is a ResNet with {found[0]}, which models/resnet.py does "
            "not have. It has the plain ones: resnet18 to 152, resnext, wide_resnet."
        )


def _stages(arrays: Mapping[str, np.ndarray], path: str) -> tuple[int, ...]:
    """Counts the units of layer1, layer2, ..."""
    units: dict[int, set[int]] = {}
    for name in arrays:
        if found := re.fullmatch(r"layer(\d+)\.(\d+)\.conv1\.weight", name):
            units.setdefault(int(found[1]), set()).add(int(found[2]))
    stages = tuple(len(units[stage]) for stage in sorted(units))
    whole = {stage: set(range(count)) for stage, count in enumerate(stages, start=1)}
    if units != whole:
        raise ValueError(
            f"{path} leaves out units of a ResNet; it has "
            f"{ {stage: sorted(units[stage]) for stage in sorted(units)} }."
        )
    return stages


FORMATS = (
    TorchResNet(name="timm ResNet", library=Library.TIMM),
    TorchResNet(name="torchvision ResNet", library=Library.TORCHVISION),
)
