"""Reads a compiled program's memory, bytes moved, FLOPs, cycles and collectives.

All figures are of one device and one run; loop bodies count once per iteration.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from big_vision_lite.runtime import hlo, kernels
from big_vision_lite.runtime.hlo import ArrayType, Computation, Module, Operation
from big_vision_lite.runtime.kernels import Signature, Work
from big_vision_lite.runtime.targets import Chip

# Operations that only name existing values and move no bytes.
FREE = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"),
    *("partition-id", "replica-id", "domain", "opt-barrier"),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all") + (
    "collective-permute",
    "collective-broadcast",
)
# The estimate for a kernel without the compiler's is the longest of three times: its
# FLOPs at this share of the peak, its bytes at this share of the bandwidth, and its
# exponentials at this rate.
FLOPS_SHARE, BYTES_SHARE, EXPONENTIALS_A_CYCLE = 0.4, 0.7, 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One operation that the device runs `times` times; figures are of one run.

    `bytes` are those read and written, `from_memory` the part of them in main memory: a
    TPU keeps many arrays on the chip. `cycles` is the compiler's estimate, or None.
    """

    name: str
    origin: str
    opcode: str
    times: int
    bytes: int
    from_memory: int
    flops: int
    exponentials: int = 0
    cycles: int | None = None
    in_loop: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind: the number of their runs, and the bytes they carry.

    These are the bytes of the results for all-gathers, of the operands for the others.
    """

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device; `aliased` are outputs in the buffers of arguments."""

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    code: int

    @property
    def total(self) -> int:
        new = self.outputs - self.aliased
        return self.arguments + self.temporaries + new + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one compiled program; cycles on TPUs only."""

    memory: Memory
    bytes_moved: int
    flops: int
    kernels: tuple[Kernel, ...]
    collectives: Mapping[str, Collective]
    # The compiler's estimates alone, and with ours for kernels without one.
    compiler_cycles: int | None
    cycles: int | None

    @property
    def launches(self) -> int:
        """Returns the number of kernels that a step launches."""
        return sum(kernel.times for kernel in self.kernels)

    def seconds(self, chip: Chip) -> float:
        """Estimates the seconds a device computes, without waiting for others."""
        if self.cycles is not None:
            return self.cycles / chip.clock
        return sum(k.times * kernel_seconds(k, chip) for k in self.kernels)

    def link_seconds(self, chip: Chip, devices: int) -> float:
        """Estimates the seconds of collectives without overlap."""
        part = (devices - 1) / devices
        twice = {"all-reduce": 2.0}
        sent = sum(twice.get(k, 1.0) * c.bytes for k, c in self.collectives.items())
        return part * sent / chip.link

    def bound_seconds(self, chip: Chip) -> float:
        """Returns the roofline: the lower bound in seconds of these FLOPs and bytes."""
        moved = sum(kernel.times * kernel.from_memory for kernel in self.kernels)
        return max(self.flops / chip.flops, moved / chip.bandwidth)


def kernel_seconds(kernel: Kernel, chip: Chip) -> float:
    """Estimates the seconds of one run of a kernel without the compiler's estimate."""
    return max(
        kernel.flops / (FLOPS_SHARE * chip.flops),
        kernel.from_memory / (BYTES_SHARE * chip.bandwidth),
        kernel.exponentials / (EXPONENTIALS_A_CYCLE * chip.clock),
    )


def read(
    compiled: Any,
    chip: Chip | None = None,
    pallas: Mapping[Signature, Work] | None = None,
) -> Figures:
    """Reads the figures of `jax.jit(f).lower(...).compile()`.

    `pallas` holds the work of our Pallas kernels (`kernels.pallas_kernels`); without it
    only their bytes count.
    """
    module = hlo.parse(compiled.as_text())
    found = tuple(_kernels(module, pallas or {}))
    moved = sum(kernel.times * kernel.bytes for kernel in found)
    cost = compiled.cost_analysis() or {}
    if cost.get("bytes accessed") and any(k.cycles for k in found):
        # XLA:TPU reports the bytes, but counts the body of a loop once, and a custom
        # call by its author's estimate.
        again = sum((k.times - 1) * k.bytes for k in found if k.in_loop)
        moved = int(cost["bytes accessed"]) + again
    own = [k.times * k.cycles for k in found if k.cycles is not None]
    cycles = None
    if own and chip is not None:
        others = (k for k in found if k.cycles is None and k.opcode == "custom-call")
        ours = sum(k.times * kernel_seconds(k, chip) for k in others if k.flops)
        cycles = sum(own) + round(ours * chip.clock)
    return Figures(
        memory=memory_of(compiled),
        bytes_moved=moved,
        flops=sum(kernel.times * kernel.flops for kernel in found),
        kernels=found,
        collectives=collectives(module),
        compiler_cycles=sum(own) if own else None,
        cycles=cycles,
    )


