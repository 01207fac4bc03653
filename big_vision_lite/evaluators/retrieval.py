"""Retrieval of texts by images and of images by texts, several texts an image."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from big_vision_lite.data.ops.text import Tokenize
from big_vision_lite.evaluators.embeddings import check_towers
from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runs.scores import check_fields
from big_vision_lite.types import Array, Batch, Forward, Op, Runner, Source

CHUNK_ROWS = 512

# M images, K texts an image, T texts in all, E values of an embedding


@dataclasses.dataclass(kw_only=True)
class Retrieval:
    """Recall at `ranks` among all images and texts of `source`, both ways.

    An image is found where one of its own texts, a text where its own image is among
    the nearest 1, 5 or 10 by cosine; equals count as nearer. `tokenize` is that of
    training; of each example it takes the first `captions` texts, fewer where there are
    fewer. Texts that several images share count for their own image alone, which is how
    COCO and Flickr are scored. `preprocess` None uses the recipe's.

    Scores: "image_to_text/at_1/recall", "text_to_image/at_1/recall", ..., beside them
    control_chance, what a random order would give; texts, examples and unreadable.
    """

    source: Source
    tokenize: Tokenize
    captions: int = 1
    ranks: tuple[int, ...] = (1, 5, 10)
    preprocess: tuple[Op, ...] | None = None
    every_steps: int = 1000
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_fields(self)
        if self.captions < 1 or not self.ranks or min(self.ranks) < 1:
            raise ValueError(
                f"Retrieval(captions={self.captions}, ranks={self.ranks}): both start "
                "at 1; COCO has 5 captions an image."
            )

    def prepare(self, context: Context) -> Runner:
        check_towers(context)
        tokenize = dataclasses.replace(self.tokenize, captions=self.captions)
        texts, valid = tokenize.into, f"{tokenize.into}_valid"

        def embed(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            ids = batch[texts]
            flat = ids.reshape(-1, ids.shape[-1])
            text = forward(text=flat)["text_embedding"]
            image = forward(image=batch["image"])["image_embedding"]
            return {
                "image": image,
                "text": text.reshape(*ids.shape[:2], -1),
                "valid": batch[valid],
            }

        step = context.make_eval_step(embed)
        ops = context.preprocess if self.preprocess is None else self.preprocess
        where = (self.source, (*ops, tokenize), self.batch_size)
        context.check_step(step, *where, keys=(texts,))

        def run(state: Any) -> dict[str, Any]:
            rows = context.rows(step, state, *where)
            counts = context.counts(self.source, len(rows["image"]))
            scores = recalls(rows["image"], rows["text"], rows["valid"], self.ranks)
            return {**scores, "texts": int(rows["valid"].sum()), **counts}

        return run


def recalls(
    images: Float[np.ndarray, "M E"],
    texts: Float[np.ndarray, "M K E"],
    valid: Bool[np.ndarray, "M K"],
    ranks: tuple[int, ...],
) -> dict[str, float]:
    """Returns recall both ways by name, and what a random order would give."""
    owner = np.repeat(np.arange(len(images)), valid.sum(axis=1))
    flat = texts[valid]
    # How many others lie at least as near as the own: 0 where it is found first.
    of_texts = np.concatenate(
        [
            _others(flat[rows] @ images.T, owner[rows], np.arange(len(images)))
            for rows in _chunks(len(flat))
        ]
    )
    of_images = np.concatenate(
        [
            _others(images[rows] @ flat.T, np.arange(len(images))[rows], owner)
            for rows in _chunks(len(images))
        ]
    )
    scores = {}
    for k in ranks:
        one = f"text_to_image/at_{k}"
        scores[f"{one}/recall"] = float((of_texts < k).mean())
        scores[f"{one}/control_chance"] = min(1.0, k / len(images))
        one = f"image_to_text/at_{k}"
        scores[f"{one}/recall"] = float((of_images < k).mean())
        scores[f"{one}/control_chance"] = _chance(valid.sum(axis=1), len(flat), k)
    return scores


def _chunks(count: int) -> list[slice]:
    return [slice(b, b + CHUNK_ROWS) for b in range(0, count, CHUNK_ROWS)]


def _others(
    scores: Float[np.ndarray, "R N"],
    asked: Int[np.ndarray, " R"],
    owners: Int[np.ndarray, " N"],
) -> Int[np.ndarray, " R"]:
    """Returns the number of columns of others that score as the best own, or above."""
    own = asked[:, None] == owners[None, :]
    best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
    return ((scores >= best) & ~own).sum(axis=1)


def _chance(own: Int[np.ndarray, " M"], total: int, k: int) -> float:
    """Returns the mean probability that k of `total` texts drawn hold an own one."""
    missed = np.ones(len(own))
    for drawn in range(min(k, total)):
        missed *= np.maximum(total - own - drawn, 0) / (total - drawn)
    return float(1 - missed.mean())
