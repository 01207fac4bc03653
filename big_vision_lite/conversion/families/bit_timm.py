"""timm's ResNetV2: BiT (resnetv2_*_bit), and its form with norms after convolutions."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from big_vision_lite.conversion.engine import Entry, conv, norm
from big_vision_lite.conversion.families import bit_tables
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.bit import BiT, Block, PoolPadding
from big_vision_lite.models.bit_v1 import BiTV1, Standardisation, Trunk

UNIT = "stages.{stage}.blocks.{index}"
UNIT_PATTERN = r"stages\.(\d+)\.blocks\.(\d+)\."
# What surrounds the image where the stem takes maxima, by timm's stem_type.
PADDINGS = {"fixed": PoolPadding.ZEROS, "": PoolPadding.NEGATIVE_INFINITY}
# Units a stage and width factor of timm's BiTs; first the narrowest of each depth.
NAMES = {
    "resnetv2_50x1_bit": ((3, 4, 6, 3), 1),
    "resnetv2_101x1_bit": ((3, 4, 23, 3), 1),
    "resnetv2_152x2_bit": ((3, 8, 36, 3), 2),
    "resnetv2_50x3_bit": ((3, 4, 6, 3), 3),
    "resnetv2_101x3_bit": ((3, 4, 23, 3), 3),
    "resnetv2_152x4_bit": ((3, 8, 36, 3), 4),
}
# Arguments of its constructor that would change what is computed.
REFUSED = {"avg_down": False, "output_stride": 32, "act_layer": "relu"}
GROUPS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimmBiT(Format):
    """ResNetV2(preact=True), standardised with eps 1e-8, of which ours is no other."""

    name: str = "timm BiT"
    library: Library = Library.TIMM
    model: type = BiT
    ignored: tuple[str, ...] = ()

    def recognises(self, weights: Weights) -> bool:
        wanted = {"stem.conv.weight", "stages.0.blocks.0.norm1.weight", "norm.weight"}
        # Those with batch norm have running statistics.
        return wanted <= weights.arrays.keys() and "norm.running_var" not in (
            weights.arrays
        )

    def architecture(self, weights: Weights) -> Architecture:
        arrays = weights.arrays
        arguments = _arguments(weights)
        stem = weights.shape("stem.conv.weight", 4)
        bit_tables.check_root(weights.path, stem[2:])
        stem_type, notes = arguments.get("stem_type", "fixed"), ()
        if stem_type not in PADDINGS:
            raise ValueError(
                f'{weights.path}: stem_type="{stem_type}"; here it is one of '
                f"{sorted(PADDINGS)}."
            )
        if "stem_type" not in arguments and "_bit" not in _named(weights):
            notes = (
                "pool_padding=zeros assumed, that of all published BiT weights: no "
                "configuration came along",
            )
        basic = "stages.0.blocks.0.conv3.weight" not in arrays
        model = BiT(
            stages=bit_tables.count_units(arrays, UNIT_PATTERN),
            width=stem[0],
            block=Block.BASIC if basic else Block.BOTTLENECK,
            pool_padding=PADDINGS[stem_type],
            groups=GROUPS,
            head=bit_tables.head_of(weights, "head.fc.bias"),
        )
        return Architecture(model=model, channels=stem[1], notes=notes)

    def entries(
        self, model: BiT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        units = bit_tables.units_of_bit(model)
        return [
            conv("stem.conv.weight", "stem/kernel"),
            *bit_tables.torch_units(units, UNIT, v1=False),
            *norm("norm", "norm"),
            *_head(model),
        ]

    def describe(
        self, model: BiT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        bit_tables.check_expressible(model, what="timm's BiT")
        bit_tables.check_multiple("timm's BiT", model.width)
        if model.pool_padding != PoolPadding.ZEROS:
            raise ValueError(
                f"timm's BiTs have pool_padding=zeros, this model has pool_padding="
                f"{model.pool_padding}: other numbers near the border. Export it with "
                "--to npz (big_vision's form, which has it)."
            )
        if model.groups != GROUPS:
            raise ValueError(
                f"timm's BiTs have {GROUPS} groups, this model groups={model.groups}. "
                "Export it with --to huggingface, whose configuration says the number."
            )
        count = len(model.stages)
        fitting = {n: f for n, (s, f) in NAMES.items() if s[:count] == model.stages}
        if not fitting:
            raise ValueError(
                f"timm builds BiTs of 50, 101 and 152 layers, this one has stages="
                f"{model.stages}. Export it with --to huggingface or npz."
            )
        # One of the published widths, or one of the depth that is told another width.
        exact = [n for n, factor in fitting.items() if 64 * factor == model.width]
        name = (exact or list(fitting))[0]
        arguments = _model_args(model, fitting[name])
        return {"architecture": name, "model_args": arguments}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimmBiTV1(Format):
    """ResNetV2(preact=False, stem_type="same") with StdConv2dSame(eps=1e-8).

    timm has it inside hybrids only: by itself it comes in, and goes out nowhere.
    """

    name: str = "timm ResNetV2, norms after convolutions"
    library: Library = Library.TIMM
    model: type = BiTV1
    ignored: tuple[str, ...] = ()

    def recognises(self, weights: Weights) -> bool:
        wanted = {"stem.conv.weight", "stem.norm.weight"}
        return wanted <= weights.arrays.keys() and (
            "stem.norm.running_var" not in weights.arrays
        )

    def architecture(self, weights: Weights) -> Architecture:
        stem_type = _arguments(weights).get("stem_type")
        if stem_type not in ("same", None) or "_bit" in _named(weights):
            raise ValueError(
                f"{weights.path} pads as torch does (stem_type={stem_type!r}); here "
                'ResNets of this kind pad as TensorFlow does, timm\'s stem_type="same".'
            )
        return Architecture(
            model=BiTV1(
                trunk=trunk_of(weights, ""),
                head=bit_tables.head_of(weights, "head.fc.bias"),
            ),
            channels=weights.shape("stem.conv.weight", 4)[1],
            notes=()
            if stem_type
            else ('padding as of stem_type="same" assumed: no configuration says it',),
        )

    def entries(
        self, model: BiTV1, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        return [*trunk_entries(model.trunk, "", "trunk"), *_head(model)]

    def describe(
        self, model: BiTV1, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        raise ValueError(
            "timm has this ResNet (norms after convolutions, TensorFlow's padding) "
            "inside hybrid transformers only, no architecture by itself. Export it "
            "with --to huggingface or npz."
        )


def trunk_of(weights: Weights, root: str) -> Trunk:
    """Returns the trunk whose names begin with `root`, in timm's form."""
    arrays = weights.arrays
    # A trunk without stages is its root alone, and named so.
    stem = f"{root}stem." if f"{root}stem.conv.weight" in arrays else root
    kernel = weights.shape(f"{stem}conv.weight", 4)
    bit_tables.check_root(weights.path, kernel[2:])
    names = [name.removeprefix(root) for name in arrays if name.startswith(root)]
    return Trunk(
        stages=bit_tables.count_units(names, UNIT_PATTERN),
        width=kernel[0],
        groups=GROUPS,
        standardisation=Standardisation.INSIDE_ROOT,
        norm_epsilon=1e-5,
    )


