"""BiT and ResNet v1 with group norm, in timm's ResNetV2; what their formats share."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from big_vision_lite.conversion import engine, preprocessing
from big_vision_lite.conversion.assumption import of_architecture
from big_vision_lite.conversion.engine import Entry, Shape
from big_vision_lite.conversion.families import libraries
from big_vision_lite.conversion.formats import Architecture, Format, Library, Size
from big_vision_lite.conversion.tables import Rows, To, under
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.bit import BiT, Block, PoolPadding, Stem
from big_vision_lite.models.bit_v1 import BiTV1, Standardisation, Trunk

UNIT, UNIT_V1 = "block{s}/unit{u}", "block{s}_unit{u}"
TIMM_UNIT = r"stages\.(\d+)\.blocks\.(\d+)\."
# The padding of the stem's max-pooling, by timm's stem_type.
PADDINGS = {"fixed": PoolPadding.ZEROS, "": PoolPadding.NEGATIVE_INFINITY}
# Units per stage and width factor of timm's BiTs; first the narrowest of each depth.
NAMES = {
    "resnetv2_50x1_bit": ((3, 4, 6, 3), 1),
    "resnetv2_101x1_bit": ((3, 4, 23, 3), 1),
    "resnetv2_152x2_bit": ((3, 8, 36, 3), 2),
    "resnetv2_50x3_bit": ((3, 4, 6, 3), 3),
    "resnetv2_101x3_bit": ((3, 4, 23, 3), 3),
    "resnetv2_152x4_bit": ((3, 8, 36, 3), 4),
}
GROUPS = 32
# timm and Hugging Face round channels to multiples of this.
DIVISOR = 8
PLAIN = {"stem": Stem.LARGE, "head.hidden_dim": None}
HINTS = {
    **Format.hints,
    **libraries.LARGE_STEM,
    "pool_padding": "Other padding gives other numbers near the border.",
}
# Constants of a trunk in torch's libraries; big_vision has the defaults of Trunk.
TORCH_FORM: dict[str, Any] = {
    "standardisation": Standardisation.INSIDE_ROOT,
    "norm_epsilon": 1e-5,
}
# The standardisation alone could be moved into the kernels (times 1e-4 /
# sqrt(2e-5 std + 1e-10), exactly); the constant of the norms could not.
OTHER_NUMBERS = (
    "These are other numbers, by up to 7e-5 of the largest logit: set the fields to "
    "evaluate or fine-tune the weights in that form."
)


def in_field(field: str, form: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a format requires of the trunk in a field of the model."""
    return {f"{field}.{name}": value for name, value in form.items()}


def hints_on(field: str) -> dict[str, str]:
    """Returns hints on the constants of the trunk in a field of the model."""
    names = ("standardisation", "norm_epsilon")
    return {**Format.hints, **{f"{field}.{name}": OTHER_NUMBERS for name in names}}


def torch_units(ours: str, theirs: str) -> dict[str, str]:
    return {
        f"{ours}/conv{{i}}": f"{theirs}.conv{{i}}",
        f"{ours}/gn{{i}}": f"{theirs}.norm{{i}}",
        f"{ours}/conv_proj": f"{theirs}.downsample.conv",
        f"{ours}/gn_proj": f"{theirs}.downsample.norm",
    }


def _as_convolution(theirs: str, ours: Sequence[str], shapes: Sequence[Shape]) -> Entry:
    """Ties timm's head, a 1x1 convolution, to a dense layer."""
    if len(shapes[0]) == 1:
        return engine.same(theirs, ours[0])
    return dataclasses.replace(
        engine.dense(theirs, ours[0]),
        to_ours=lambda arrays, shapes: [arrays[0].reshape(arrays[0].shape[:2]).T],
        to_theirs=lambda arrays: [arrays[0].T[:, :, None, None]],
    )


TIMM: Rows = {
    "stem": "stem.conv",
    **torch_units(UNIT, "stages.{s-1}.blocks.{u-1}"),
    "norm": "norm",
    "head": To(theirs="head.fc", layout=_as_convolution),
}
TIMM_TRUNK: Rows = {
    "conv_root": "stem.conv",
    "gn_root": "stem.norm",
    **torch_units(UNIT_V1, "stages.{s-1}.blocks.{u-1}"),
}


