"""What the formats of BiT share: the names of units, and what no library expresses."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from big_vision_lite.conversion.engine import Entry, conv, dense, norm, reshaped, same
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.models.bit import BiT, Block, Stem
from big_vision_lite.models.bit_v1 import Standardisation, Trunk
from big_vision_lite.models.blocks.heads import Classifier

# Channels of timm's and Hugging Face's models are rounded to multiples of it.
DIVISOR = 8


class UnitPlace(NamedTuple):
    """One residual unit: `stage` and `index` count from 0, `ours` is its name."""

    stage: int
    index: int
    ours: str
    convs: int
    has_projection: bool


def units_of_bit(model: BiT) -> Iterator[UnitPlace]:
    """Yields the units in order."""
    basic = model.block == Block.BASIC
    for stage, count in enumerate(model.stages):
        for index in range(count):
            # The first stage of basic units changes neither size nor channels.
            projects = index == 0 and not (basic and stage == 0)
            ours = f"block{stage + 1}/unit{index + 1:02d}"
            yield UnitPlace(stage, index, ours, 2 if basic else 3, projects)


def units_of_trunk(trunk: Trunk, ours: str) -> Iterator[UnitPlace]:
    """Yields the units in order; `ours` is the name of the trunk."""
    for stage, count in enumerate(trunk.stages):
        for index in range(count):
            name = f"{ours}/block{stage + 1}_unit{index + 1:02d}"
            yield UnitPlace(stage, index, name, 3, index == 0)


def count_units(names: Iterable[str], pattern: str) -> tuple[int, ...]:
    """Returns the units of every stage; the pattern's groups are stage and unit.

    Gaps are filled: what is missing there is then reported by name.
    """
    largest: dict[int, int] = {}
    for name in names:
        if found := re.match(pattern, name):
            stage, unit = int(found[1]), int(found[2])
            largest[stage] = max(largest.get(stage, unit), unit)
    if not largest:
        return ()
    first = min(largest)
    filled = range(first, max(largest) + 1)
    return tuple(largest.get(stage, first) - first + 1 for stage in filled)


def torch_units(units: Iterable[UnitPlace], unit: str, *, v1: bool) -> Iterator[Entry]:
    """Yields the entries of units in torch's names.

    `unit` is their pattern with {stage} and {index}; in `v1` projections are normed.
    """
    for place in units:
        theirs = unit.format(stage=place.stage, index=place.index)
        for number in range(1, place.convs + 1):
            yield conv(
                f"{theirs}.conv{number}.weight", f"{place.ours}/conv{number}/kernel"
            )
            yield from norm(f"{theirs}.norm{number}", f"{place.ours}/gn{number}")
        if place.has_projection:
            down = f"{theirs}.downsample"
            yield conv(f"{down}.conv.weight", f"{place.ours}/conv_proj/kernel")
            if v1:
                yield from norm(f"{down}.norm", f"{place.ours}/gn_proj")


def torch_head(theirs: str, *, convolution: bool) -> Iterator[Entry]:
    """Yields the entries of a linear head, which timm has as a 1x1 convolution."""
    kernel = f"{theirs}.weight"
    if convolution:
        flat = dense(kernel, "head/kernel")
        yield Entry(
            theirs=flat.theirs,
            ours=flat.ours,
            to_ours=lambda arrays, shapes: [arrays[0].reshape(arrays[0].shape[:2]).T],
            to_theirs=lambda arrays: [arrays[0].T[:, :, None, None]],
        )
    else:
        yield dense(kernel, "head/kernel")
    yield same(f"{theirs}.bias", "head/bias")


def npz_units(units: Iterable[UnitPlace], unit: str, *, v1: bool) -> Iterator[Entry]:
    """Yields the entries of units in big_vision's names; {stage}, {index} from 1."""
    for place in units:
        theirs = unit.format(stage=place.stage + 1, index=place.index + 1)
        parts = [str(number) for number in range(1, place.convs + 1)]
        for part in (*parts, *(("_proj",) if place.has_projection else ())):
            kernel = f"conv{part}/kernel"
            yield same(f"{theirs}/{kernel}", f"{place.ours}/{kernel}")
            if v1 or part != "_proj":
                yield from npz_norm(f"{theirs}/gn{part}", f"{place.ours}/gn{part}", v1)


def npz_norm(theirs: str, ours: str, v1: bool) -> Iterator[Entry]:
    """Yields scale and bias, read of any shape, written [C] in `v1`, [1, 1, 1, C] else.

    Of the programs that read these, the older had norms of their own.
    """
    for leaf in ("scale", "bias"):
        yield reshaped(
            f"{theirs}/{leaf}",
            f"{ours}/{leaf}",
            lambda shape: shape if v1 else (1, 1, 1, *shape),
        )


def head_of(weights: Weights, bias: str) -> Classifier | None:
    """Returns the head by the name of its bias, None without."""
    if bias not in weights.arrays:
        return None
    return Classifier(num_classes=weights.shape(bias, 1)[0])


def check_root(path: str, kernel: tuple[int, ...]) -> None:
    """Raises ValueError for a root convolution [h, w, ...] that is not 7x7."""
    if kernel[:2] != (7, 7):
        raise ValueError(
            f"{path} begins with a convolution of {kernel[0]}x{kernel[1]}; here BiTs "
            "of other libraries begin with one of 7x7."
        )


def check_expressible(model: BiT, *, what: str) -> None:
    """Refuses what no format of another library has."""
    if model.stem != Stem.LARGE:
        raise ValueError(
            f"{what} begins with a 7x7 convolution and max-pooling (stem=large), this "
            f"BiT has stem={model.stem}, which no other library has. Export it with "
            "--to safetensors, or train a ViT, or a BiT with stem=large."
        )
    check_head(model.head, what=what)


def check_head(head: Classifier | None, *, what: str) -> None:
    if head is not None and head.hidden_dim is not None:
        raise ValueError(
            f"{what} has no layer before its head; this model has head.hidden_dim="
            f"{head.hidden_dim}. Export it with --to safetensors, or leave the head "
            "behind and train a new one: --config.init.drop='head/.*' with "
            "head.hidden_dim=none."
        )


def check_multiple(what: str, width: int) -> None:
    if width % DIVISOR:
        raise ValueError(
            f"{what} rounds channels to multiples of {DIVISOR}, width={width} is none. "
            "Export with --to npz or safetensors."
        )


def check_torch_form(trunk: Trunk, *, what: str) -> None:
    """Refuses a trunk with big_vision's constants, which torch's libraries have not.

    The standardisation alone could be moved into the kernels (times 1e-4 /
    sqrt(2e-5 std + 1e-10), exactly); the constant of the norms could not.
    """
    form, epsilon = trunk.standardisation, trunk.norm_epsilon
    if form != Standardisation.INSIDE_ROOT or epsilon != 1e-5:
        raise ValueError(
            f"{what} has standardisation=inside_root and norm_epsilon=1e-5, this model "
            f"standardisation={form} and norm_epsilon={epsilon}: other numbers, by "
            "up to 7e-5 of the largest logit. Set both fields to evaluate or fine-tune "
            "the weights in that form, or export with --to npz."
        )
    check_multiple(what, trunk.width)