def trunk_entries(trunk: Trunk, root: str, ours: str) -> Iterator[Entry]:
    """Yields the entries of a trunk; `root` is before timm's names, `ours` our name."""
    stem = f"{root}stem." if trunk.stages else root
    yield conv(f"{stem}conv.weight", f"{ours}/conv_root/kernel")
    yield from norm(f"{stem}norm", f"{ours}/gn_root")
    units = bit_tables.units_of_trunk(trunk, ours)
    yield from bit_tables.torch_units(units, f"{root}{UNIT}", v1=True)


def _head(model: BiT | BiTV1) -> Iterator[Entry]:
    if model.head is not None:
        yield from bit_tables.torch_head("head.fc", convolution=True)


def _named(weights: Weights) -> str:
    return str(weights.config.get("architecture", ""))


def _arguments(weights: Weights) -> dict[str, Any]:
    arguments = dict(weights.config.get("model_args", {}))
    for name, plain in REFUSED.items():
        if arguments.get(name, plain) != plain:
            raise ValueError(
                f"{weights.path}: {name}={arguments[name]}; here it is {plain}."
            )
    return arguments


def _model_args(model: BiT, factor: int) -> dict[str, Any]:
    """Returns the arguments that make timm's BiT of a width factor the model."""
    arguments: dict[str, Any] = {
        "num_classes": 0 if model.head is None else model.head.num_classes
    }
    if len(model.mean) > 1:
        arguments["in_chans"] = len(model.mean)
    basic = model.block == Block.BASIC
    if basic:
        arguments |= {"basic": True, "bottle_ratio": 1.0}
    if basic or model.width != 64 * factor or len(model.stages) != 4:
        # timm multiplies by the factor of the name, and rounds to multiples of 8.
        width = model.width / factor * (1 if basic else 4)
        channels = [width * 2**stage for stage in range(len(model.stages))]
        arguments |= {"channels": channels, "stem_chs": model.width / factor}
    return arguments


FORMATS = (TimmBiT(), TimmBiTV1())