class TimmBiT(Format):
    """timm's ResNetV2(preact=True); its eps 1e-8 gives the numbers of our 1e-10."""

    name = "timm BiT"
    library = Library.TIMM
    model = BiT
    table = TIMM
    assumes = preprocessing.OF_TIMMS_BIT
    signs = ("stem.conv.weight", "stages.0.blocks.0.norm1.weight", "norm.weight")
    # Models with batch norm have it.
    strangers = ("norm.running_var",)
    requires = {**PLAIN, "pool_padding": PoolPadding.ZEROS, "groups": GROUPS}
    hints = HINTS

    def architecture(self, weights: Weights) -> Architecture:
        arguments = _arguments(weights)
        stem = weights.sizes({"stem.conv.weight": "width channels 7 7"})
        stem_type, words = arguments.get("stem_type", "fixed"), ()
        if stem_type not in PADDINGS:
            raise ValueError(
                f'{weights.path}: stem_type="{stem_type}"; here it is one of '
                f"{sorted(PADDINGS)}."
            )
        if "stem_type" not in arguments and "_bit" not in _named(weights):
            words = (
                "pool_padding=zeros assumed, that of all published BiT weights: no "
                "configuration came along",
            )
        basic = "stages.0.blocks.0.conv3.weight" not in weights.arrays
        model = BiT(
            stages=weights.units(TIMM_UNIT),
            width=stem["width"],
            block=Block.BASIC if basic else Block.BOTTLENECK,
            pool_padding=PADDINGS[stem_type],
            groups=GROUPS,
            head=weights.head("head.fc.bias", "classes"),
        )
        return Architecture(
            model=model,
            channels=stem["channels"],
            assumptions=of_architecture(*words),
        )

    def describe(self, model: BiT, size: Size, channels: int) -> dict[str, Any]:
        check_multiple(self.name, model.width)
        count = len(model.stages)
        fitting = {n: f for n, (s, f) in NAMES.items() if s[:count] == model.stages}
        if not fitting:
            raise ValueError(
                f"timm builds BiTs of 50, 101 and 152 layers, this one has stages="
                f"{model.stages}."
            )
        # A published width, or a model of this depth that gets another width.
        exact = [n for n, factor in fitting.items() if 64 * factor == model.width]
        name = (exact or list(fitting))[0]
        factor, arguments = fitting[name], {}
        basic = model.block == Block.BASIC
        if basic:
            arguments = {"basic": True, "bottle_ratio": 1.0}
        if basic or not exact or count != 4:
            # timm multiplies by the factor of the name, and rounds to multiples of 8.
            width = model.width / factor * (1 if basic else 4)
            arguments["channels"] = [width * 2**stage for stage in range(count)]
            arguments["stem_chs"] = model.width / factor
        return libraries.timm(name, model, channels, **arguments)


class TimmBiTV1(Format):
    """timm's ResNetV2(preact=False, stem_type="same") with StdConv2dSame(eps=1e-8).

    timm has it inside hybrids only: by itself it is read, but not exported.
    """

    name = "timm ResNetV2, norms after convolutions"
    library = Library.TIMM
    model = BiTV1
    table: Rows = {**under("", TIMM_TRUNK, ours="trunk/"), "head": TIMM["head"]}
    assumes = preprocessing.OF_TIMMS_BIT
    signs = ("stem.conv.weight", "stem.norm.weight")
    strangers = ("stem.norm.running_var",)

    def architecture(self, weights: Weights) -> Architecture:
        stem_type = _arguments(weights).get("stem_type")
        if stem_type not in ("same", None) or "_bit" in _named(weights):
            raise ValueError(
                f"{weights.path} pads as torch does (stem_type={stem_type!r}); here "
                'ResNets of this kind pad as TensorFlow does, timm\'s stem_type="same".'
            )
        note = 'padding as of stem_type="same" assumed: no configuration says it'
        trunk, channels = timm_trunk(weights, "")
        return Architecture(
            model=BiTV1(trunk=trunk, head=weights.head("head.fc.bias", "classes")),
            channels=channels,
            assumptions=() if stem_type else of_architecture(note),
        )

    def describe(self, model: BiTV1, size: Size, channels: int) -> dict[str, Any]:
        raise ValueError(
            "timm has this ResNet (norms after convolutions, TensorFlow's padding) "
            "inside hybrid transformers only, no architecture by itself."
        )


def timm_trunk(weights: Weights, root: str) -> tuple[Trunk, int]:
    """Returns the trunk whose names begin with `root`, and the channels of images."""
    # A trunk without stages is its stem alone, without "stem." in the names.
    stem = f"{root}stem." if f"{root}stem.conv.weight" in weights.arrays else root
    sizes = weights.sizes({f"{stem}conv.weight": "width channels 7 7"})
    stages = weights.units(re.escape(root) + TIMM_UNIT)
    trunk = Trunk(stages=stages, width=sizes["width"], groups=GROUPS, **TORCH_FORM)
    return trunk, sizes["channels"]


def check_multiple(what: str, width: int) -> None:
    if width % DIVISOR:
        raise ValueError(
            f"{what} rounds channels to multiples of {DIVISOR}, width={width} is none."
        )


def _named(weights: Weights) -> str:
    return str(weights.config.get("architecture", ""))


def _arguments(weights: Weights) -> dict[str, Any]:
    """Returns timm's arguments; raises ValueError for those that change the numbers."""
    arguments = dict(weights.config.get("model_args", {}))
    for name, plain in {
        "avg_down": False,
        "output_stride": 32,
        "act_layer": "relu",
    }.items():
        if arguments.get(name, plain) != plain:
            raise ValueError(
                f"{weights.path}: {name}={arguments[name]}; here it is {plain}."
            )
    return arguments


FORMATS = (TimmBiT(), TimmBiTV1())
