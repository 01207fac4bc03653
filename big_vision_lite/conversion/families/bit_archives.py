"""BiT in npz archives: the first ones, big_vision's bit_paper, and big_vision's bit."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from big_vision_lite.conversion import engine, preprocessing, tables
from big_vision_lite.conversion.assumption import of_architecture
from big_vision_lite.conversion.engine import Entry, Shape
from big_vision_lite.conversion.families.bit import (
    GROUPS,
    HINTS,
    PLAIN,
    UNIT,
    UNIT_V1,
    hints_on,
    in_field,
)
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.tables import Rows, To, under
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.bit import BiT, Block, PoolPadding
from big_vision_lite.models.bit_v1 import BiTV1, Standardisation, Trunk

ARCHIVE_UNIT = r"block(\d+)/unit(\d+)/"
# Constants of a trunk in big_vision.
ARCHIVE_FORM: dict[str, Any] = {
    "standardisation": Standardisation.OUTSIDE_ROOT,
    "norm_epsilon": 1e-6,
    "groups": GROUPS,
}


def _with_axes(theirs: str, ours: Sequence[str], shapes: Sequence[Shape]) -> Entry:
    """Ties scales, biases and head kernels to arrays with leading axes of size 1.

    Reads any shape of the same numbers, because programs differ in that of norms.
    """
    if ours[0] == "head/bias":
        return engine.same(theirs, ours[0])
    ones = (1,) * (4 - len(shapes[0]))
    return engine.reshaped(theirs, ours[0], lambda shape: (*ones, *shape))


def _flat(theirs: str, ours: Sequence[str], shapes: Sequence[Shape]) -> Entry:
    """Ties norms: writes our shape, and reads any shape of the same numbers."""
    return engine.reshaped(theirs, ours[0], lambda shape: shape)


FIRST_UNIT = "resnet/block{s}/unit{u:02d}"
FIRST: Rows = {
    "stem": "resnet/root_block/standardized_conv2d",
    **{
        f"{UNIT}/conv{ours}": f"{FIRST_UNIT}/{theirs}/standardized_conv2d"
        for ours, theirs in {"1": "a", "2": "b", "3": "c", "_proj": "a/proj"}.items()
    },
    **{
        f"{UNIT}/gn{index}": To(theirs=f"{FIRST_UNIT}/{part}/group_norm", layout=_flat)
        for index, part in enumerate("abc", start=1)
    },
    "norm": To(theirs="resnet/group_norm", layout=_flat),
    "head": To(theirs="resnet/head/conv2d", layout=_with_axes),
}
PAPER: Rows = {
    "stem": "root_block/conv_root",
    f"{UNIT}/conv{{i}}": "block{s}/unit{u:02d}/conv{i}",
    f"{UNIT}/gn{{i}}": To(theirs="block{s}/unit{u:02d}/gn{i}", layout=_with_axes),
    f"{UNIT}/conv_proj": "block{s}/unit{u:02d}/conv_proj",
    "norm": To(theirs="norm-pre-head", layout=_with_axes),
    "head": "head",
}
ARCHIVE_TRUNK: Rows = {
    "conv_root": "conv_root",
    "gn_root": To(theirs="gn_root", layout=_flat),
    f"{UNIT_V1}/conv{{i}}": "block{s}/unit{u}/conv{i}",
    f"{UNIT_V1}/gn{{i}}": To(theirs="block{s}/unit{u}/gn{i}", layout=_flat),
    f"{UNIT_V1}/conv_proj": "block{s}/unit{u}/conv_proj",
    f"{UNIT_V1}/gn_proj": To(theirs="block{s}/unit{u}/gn_proj", layout=_flat),
}


class FirstBiT(Format):
    """BiT in the archives published with arXiv:1912.11370, in TensorFlow's names."""

    name = "BiT (npz)"
    library = Library.NPZ
    model = BiT
    dialect = dataclasses.replace(
        tables.ARCHIVE, norms={"scale": "gamma", "bias": "beta"}
    )
    assumes = preprocessing.OF_BIG_VISION
    table = FIRST
    signs = ("resnet/root_block/standardized_conv2d/kernel",)
    requires = {
        **PLAIN,
        "block": Block.BOTTLENECK,
        "groups": GROUPS,
        "pool_padding": PoolPadding.ZEROS,
    }
    hints = HINTS

    def normalised_names(self, weights: Weights) -> Weights:
        """Returns the weights with "resnet/" before names and no numbers of layers."""
        numbered = re.compile(r"(standardized_conv2d|group_norm|conv2d)_\d+(?=/)")
        arrays = {
            "resnet/" + numbered.sub(r"\1", name.removeprefix("resnet/")): array
            for name, array in weights.arrays.items()
        }
        return dataclasses.replace(weights, arrays=arrays)

    def architecture(self, weights: Weights) -> Architecture:
        weights = self.normalised_names(weights)
        stem = weights.sizes({self.signs[0]: "7 7 channels width"})
        model = BiT(
            stages=weights.units("resnet/" + ARCHIVE_UNIT),
            width=stem["width"],
            pool_padding=PoolPadding.ZEROS,
            groups=GROUPS,
            head=weights.head("resnet/head/conv2d/bias", "classes"),
        )
        return Architecture(model=model, channels=stem["channels"])


