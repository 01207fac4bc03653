"""The types that arrays of weight files have, and which of them are read."""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

# By the names of safetensors.
SAFETENSORS: dict[str, Any] = {
    **{"BOOL": np.bool_, "C64": np.complex64},
    **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
    **{"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64},
    **{"F16": np.float16, "F32": np.float32, "F64": np.float64},
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
# Several of these share a byte, in an order that the file does not say.
PACKED = {"F4": "4-bit floats", "F6_E2M3": "6-bit floats", "F6_E3M2": "6-bit floats"}
# numpy calls these void.
FLOATS = tuple(kind for kind in SAFETENSORS.values() if kind.__module__ == "ml_dtypes")
SAVE_FLOATS = (
    "Open it with the library that wrote it, and save its values as float32, float16 "
    "or bfloat16."
)


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns {name: array} as stored.

    Raises:
        safetensors.SafetensorError: the file is damaged.
        ValueError: it holds values of a type that is not read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = _header(file.read(min(length, path.stat().st_size)))
        for name, about in header.items():
            if (stored := str(about.get("dtype"))) not in SAFETENSORS:
                words = PACKED.get(stored, "a type unknown here")
                raise ValueError(
                    f"{path} stores {name} as {stored}, {words}, which is not read. "
                    f"{SAVE_FLOATS}"
                )
        with safetensors.safe_open(path, "np"):
            pass  # checks the places and sizes of all arrays
        found = {}
        for name, about in header.items():
            first, last = about["data_offsets"]
            file.seek(8 + length + first)
            array = np.frombuffer(file.read(last - first), SAFETENSORS[about["dtype"]])
            found[name] = array.reshape(about["shape"])
    return found


def _header(text: bytes) -> dict[str, dict[str, Any]]:
    """Returns what is said of each array; nothing where safetensors will complain."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    arrays = {name: about for name, about in found.items() if name != "__metadata__"}
    return arrays if all(isinstance(a, dict) for a in arrays.values()) else {}


def as_floats(array: np.ndarray, what: str) -> np.ndarray:
    """Returns floats of any width as float32, other values as they are.

    Raises ValueError for 8-bit floats that hold NaN, as `what`: the largest weights are
    lost, which were beyond their range.
    """
    # numpy's archives keep bfloat16 as two bytes without a meaning.
    if array.dtype == np.dtype("V2"):
        array = array.view(ml_dtypes.bfloat16)
    if array.dtype.kind == "f" or array.dtype.type in FLOATS:
        found = np.asarray(array, np.float32)
        if array.itemsize == 1 and not np.isfinite(found).all():
            most = ml_dtypes.finfo(array.dtype).max
            raise ValueError(
                f"{what} is stored as {array.dtype}, which ends at {most}, and holds "
                "NaN or infinity where its values were larger. Save it as float32, "
                "float16 or bfloat16."
            )
        return found
    return array


def why_no_weights(array: np.ndarray) -> str:
    """Returns why values cannot be weights, "" if they are floats."""
    if array.dtype == np.float32:
        return ""
    kinds = {"i": "integers", "u": "integers", "b": "booleans", "c": "complex numbers"}
    words = kinds.get(array.dtype.kind, "no numbers that numpy knows")
    quantised = array.dtype.kind in "iu"
    means = " (quantised weights need their scales)" if quantised else ""
    return f"holds {words} ({array.dtype}), weights are floats{means}. {SAVE_FLOATS}"
