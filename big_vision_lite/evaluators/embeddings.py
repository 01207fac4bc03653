"""Embeddings of images and of texts by a model with a tower for each."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from big_vision_lite.data.ops.text import Tokenize
from big_vision_lite.data.sources.arrays import content_hash
from big_vision_lite.runs.evaluations import Context, EvalStep
from big_vision_lite.types import Array, Batch, Example, Forward


class Texts:
    """A source of texts, in the order they are given, under `key`."""

    class_names = ()

    def __init__(self, texts: Sequence[str], key: str):
        self.fingerprint = content_hash(texts)
        self._texts = tuple(texts)
        self._key = key

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Example:
        return {self._key: self._texts[index]}

    def name(self, index: int) -> str:
        return f"text {index} ({self._texts[index]!r})"


def check_towers(context: Context) -> None:
    """Raises ValueError unless the model takes texts as it takes images."""
    taken = inspect.signature(type(context.model).__call__).parameters
    if "text" not in taken:
        raise ValueError(
            f"{context.name}: {type(context.model).__name__} takes no text; this is an "
            "evaluator of models with a text tower, such as TwoTower. Take FewShot for "
            "the features of others."
        )


class TextEmbedder:
    """Prepared once: embeds a list of texts with the parameters of any state."""

    def __init__(
        self, context: Context, tokenize: Tokenize, texts: Sequence[str], size: int
    ):
        def embed(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            text = forward(text=batch[tokenize.into])
            return {"embedding": text["text_embedding"]}

        self._context = context
        self._step: EvalStep = context.make_eval_step(embed)
        self._where = (Texts(texts, tokenize.key), (tokenize,), size)
        context.check_step(self._step, *self._where, keys=())

    def __call__(self, state: Any) -> Float[np.ndarray, "T E"]:
        return self._context.rows(self._step, state, *self._where)["embedding"]


def normalised(x: Float[np.ndarray, "*N E"]) -> Float[np.ndarray, "*N E"]:
    """Returns vectors divided by their length."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
