"""Counts FLOPs of operations in compiled programs and of our Pallas kernels."""

import dataclasses
import math
import re
from typing import Any

from big_vision_lite.runtime import flops
from big_vision_lite.runtime.hlo import ArrayType, Computation, Module, Operation

# Custom calls of cuDNN's convolutions: the operands, or the result (None), that are the
# image, the kernel and the output.
_CONVOLUTIONS = {
    "__cudnn$convForward": (0, 1, None),
    "__cudnn$convBiasActivationForward": (0, 1, None),
    "__cudnn$convBackwardInput": (None, 1, 0),
    "__cudnn$convBackwardFilter": (0, None, 1),
}
# One product for weights, one for values; backward the weights once more, and two
# products for the gradient of each.
_ATTENTION = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
PALLAS = "tpu_custom_call"

# Shapes and dtypes of a kernel's operands, then of its results.
Signature = tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The work of a kernel: FLOPs of its products, and exponentials."""

    flops: int = 0
    exponentials: int = 0


def pallas_kernels(jaxpr: Any) -> dict[Signature, Work]:
    """Returns the work of every Pallas kernel in a traced function.

    The text of a compiled program shows only the operands and results of a kernel.
    """
    found: dict[Signature, Work] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name != "pallas_call":
            for inner in flops.inner_jaxprs(equation.params):
                found |= pallas_kernels(inner)
            continue
        grid = math.prod(int(n) for n in equation.params["grid_mapping"].grid)
        body = equation.params["jaxpr"]
        variables = (*equation.invars, *equation.outvars)
        signature = tuple(_named(variable.aval) for variable in variables)
        found[signature] = Work(
            flops=grid * flops.count_jaxpr(body),
            exponentials=grid * _exponentials(body),
        )
    return found


def signature_of(computation: Computation, operation: Operation) -> Signature:
    """Returns shapes and dtypes of a custom call's operands and results."""
    arrays = [a for o in computation.operands(operation) for a in o.arrays]
    return tuple((a.dtype, a.shape) for a in (*arrays, *operation.arrays))


def count(module: Module, computation: Computation, operation: Operation) -> int:
    """Returns the FLOPs of the products in an operation, fused ones included.

    One multiply-add is 2; padding and the zeros of a dilated image cost nothing in a
    convolution.
    """
    match operation.opcode:
        case "dot":
            lhs = computation.operands(operation)[0].arrays[0]
            axes = _numbers(operation.attribute("lhs_contracting_dims") or "")
            return 2 * operation.arrays[0].size * _product(lhs, axes)
        case "convolution":
            image, kernel = (o.arrays[0] for o in computation.operands(operation))
            return _convolution(operation, image, kernel, operation.arrays[0])
        case "custom-call":
            return _library_call(computation, operation)
    inner = module.fused(operation)
    if inner is None:
        return 0
    return sum(count(module, inner, part) for part in inner.operations)


def _library_call(computation: Computation, operation: Operation) -> int:
    name = (operation.attribute("custom_call_target") or "").strip('"')
    operands = [o.arrays[0] for o in computation.operands(operation) if o.arrays]
    if name.startswith("__cublas"):
        found = re.search(
            r'"lhs_contracting_dimensions":\[([^\]]*)\]', operation.attributes
        )
        axes = _numbers(found[1] if found else "")
        return 2 * operation.arrays[0].size * _product(operands[0], axes)
    if name in _CONVOLUTIONS:
        image, kernel, output = (
            operation.arrays[0] if place is None else operands[place]
            for place in _CONVOLUTIONS[name]
        )
        return _convolution(operation, image, kernel, output)
    if name in _ATTENTION:
        # Weights [B, H, N, M], each a sum over the head dimension of q.
        found = re.search(
            r'"intermediate_tensor_shape":\{[^{}]*"dimensions":\[([^\]]*)\]',
            operation.attributes,
        )
        weights = math.prod(_numbers(found[1])) if found else 0
        return 2 * _ATTENTION[name] * weights * operands[0].shape[-1]
    return 0


def _convolution(
    operation: Operation, image: ArrayType, kernel: ArrayType, output: ArrayType
) -> int:
    """Counts FLOPs as XLA does: only where a weight meets a value of the image."""
    labels = operation.attribute("dim_labels") or ""
    sides = re.fullmatch(r"(\w+)_(\w+)->(\w+)", labels)
    if sides is None:
        return 0
    image_labels, kernel_labels, output_labels = sides.groups()
    groups = int(operation.attribute("feature_group_count") or 1)
    batches = int(operation.attribute("batch_group_count") or 1)
    window = _window(operation.attribute("window") or "")
    meetings = 1
    for label in (c for c in kernel_labels if c.isdigit()):
        at = int(label)
        meetings *= _meetings(
            image.shape[image_labels.index(label)],
            kernel.shape[kernel_labels.index(label)],
            output.shape[output_labels.index(label)],
            **{name: values[at] for name, values in window.items() if values},
        )
    inputs = image.shape[image_labels.index("f")] // groups
    features = output.shape[output_labels.index("f")]
    rows = image.shape[image_labels.index("b")] // batches
    return 2 * inputs * features * rows * meetings


def _meetings(
    image: int,
    kernel: int,
    output: int,
    *,
    stride: int = 1,
    pad: int = 0,
    lhs_dilate: int = 1,
    rhs_dilate: int = 1,
) -> int:
    """Counts pairs of output and weight, along one side, that meet a stored value."""
    # A side without padding and holes: every weight meets every output.
    span = (kernel - 1) * rhs_dilate
    if lhs_dilate == 1 and not pad and (output - 1) * stride + span < image:
        return output * kernel
    last = (image - 1) * lhs_dilate
    total = 0
    for weight in range(kernel):
        first = weight * rhs_dilate - pad
        places = range(first, first + (output - 1) * stride + 1, stride)
        if lhs_dilate == 1:
            low = max(0, -(-(0 - first) // stride))
            high = min(output - 1, (last - first) // stride)
            total += max(0, high - low + 1)
        else:
            total += sum(0 <= at <= last and at % lhs_dilate == 0 for at in places)
    return total


def _window(text: str) -> dict[str, list[int]]:
    """Parses "{size=3x3 stride=2x2 pad=1_1x1_1}"; keeps only the low padding."""
    found: dict[str, list[int]] = {}
    for name, values in re.findall(r"(\w+)=([\dx_\-]+)", text):
        if name in ("stride", "lhs_dilate", "rhs_dilate"):
            found[name] = [int(n) for n in values.split("x")]
        elif name == "pad":
            found[name] = [int(n.split("_")[0]) for n in values.split("x")]
    return found


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _product(array: ArrayType, axes: list[int]) -> int:
    return math.prod(array.shape[axis] for axis in axes)


_HLO_NAMES = {
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
    "int32": "s32",
    "uint32": "u32",
    "int8": "s8",
    "uint8": "u8",
    "bool": "pred",
}


def _named(aval: Any) -> tuple[str, tuple[int, ...]]:
    dtype = str(aval.dtype)
    return _HLO_NAMES.get(dtype, dtype), tuple(int(n) for n in aval.shape)


def _exponentials(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        inside = sum(map(_exponentials, flops.inner_jaxprs(equation.params)))
        turns = equation.params.get("length", 1)
        total += inside * (turns if equation.primitive.name == "scan" else 1)
        if equation.primitive.name in ("exp", "exp2"):
            total += equation.outvars[0].aval.size
    return total