class BitPaper(Format):
    """big_vision's bit_paper: BiT with -inf as the padding of the max-pooling."""

    name = "big_vision bit_paper (npz)"
    library = Library.NPZ
    model = BiT
    dialect = tables.ARCHIVE
    assumes = preprocessing.OF_BIG_VISION
    table = PAPER
    signs = ("root_block/conv_root/kernel", "norm-pre-head/scale")
    requires = {**FirstBiT.requires, "pool_padding": PoolPadding.NEGATIVE_INFINITY}
    hints = HINTS

    def architecture(self, weights: Weights) -> Architecture:
        stem = weights.sizes({self.signs[0]: "7 7 channels width"})
        model = BiT(
            stages=weights.units(ARCHIVE_UNIT),
            width=stem["width"],
            pool_padding=PoolPadding.NEGATIVE_INFINITY,
            groups=GROUPS,
            head=weights.head("head/bias", "classes"),
        )
        note = "pool_padding=negative_infinity, as bit_paper computes it"
        return Architecture(
            model=model, channels=stem["channels"], assumptions=of_architecture(note)
        )


class ArchivedBiTV1(Format):
    """big_vision's bit: ResNet v1 with group norm."""

    name = "big_vision bit (npz)"
    library = Library.NPZ
    model = BiTV1
    dialect = tables.ARCHIVE
    assumes = preprocessing.OF_BIG_VISION
    table: Rows = {**under("", ARCHIVE_TRUNK, ours="trunk/"), "head": "head"}
    signs = ("conv_root/kernel", "gn_root/scale")
    # Hybrids have a transformer after the trunk.
    strangers = ("embedding/kernel",)
    requires = {"head.hidden_dim": None, **in_field("trunk", ARCHIVE_FORM)}
    hints = hints_on("trunk")

    def architecture(self, weights: Weights) -> Architecture:
        trunk, channels = archived_trunk(weights)
        head = weights.head("head/bias", "classes")
        return Architecture(model=BiTV1(trunk=trunk, head=head), channels=channels)


def archived_trunk(weights: Weights) -> tuple[Trunk, int]:
    """Returns the trunk of an archive, and the channels of images."""
    sizes = weights.sizes({"conv_root/kernel": "7 7 channels width"})
    stages = weights.units(ARCHIVE_UNIT)
    return Trunk(stages=stages, width=sizes["width"], **ARCHIVE_FORM), sizes["channels"]


FORMATS = (FirstBiT(), BitPaper(), ArchivedBiTV1())
