"""Parses the HLO text of a compiled program: computations, operations and loops.

JAX's `compiled.as_text()` is XLA's HLO text, alike for every backend.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bytes of one value; unlisted types (tokens, tuples) take no memory.
SIZES = {
    **dict.fromkeys(("pred", "s8", "u8", "s4", "u4"), 1),
    **dict.fromkeys(("f8e4m3fn", "f8e5m2", "f8e4m3b11fnuz"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayType:
    """The type of an array: "bf16", (128, 196, 384), and its layout as in the text."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * SIZES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One line of a computation: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    # The text in the brackets: of a constant its value, of a parameter its number.
    literal: str
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[ArrayType, ...]:
        """Returns the array types of its result, one unless it is a tuple."""
        return arrays_of(self.type)

    @property
    def bytes(self) -> int:
        """Returns the bytes of its result."""
        return sum(array.bytes for array in self.arrays)

    def attribute(self, name: str) -> str | None:
        """Returns the text of `name=...` up to the next comma outside brackets."""
        found = re.search(rf"\b{name}=", self.attributes)
        if found is None:
            return None
        text = self.attributes[found.end() :]
        return text[: _end_of_value(text)]

    @property
    def origin(self) -> str:
        """Returns the name of the JAX operation that this came from, or ''."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *attributes: str) -> list[str]:
        """Returns the names of the computations in these attributes."""
        values = (self.attribute(name) for name in attributes)
        return [name for value in values if value for name in _NAME.findall(value)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    """A function of the program: its operations in their order."""

    name: str
    operations: tuple[Operation, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Operation]:
        return {operation.name: operation for operation in self.operations}

    @property
    def root(self) -> Operation:
        return next(o for o in reversed(self.operations) if o.root)

    def parameter(self, index: int) -> Operation | None:
        """Returns the parameter operation of argument `index`, or None."""
        number = str(index)
        found = (o for o in self.operations if o.opcode == "parameter")
        return next((o for o in found if o.literal == number), None)

    def operands(self, operation: Operation) -> list[Operation]:
        """Returns the operations whose results `operation` reads."""
        return [self.by_name[name] for name in operation.operands]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: Computation

    def runs(
        self, computation: Computation | None = None, times: int = 1
    ) -> Iterator[tuple[Computation, Operation, int]]:
        """Yields (computation, operation, times) for all that the device runs.

        The body of a loop counts once per iteration, and all branches of a condition
        count. Operations inside a fusion run with it and are not listed.
        """
        computation = computation or self.entry
        for operation in computation.operations:
            inside = self._inside(operation)
            if not inside:
                yield computation, operation, times
                continue
            turns = 1
            if operation.opcode == "while":
                turns = self.trip_count(computation, operation)
            for name in inside:
                yield from self.runs(self.computations[name], times * turns)

    def fused(self, operation: Operation) -> Computation | None:
        """Returns the computation inside a fusion, else None."""
        names = operation.called("calls") if operation.opcode == "fusion" else []
        return self.computations.get(names[0]) if names else None

    def trip_count(self, computation: Computation, loop: Operation) -> int:
        """Returns the number of iterations of a while loop, 1 if unknown.

        XLA writes it down if it has analysed the loop; else it follows from the
        counter's start and step and the constant that the condition compares it with.
        """
        written = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if written:
            return int(written[1])
        condition = self.computations[loop.called("condition")[0]]
        compared = self._comparison(condition, condition.root)
        if compared is None:
            return 1
        index, bound = compared
        first = _constant(_traced(computation, loop, index)) or 0
        step = self._step(self.computations[loop.called("body")[0]], index)
        return max(1, -(-(bound - first) // step))

    def _inside(self, operation: Operation) -> list[str]:
        match operation.opcode:
            case "while":
                return operation.called("body")
            case "call":
                return operation.called("to_apply")
            case "conditional":
                return operation.called(
                    "branch_computations", "true_computation", "false_computation"
                )
        return []

    def _step(self, body: Computation, index: int) -> int:
        """Returns an iteration's increment of element `index` of the state, else 1."""
        if body.root.opcode != "tuple" or index >= len(body.root.operands):
            return 1
        added = body.by_name.get(body.root.operands[index])
        owner = body
        # The addition is often fused with others, as one result of several.
        while added is not None and added.opcode in ("get-tuple-element", "fusion"):
            at = 0
            if added.opcode == "get-tuple-element":
                at = int(added.attribute("index") or 0)
                added = owner.by_name.get(added.operands[0])
            inner = self.fused(added) if added is not None else None
            if inner is None:
                return 1
            root = inner.root
            several = root.opcode == "tuple"
            added = inner.by_name.get(root.operands[at]) if several else root
            owner = inner
        if added is None or added.opcode != "add":
            return 1
        steps = (_constant(side) for side in owner.operands(added))
        return next((step for step in steps if step), 1)

    def _comparison(
        self, condition: Computation, root: Operation
    ) -> tuple[int, int] | None:
        """Returns the index of the counter in the loop's state, and its bound."""
        if root.opcode == "fusion" and (inner := self.fused(root)) is not None:
            # The compared values are arguments of the fusion, in some order.
            outer = condition.operands(root)
            root = inner.root
            sides = [
                outer[int(side.literal)] if side.opcode == "parameter" else side
                for side in inner.operands(root)
            ]
        elif root.opcode == "compare":
            sides = condition.operands(root)
        else:
            return None
        if root.attribute("direction") not in ("LT", "NE") or len(sides) != 2:
            return None
        counter = next((s for s in sides if s.opcode == "get-tuple-element"), None)
        bound = next((_constant(s) for s in sides if s.opcode == "constant"), None)
        if counter is None or bound is None:
            return None
        return int(counter.attribute("index") or 0), bound


