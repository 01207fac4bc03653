"""tf.train.Example to and from bytes, without TensorFlow: a small protobuf."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

# tf.train.Example: message Example {1: Features}, Features {1: map<string, Feature>},
# Feature {1: BytesList | 2: FloatList | 3: Int64List}, each list {1: values}.
_BYTES, _FLOATS, _INTS = 1, 2, 3


def parse_example(record: bytes, keys: Collection[str]) -> dict[str, Any]:
    """Returns the features `keys` of a serialised tf.train.Example.

    An absent feature is left out. Bytes and integers come as lists, floats as a
    numpy array. Raises ValueError for bytes that are something else.
    """
    wanted = {key.encode(): key for key in keys}
    parsed: dict[str, Any] = {}
    try:
        for _, start, end in _fields(record, 0, len(record)):
            for _, entry, entry_end in _fields(record, start, end):
                name, value = b"", (0, 0)
                for number, first, last in _fields(record, entry, entry_end):
                    if number == 1:
                        name = record[first:last]
                    else:
                        value = (first, last)
                if name in wanted:
                    parsed[wanted[name]] = _feature(record, *value)
    except IndexError as error:
        raise ValueError("a record is not a tf.train.Example") from error
    return parsed


def _feature(record: bytes, start: int, end: int) -> Any:
    values: Any = []
    for kind, first, last in _fields(record, start, end):
        for _, begin, stop in _fields(record, first, last):
            if kind == _BYTES:
                values.append(record[begin:stop])
            elif kind == _FLOATS:
                values = np.append(values, np.frombuffer(record[begin:stop], "<f4"))
            elif stop == -1:  # one integer by itself
                values.append(_signed(begin))
            else:  # packed integers
                while begin < stop:
                    value, begin = _varint(record, begin)
                    values.append(_signed(value))
    return values


def _fields(record: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields (number, first byte, end) of each field; (number, value, -1) if an int."""
    while start < end:
        tag, start = _varint(record, start)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, start = _varint(record, start)
            yield number, value, -1
            continue
        if wire == 2:
            size, start = _varint(record, start)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a record is not a tf.train.Example (wire type {wire})")
        if start + size > end:
            raise ValueError("a record is not a tf.train.Example (ends inside a field)")
        yield number, start, start + size
        start += size


def _varint(record: bytes, start: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = record[start]
        start += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, start
        shift += 7


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def encode_example(features: Mapping[str, bytes | int | list[int]]) -> bytes:
    """Serialises byte strings and integers as a tf.train.Example, in this order."""
    entries = b""
    for key, value in features.items():
        if isinstance(value, bytes):
            feature = _delimited(_BYTES, _delimited(1, value))
        else:
            numbers = value if isinstance(value, list) else [value]
            packed = b"".join(_encoded_varint(v & (1 << 64) - 1) for v in numbers)
            feature = _delimited(_INTS, _delimited(1, packed))
        entries += _delimited(1, _delimited(1, key.encode()) + _delimited(2, feature))
    return _delimited(1, entries)


def _delimited(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _encoded_varint(len(data)) + data


def _encoded_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
