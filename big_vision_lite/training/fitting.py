"""Searches by compiling for the smallest change that fits a recipe on a machine.

A model whose blocks repeat is first compiled at two small depths: every block adds the
same bytes of memory. For each proposed change the compiler has placed all arrays.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections.config_flags import config_path

from big_vision_lite.config import TrainConfig
from big_vision_lite.recipes import mistakes, serialize
from big_vision_lite.training.estimate import Estimate

# Depths compiled to measure the memory of a block. The first and the last may be
# special.
DEPTHS = (1, 2)
# Variants whose state and gradients take a larger share of memory are not tried.
MOST_STATE = 0.8
# Usable share of memory; the rest allows for errors of extrapolation from two depths.
MARGIN = 0.95
SECONDS = 240.0
# Numbers of micro-batches tried per target, remat and sharding.
TRIES = 4


# Returns the memory of a recipe on a target; see `CompileProcess.memory`.
Ask = Callable[[TrainConfig, str], Estimate]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """Overrides of a recipe as (path, value), and a target that may have more chips."""

    values: tuple[tuple[str, Any], ...]
    target: str

    def flags(self, asked_for: str) -> list[str]:
        """Returns the change as command-line flags."""
        words = [f"--config.{path}={value}" for path, value in self.values]
        return words + ([f"--on={self.target}"] if self.target != asked_for else [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A change that makes the recipe fit, as flags, and its compiled estimate."""

    flags: list[str]
    estimate: Estimate


def changed(config: TrainConfig, values: dict[str, Any], modules: Any) -> TrainConfig:
    """Returns a copy of a recipe with `values` set by path, validated again."""
    copy = serialize.rebuild(config, modules)
    for path, value in values.items():
        config_path.set_value(path, copy, value)
    return serialize.rebuild(copy, modules)


def search(
    config: TrainConfig,
    refused: Estimate,
    targets: list[str],
    ask: Ask,
    say: Callable[[str], None],
    modules: Any = (),
    patience: float = SECONDS,
) -> Fit | None:
    """Returns the smallest change that makes a recipe fit, None if none was found.

    `refused` is the estimate for the first of `targets`, where the recipe does not fit;
    the others have more of the same chips. Tries fewer and cheaper changes first: more
    micro-batches, sharded parameters, recomputed blocks, more chips. Stops trying
    variants after `patience` seconds.
    """
    end = time.monotonic() + patience
    attempt = _Search(config, ask, say, modules, end)
    for target, (remat, fsdp) in itertools.product(
        targets, itertools.product(_remats(config), (False, True))
    ):
        if time.monotonic() > end:
            say("the search has used up its time")
            return None
        found = attempt.try_variant(refused, target, remat, fsdp)
        if found is not None:
            return found
    return None