def arrays_of(text: str) -> tuple[ArrayType, ...]:
    """Parses "f32[8,128]{1,0}" or a tuple of such types."""
    return tuple(
        ArrayType(
            dtype=dtype,
            shape=tuple(int(n) for n in dims.split(",") if n),
            layout=layout,
        )
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def parse(text: str) -> Module:
    """Parses the text of a compiled program.

    Raises:
        ValueError: the text has no ENTRY computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, operations = "", "", []
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            found = _HEADER.match(line)
            if found:
                name, operations = found[2], []
                entry = name if found[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(name=name, operations=tuple(operations))
            name = ""
        elif name and (operation := _operation(line)) is not None:
            operations.append(operation)
    if entry not in computations:
        raise ValueError("This is no text of a compiled program: it has no ENTRY.")
    return Module(computations=computations, entry=computations[entry])


def _operation(line: str) -> Operation | None:
    begun = _LINE.match(line)
    if begun is None:
        return None
    rest = line[begun.end() :]
    # A tuple's type is in brackets; no type holds a space outside of them.
    at = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, at)
    if opcode is None:
        return None
    end = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : end]
    return Operation(
        name=begun[2],
        type=rest[:at],
        opcode=opcode[1],
        operands=tuple(_NAME.findall(inside)),
        literal=inside,
        attributes=rest[end + 1 :],
        root=bool(begun[1]),
    )


def _closing(text: str, start: int) -> int:
    """Returns the position of the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        if text[at] in "({[":
            depth += 1
        elif text[at] in ")}]":
            depth -= 1
            if not depth:
                return at
    return len(text)


def _end_of_value(text: str) -> int:
    depth = 0
    for at, letter in enumerate(text):
        if letter in "({[":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and not depth:
            return at
    return len(text)


def _constant(operation: Operation | None) -> int | None:
    if operation is None or operation.opcode != "constant":
        return None
    return int(operation.literal) if re.fullmatch(r"-?\d+", operation.literal) else None


def _traced(computation: Computation, loop: Operation, index: int) -> Operation | None:
    """Returns the operation of element `index` of the loop's initial state."""
    first = computation.by_name.get(loop.operands[0]) if loop.operands else None
    if first is None or first.opcode != "tuple" or index >= len(first.operands):
        return None
    found = computation.by_name.get(first.operands[index])
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = computation.by_name.get(found.operands[0])
    return found
