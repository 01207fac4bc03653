"""Our own names in one safetensors file, with a config.json that rebuilds the model."""

import json
from typing import Any

from big_vision_lite.conversion import engine, preprocessing
from big_vision_lite.conversion.engine import Entry
from big_vision_lite.conversion.formats import (
    Architecture,
    Format,
    Leaves,
    Library,
    Size,
)
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.recipes import serialize


class Ours(Format):
    """Any model of big_vision_lite: names like "encoder/block_03/mlp/out/kernel"."""

    name = "big_vision_lite"
    library = Library.SAFETENSORS
    model = object
    assumes = preprocessing.OF_BIG_VISION

    def recognises(self, weights: Weights) -> bool:
        document = weights.config.get("config")
        return isinstance(document, dict) and serialize.CLASS in document

    def architecture(self, weights: Weights) -> Architecture:
        document = {name: weights.config[name] for name in ("version", "config")}
        size = weights.config.get("image_size")
        return Architecture(
            model=serialize.from_json(json.dumps(document)),
            image_size_px=None if size is None else (size[0], size[1]),
            channels=weights.config.get("channels", 3),
        )

    def entries(self, model: Any, size: Size, leaves: Leaves) -> list[Entry]:
        return [engine.same(name, name) for name in leaves]

    def describe(self, model: Any, size: Size, channels: int) -> dict[str, Any]:
        return json.loads(serialize.to_json(model))


FORMATS = (Ours(),)