def memory_of(compiled: Any) -> Memory:
    """Returns the bytes that a compiled program needs on one device."""
    found = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


def top(figures: Figures, chip: Chip | None, most: int = 20) -> list[dict[str, Any]]:
    """Sums kernels by their operation in JAX; returns the `most` most expensive.

    Sorts by estimated time if `chip` is given, else by bytes. The repeated blocks of a
    model count as one.
    """
    rows: dict[str, collections.Counter[str]] = {}
    for kernel in figures.kernels:
        label = re.sub(r"_\d+(?=/)", "_*", kernel.origin) or kernel.opcode
        row = rows.setdefault(label, collections.Counter())
        row["count"] += kernel.times
        row["bytes"] += kernel.times * kernel.bytes
        row["flops"] += kernel.times * kernel.flops
        if chip is not None:
            seconds = kernel_seconds(kernel, chip)
            if kernel.cycles is not None:
                seconds = kernel.cycles / chip.clock
            elif figures.cycles is not None and not kernel.flops:
                seconds = 0.0  # overlaps with others: copies ahead of their use
            row["microseconds"] += round(1e6 * kernel.times * seconds)
    key = "bytes" if chip is None else "microseconds"
    dearest = sorted(rows.items(), key=lambda item: -item[1][key])
    return [{"operation": label} | dict(row) for label, row in dearest[:most]]


def collectives(module: Module) -> dict[str, Collective]:
    """Returns sums of collectives by kind; the parts of a split one count once."""
    seen: set[str] = set()
    count: collections.Counter[str] = collections.Counter()
    moved: collections.Counter[str] = collections.Counter()
    for computation, operation, times in module.runs():
        for owner, part in _with_fused(module, computation, operation):
            kind = part.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = part.attribute("channel_id") or part.name
            if channel in seen:
                continue
            seen.add(channel)
            carried = sum(o.bytes for o in owner.operands(part))
            if kind == "all-gather":
                results = part.bytes
                carried = results - carried if part.opcode != kind else results
            if kind == "all-reduce" and owner.name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # as XLA:TPU writes one
            count[kind] += times
            moved[kind] += times * carried
    return {k: Collective(count=n, bytes=moved[k]) for k, n in sorted(count.items())}


def _with_fused(
    module: Module, computation: Computation, operation: Operation
) -> Iterator[tuple[Computation, Operation]]:
    yield computation, operation
    inner = module.fused(operation)
    for part in inner.operations if inner else ():
        assert inner is not None
        yield from _with_fused(module, inner, part)


def _kernels(module: Module, pallas: Mapping[Signature, Work]) -> Iterator[Kernel]:
    once = {id(operation) for operation in module.entry.operations}
    for computation, operation, times in module.runs():
        if operation.opcode in FREE or operation.opcode.endswith("-done"):
            continue
        estimate = re.search(r'"estimated_cycles":"(\d+)"', operation.attributes)
        work = Work(flops=kernels.count(module, computation, operation))
        if kernels.PALLAS in (operation.attribute("custom_call_target") or ""):
            signature = kernels.signature_of(computation, operation)
            work = pallas.get(signature, Work())
        yield Kernel(
            name=operation.name,
            origin=operation.origin,
            opcode=operation.opcode,
            times=times,
            bytes=_moved(computation, operation, everywhere),
            from_memory=_moved(computation, operation, main_memory),
            flops=work.flops,
            exponentials=work.exponentials,
            cycles=int(estimate[1]) if estimate else None,
            in_loop=id(operation) not in once,
        )


def everywhere(array: ArrayType) -> int:
    """Returns the bytes of an array."""
    return array.bytes


def main_memory(array: ArrayType) -> int:
    """Returns the bytes of an array in main memory, 0 if a TPU keeps it on the chip."""
    return 0 if re.search(r"S\([1-9]", array.layout) else array.bytes


def _moved(
    computation: Computation, operation: Operation, size: Callable[[ArrayType], int]
) -> int:
    """Returns the bytes of operands and results; of a slice or copy, the moved ones."""
    results = operation.arrays
    operands = [a for o in computation.operands(operation) for a in o.arrays]
    match operation.opcode:
        case "copy-start":
            return size(results[0]) + size(results[1])
        case "slice-start" | "dynamic-slice-start":
            # ((operands), result, context): reads as many bytes as it writes.
            (part,) = results[-2:-1]
            whole = dataclasses.replace(part, layout=operands[0].layout)
            return size(part) + size(whole)
        case "slice" | "dynamic-slice":
            return 2 * sum(map(size, results))
        case "dynamic-update-slice":
            return 2 * size(operands[1])
    return sum(map(size, (*operands, *results)))