class _Search:
    """One search: its recipe, compiler and end time."""

    def __init__(
        self,
        config: TrainConfig,
        ask: Ask,
        say: Callable[[str], None],
        modules: Any,
        end: float,
    ):
        self._config = config
        self._ask = ask
        self._say = say
        self._modules = modules
        self._end = end
        self._depth = depth_path(config)

    def try_variant(
        self, refused: Estimate, target: str, remat: str | None, fsdp: bool
    ) -> Fit | None:
        """Returns one variant's fit with the fewest micro-batches, None if none fit."""
        devices = _devices(refused, target)
        values: dict[str, Any] = {}
        if remat is not None:
            values[remat_path(self._config)] = remat
        if fsdp:
            if refused.mesh["fsdp"] >= devices or not self._config.sharding:
                return None
            values |= {"mesh.fsdp": devices, "mesh.data": -1}
        there = refused.memory_there
        assert there is not None
        if self._state(refused, devices if fsdp else 1) > MOST_STATE * there:
            return None
        rows = self._config.data.batch_size // devices
        parts = [m for m in _powers(rows) if m > self._config.micro_batches]
        if not parts:
            return None
        for micro_batches in self._promising(values, target, rows, parts, there):
            chosen = values | {"micro_batches": micro_batches}
            words = Change(values=tuple(chosen.items()), target=target)
            self._say(f"compiling {' '.join(words.flags(refused.target))} whole")
            full = self._ask(changed(self._config, chosen, self._modules), target)
            if full.fits:
                return Fit(flags=words.flags(refused.target), estimate=full)
        return None

    def _promising(
        self,
        values: dict[str, Any],
        target: str,
        rows: int,
        parts: list[int],
        there: float,
    ) -> Iterator[int]:
        """Yields numbers of micro-batches that may fit, the fewest first."""
        if self._depth is None:
            # No blocks repeat: every number is compiled at full size.
            yield from parts
            return
        tried = parts[0]
        for _ in range(TRIES):
            needed, kept = self._whole(values, target, tried)
            if needed <= MARGIN * there:
                yield tried
            # Memory beyond the state is proportional to the rows of a micro-batch.
            room = max(MARGIN * there - kept, 1.0)
            larger = [m for m in parts if m > tried]
            enough = [m for m in larger if (needed - kept) * tried / m <= room]
            if not larger:
                return
            tried = enough[0] if enough else larger[-1]

    def _whole(
        self, values: dict[str, Any], target: str, micro_batches: int
    ) -> tuple[float, float]:
        """Extrapolates to the full depth: all bytes, and those of the state."""
        assert self._depth is not None
        depth = int(config_path.get_value(self._depth, self._config))
        all_, kept = zip(
            *(self._needed(values, target, d, micro_batches) for d in DEPTHS),
            strict=True,
        )
        grown = (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
        needed, state = (
            first + grown * max(0, second - first) for first, second in (all_, kept)
        )
        self._say(f"  so at depth {depth}: {needed / 1e9:.1f} GB")
        return needed, state

    def _needed(
        self, values: dict[str, Any], target: str, depth: int, micro_batches: int
    ) -> tuple[int, int]:
        """Returns all bytes at one depth, and those of parameters and optimizer."""
        assert self._depth is not None
        chosen = values | {self._depth: depth, "micro_batches": micro_batches}
        words = " ".join(f"{p.split('.')[-1]}={v}" for p, v in chosen.items())
        found = self._ask(changed(self._config, chosen, self._modules), target)
        self._say(f"{target} {words}: {found.memory_needed / 1e9:.2f} GB")
        kept = found.memory["parameters"] + found.memory["optimizer"]
        return found.memory_needed, kept

    def _state(self, refused: Estimate, split: int) -> float:
        """Returns a lower bound on the bytes of state and gradients per device."""
        already = refused.mesh["fsdp"]
        sizes = (refused.memory["parameters"], refused.memory["optimizer"])
        gradients = 4 * refused.trained / already
        return (sum(sizes) + gradients) * already / max(split, already)


def depth_path(config: TrainConfig) -> str | None:
    """Returns the path of a model's number of blocks, None unless it has just one."""
    leaves = mistakes.list_leaves(config.model, "model.")
    found = [
        path
        for path, value, _ in leaves
        if path.endswith(".depth") and value.__class__ is int
    ]
    return found[0] if len(found) == 1 else None


def remat_path(config: TrainConfig) -> str:
    """Returns the path of a model's first field `remat`, '' if it has none."""
    leaves = mistakes.list_leaves(config.model, "model.")
    return next((path for path, _, _ in leaves if path.endswith(".remat")), "")


def _remats(config: TrainConfig) -> list[str | None]:
    path = remat_path(config)
    if not path or config_path.get_value(path, config) == "full":
        return [None]
    return [None, "full"]


def _devices(refused: Estimate, target: str) -> int:
    """Returns the number of devices of a target with the same chips as `refused`."""
    count = 1
    for size in refused.mesh.values():
        count *= size
    return round(count * _chips(target) / _chips(refused.target))


def _chips(target: str) -> int:
    product = 1
    for side in target.partition(":")[2].split("x"):
        product *= int(side)
    return product


def _powers(rows: int) -> list[int]:
    """Lists the powers of two that divide `rows`."""
    return [1 << n for n in range(rows.bit_length()) if rows % (1 << n) == 0]
