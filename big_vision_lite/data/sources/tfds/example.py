"""Reads and writes tf.train.Example by protobuf, without TensorFlow."""

import functools
from collections.abc import Collection, Mapping
from typing import Any

# tensorflow/core/example/{feature,example}.proto as a FileDescriptorProto.
_PROTO = """
name: "example.proto" package: "tf" syntax: "proto3"
message_type { name: "BytesList"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature"
  oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type_name: "BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type_name: "FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type_name: "Int64List" oneof_index: 0 } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type_name: "FeatureEntry" }
  nested_type { name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type_name: "Feature" } } }
message_type { name: "Example"
  field { name: "features" number: 1 type_name: "Features" } }
"""


@functools.cache
def _message() -> Any:
    # Imported here, because the digits and image folders do not need it.
    from google.protobuf import (
        descriptor_pb2,
        descriptor_pool,
        message_factory,
        text_format,
    )

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_PROTO, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))


def parse_example(record: bytes, keys: Collection[str]) -> dict[str, list[Any]]:
    """Returns the features `keys` of a serialised tf.train.Example, each a list.

    Leaves out absent features. Raises ValueError for bytes that are no Example.
    """
    from google.protobuf.message import DecodeError

    try:
        features = _message().FromString(record).features.feature
    except DecodeError as error:
        raise ValueError("a record is not a tf.train.Example") from error
    parsed = {}
    for key in keys:
        # Reading an absent key would add it to the map.
        if key in features:
            kind = features[key].WhichOneof("kind")
            parsed[key] = list(getattr(features[key], kind).value) if kind else []
    return parsed


def encode_example(
    features: Mapping[str, bytes | int | list[int] | list[bytes]],
) -> bytes:
    """Serialises byte strings and integers as a tf.train.Example, sorted by key."""
    example = _message()()
    for key, value in features.items():
        feature = example.features.feature[key]
        values = value if isinstance(value, list) else [value]
        if values and isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        else:
            feature.int64_list.value.extend(values)
    return example.SerializeToString(deterministic=True)
