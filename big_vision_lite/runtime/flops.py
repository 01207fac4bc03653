"""Counts FLOPs of a function's products and convolutions, without running it."""

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core


def count(function: Callable[..., Any], *args: Any) -> int:
    """Returns the FLOPs of `function(*args)`; one multiply-add is 2.

    `args` may be `jax.ShapeDtypeStruct`s. Counts matrix products and convolutions, no
    elementwise operations. Padding counts as image; the zeros between the rows of a
    strided convolution's gradient do not count. Of the branches of a condition the most
    expensive counts. Rematerialisation counts twice: for model FLOPs count
    `model.clone(remat="none")`.

    Raises:
        ValueError: a while loop holds products; its number of iterations is unknown.
    """
    # A function jitted with compiler options cannot be inside another.
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return count_jaxpr(jitted.trace(*args).jaxpr.jaxpr)


def count_jaxpr(jaxpr: Any) -> int:
    """Returns the FLOPs of a traced function; see `count`."""
    return sum(count_equation(equation) for equation in jaxpr.eqns)


def count_equation(equation: Any) -> int:
    """Returns the FLOPs of one equation of a jaxpr, functions inside it included."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_general(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name.startswith("dot_product_attention_"):
        return _fused_attention(equation)
    if name == "pallas_call":
        return _kernel(params)
    inside = [count_jaxpr(jaxpr) for jaxpr in inner_jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inside)
    if name == "pallas_call":
        # Once for every program of its grid.
        return math.prod(int(n) for n in params["grid_mapping"].grid) * sum(inside)
    if name == "cond":
        return max(inside)
    if name == "shard_map":
        return _parts(params) * sum(inside)
    if name == "while" and any(inside):
        raise ValueError(
            "A while loop with matrix products: their number is not known before it "
            "runs. Write it as jax.lax.scan, or fori_loop with fixed bounds."
        )
    return sum(inside)


def count_training(jaxpr: Any, kinds: Sequence["Kind"]) -> int:
    """Returns the FLOPs of a function forward and backward; `kinds` are its inputs'.

    The gradient of a product costs one more product for each operand that has one: 3 in
    all if an operand depends on trained parameters, 2 if the other one depends on
    frozen parameters alone, 1 if none depends on trained ones. The gradient with
    respect to the model's input counts (the convention of model FLOPs), though it is
    not computed.
    """
    return _walk(jaxpr, kinds)[0]


class Kind(enum.IntEnum):
    """The kind of inputs that a value depends on; the largest of several counts."""

    FIXED = 0  # only parameters without a gradient
    DATA = 1
    TRAINED = 2


def _walk(jaxpr: Any, kinds: Sequence[Kind]) -> tuple[int, list[Kind]]:
    """Returns the FLOPs and the kinds of the outputs."""
    known = dict(zip(jaxpr.invars, kinds, strict=True))
    total = 0
    for equation in jaxpr.eqns:
        read = [
            Kind.FIXED if isinstance(x, core.Literal) else known.get(x, Kind.FIXED)
            for x in equation.invars
        ]
        inside = list(inner_jaxprs(equation.params))
        kind = max(read, default=Kind.FIXED)
        written = [kind] * len(equation.outvars)
        called = inside and equation.primitive.name not in _LOOPS
        if called and len(inside[0].invars) == len(read):
            flops, written = _walk(inside[0], read)
            total += _repeats(equation) * flops
        else:
            total += _factor(read) * count_equation(equation)
        known |= dict(zip(equation.outvars, written, strict=True))
    return total, [
        Kind.FIXED if isinstance(x, core.Literal) else known.get(x, Kind.FIXED)
        for x in jaxpr.outvars
    ]


# Equations that do not run one function once on their own inputs.
_LOOPS = {"scan", "while", "cond", "pallas_call"}


def _repeats(equation: Any) -> int:
    return _parts(equation.params) if equation.primitive.name == "shard_map" else 1


def _factor(read: Sequence[Kind]) -> int:
    if Kind.TRAINED not in read:
        return 1
    return 2 if Kind.FIXED in read else 3


def _kernel(params: dict[str, Any]) -> int:
    """Returns a Pallas kernel's own estimate, else the FLOPs of its programs."""
    if params["cost_estimate"] is not None:
        return params["cost_estimate"].flops
    return math.prod(params["grid_mapping"].grid) * count_jaxpr(params["jaxpr"])


def _parts(params: dict[str, Any]) -> int:
    """Returns the number of parts into which a `shard_map` splits its inputs.

    Devices along an axis that splits nothing compute the same, which counts once.
    """
    axes = set()
    for spec in params["in_specs"]:
        for entry in spec:
            axes.update(entry if isinstance(entry, tuple) else {entry})
    return math.prod(
        size for axis, size in params["mesh"].shape.items() if axis in axes
    )


def _dot_general(equation: Any) -> int:
    lhs = equation.invars[0].aval.shape
    (contracting, _), _ = equation.params["dimension_numbers"]
    products = math.prod(lhs[axis] for axis in contracting)
    return 2 * equation.outvars[0].aval.size * products


def _convolution(equation: Any) -> int:
    lhs, rhs = (variable.aval for variable in equation.invars)
    params = equation.params
    outputs, inputs = (
        rhs.shape[axis] for axis in params["dimension_numbers"].rhs_spec[:2]
    )
    if any(dilation > 1 for dilation in params["lhs_dilation"]):
        # The gradient of a strided convolution: every value meets every weight of its
        # group once, the zeros between the values meet none.
        return 2 * lhs.size * (rhs.size // inputs) // params["feature_group_count"]
    # `inputs` are those of one group already.
    return 2 * equation.outvars[0].aval.size * (rhs.size // outputs)


def _fused_attention(equation: Any) -> int:
    """Counts cuDNN's attention: q [B, N, H, D], k [B, M, H, D], jax 0.10 to 0.12."""
    (batch, queries, heads, head_dim), (_, memory, _, _) = (
        variable.aval.shape for variable in equation.invars[:2]
    )
    # Forward q k and weights v; backward two products for each of these two. The second
    # computation of q k in the backward pass is not counted.
    products = 4 if "_bwd" in equation.primitive.name else 2
    return products * 2 * batch * heads * queries * memory * head_dim


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the functions that an equation with these parameters calls."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):  # Jaxpr, and ClosedJaxpr in newer versions
                yield item
            elif hasattr(getattr(item, "jaxpr", None), "eqns"):
                yield item.jaxpr
