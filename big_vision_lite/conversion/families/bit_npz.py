"""BiT in npz archives: the first ones, big_vision's bit_paper, and big_vision's bit."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from big_vision_lite.conversion.engine import Entry, reshaped, same
from big_vision_lite.conversion.families import bit_tables
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.bit import BiT, Block, PoolPadding
from big_vision_lite.models.bit_v1 import BiTV1, Trunk

STANDARDISED = "standardized_conv2d/kernel"
ROOT = f"resnet/root_block/{STANDARDISED}"
# Ours: theirs, in a unit.
PARTS = {"1": "a", "2": "b", "3": "c"}
NORM = {"scale": "gamma", "bias": "beta"}
GROUPS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpzBiT(Format):
    """The archives published with arXiv:1912.11370, in TensorFlow's names."""

    name: str = "BiT (npz)"
    library: Library = Library.NPZ
    model: type = BiT
    ignored: tuple[str, ...] = ()

    def normalised_names(self, weights: Weights) -> Weights:
        """Returns the names with "resnet/" in front and without numbers of layers."""
        numbered = re.compile(r"(standardized_conv2d|group_norm|conv2d)_\d+(?=/)")
        arrays = {
            "resnet/" + numbered.sub(r"\1", name.removeprefix("resnet/")): array
            for name, array in weights.arrays.items()
        }
        return dataclasses.replace(weights, arrays=arrays)

    def recognises(self, weights: Weights) -> bool:
        return ROOT in self.normalised_names(weights).arrays

    def architecture(self, weights: Weights) -> Architecture:
        weights = self.normalised_names(weights)
        root = weights.shape(ROOT, 4)
        bit_tables.check_root(weights.path, root)
        model = BiT(
            stages=bit_tables.count_units(
                weights.arrays, r"resnet/block(\d+)/unit(\d+)/"
            ),
            width=root[-1],
            pool_padding=PoolPadding.ZEROS,
            groups=GROUPS,
            head=bit_tables.head_of(weights, "resnet/head/conv2d/bias"),
        )
        return Architecture(model=model, channels=root[2])

    def entries(
        self, model: BiT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        return list(self._entries(model))

    def _entries(self, model: BiT) -> Iterator[Entry]:
        yield same(ROOT, "stem/kernel")
        for place in bit_tables.units_of_bit(model):
            unit = f"resnet/block{place.stage + 1}/unit{place.index + 1:02d}"
            ours = place.ours
            for number, part in PARTS.items():
                yield same(
                    f"{unit}/{part}/{STANDARDISED}", f"{ours}/conv{number}/kernel"
                )
                yield from _norm(f"{unit}/{part}/group_norm", f"{ours}/gn{number}")
            if place.has_projection:
                yield same(f"{unit}/a/proj/{STANDARDISED}", f"{ours}/conv_proj/kernel")
        yield from _norm("resnet/group_norm", "norm")
        if model.head is not None:
            yield reshaped(
                "resnet/head/conv2d/kernel", "head/kernel", lambda shape: (1, 1, *shape)
            )
            yield same("resnet/head/conv2d/bias", "head/bias")

    def describe(
        self, model: BiT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        _check_bit(model, "The first BiT", PoolPadding.ZEROS)
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpzBitPaper(Format):
    """big_vision's form of the same: -inf around the image at the max-pooling."""

    name: str = "big_vision bit_paper (npz)"
    library: Library = Library.NPZ
    model: type = BiT
    ignored: tuple[str, ...] = ()

    def recognises(self, weights: Weights) -> bool:
        wanted = {"root_block/conv_root/kernel", "norm-pre-head/scale"}
        return wanted <= weights.arrays.keys()

    def architecture(self, weights: Weights) -> Architecture:
        root = weights.shape("root_block/conv_root/kernel", 4)
        bit_tables.check_root(weights.path, root)
        model = BiT(
            stages=bit_tables.count_units(weights.arrays, r"block(\d+)/unit(\d+)/"),
            width=root[-1],
            pool_padding=PoolPadding.NEGATIVE_INFINITY,
            groups=GROUPS,
            head=bit_tables.head_of(weights, "head/bias"),
        )
        note = "pool_padding=negative_infinity, as bit_paper computes it"
        return Architecture(model=model, channels=root[2], notes=(note,))

    def entries(
        self, model: BiT, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        unit = "block{stage}/unit{index:02d}"
        units = bit_tables.units_of_bit(model)
        return [
            same("root_block/conv_root/kernel", "stem/kernel"),
            *bit_tables.npz_units(units, unit, v1=False),
            *bit_tables.npz_norm("norm-pre-head", "norm", False),
            *_head(model),
        ]

    def describe(
        self, model: BiT, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        _check_bit(model, "big_vision's bit_paper", PoolPadding.NEGATIVE_INFINITY)
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpzBiTV1(Format):
    """big_vision's bit: ResNet v1 with group norm."""

    name: str = "big_vision bit (npz)"
    library: Library = Library.NPZ
    model: type = BiTV1
    ignored: tuple[str, ...] = ()

    def recognises(self, weights: Weights) -> bool:
        wanted = {"conv_root/kernel", "gn_root/scale"}
        # Hybrids have a transformer behind it.
        return wanted <= weights.arrays.keys() and (
            "embedding/kernel" not in weights.arrays
        )

    def architecture(self, weights: Weights) -> Architecture:
        head = bit_tables.head_of(weights, "head/bias")
        return Architecture(
            model=BiTV1(trunk=trunk_of(weights), head=head),
            channels=weights.shape("conv_root/kernel", 4)[2],
        )

    def entries(
        self, model: BiTV1, image_size: tuple[int, int], leaves: Any = None
    ) -> Sequence[Entry]:
        return [*trunk_entries(model.trunk, "trunk"), *_head(model)]

    def describe(
        self, model: BiTV1, image_size: tuple[int, int], channels: int = 3
    ) -> dict[str, Any]:
        what = "big_vision's bit"
        bit_tables.check_head(model.head, what=what)
        check_trunk(model.trunk, what)
        return {}


def trunk_of(weights: Weights) -> Trunk:
    """Returns the trunk of an archive, with big_vision's constants."""
    root = weights.shape("conv_root/kernel", 4)
    bit_tables.check_root(weights.path, root)
    return Trunk(
        stages=bit_tables.count_units(weights.arrays, r"block(\d+)/unit(\d+)/"),
        width=root[-1],
        groups=GROUPS,
    )


def trunk_entries(trunk: Trunk, ours: str) -> Iterator[Entry]:
    """Yields the entries of a trunk that we name `ours`."""
    yield same("conv_root/kernel", f"{ours}/conv_root/kernel")
    yield from bit_tables.npz_norm("gn_root", f"{ours}/gn_root", True)
    units = bit_tables.units_of_trunk(trunk, ours)
    yield from bit_tables.npz_units(units, "block{stage}/unit{index}", v1=True)


def check_trunk(trunk: Trunk, what: str) -> None:
    """Refuses a trunk that its own program would compute otherwise."""
    plain = Trunk(stages=trunk.stages)
    fixed = ("standardisation", "norm_epsilon", "groups")
    other = [name for name in fixed if getattr(trunk, name) != getattr(plain, name)]
    if other:
        has = ", ".join(f"{name}={getattr(plain, name)}" for name in other)
        here = ", ".join(f"{name}={getattr(trunk, name)}" for name in other)
        raise ValueError(
            f"{what} has {has}, this model {here}: other numbers. Export it with --to "
            "huggingface, timm or safetensors."
        )


def _norm(theirs: str, ours: str) -> Iterator[Entry]:
    for leaf, name in NORM.items():
        yield reshaped(f"{theirs}/{name}", f"{ours}/{leaf}", lambda shape: shape)


def _head(model: BiT | BiTV1) -> Iterator[Entry]:
    if model.head is not None:
        yield same("head/kernel", "head/kernel")
        yield same("head/bias", "head/bias")


def _check_bit(model: BiT, what: str, padding: PoolPadding) -> None:
    bit_tables.check_expressible(model, what=what)
    wanted = {
        "block": Block.BOTTLENECK,
        "groups": GROUPS,
        "pool_padding": padding,
    }
    for name, value in wanted.items():
        if getattr(model, name) != value:
            raise ValueError(
                f"{what} has {name}={value}, this model has {name}="
                f"{getattr(model, name)}. Export it with --to safetensors."
            )


FORMATS = (NpzBiT(), NpzBitPaper(), NpzBiTV1())
