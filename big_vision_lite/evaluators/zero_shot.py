"""Classification by the text that lies nearest: no label is learnt from."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from big_vision_lite.data.ops.text import Tokenize
from big_vision_lite.evaluators.embeddings import (
    TextEmbedder,
    check_towers,
    normalised,
)
from big_vision_lite.messages import did_you_mean, some
from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runs.scores import check_fields
from big_vision_lite.types import Array, Batch, Forward, Op, Runner, Source

TOP = 5

# M images, C classes, P templates, E values of an embedding


@dataclasses.dataclass(kw_only=True)
class ZeroShot:
    """Accuracy of naming each image of `source` by its nearest class description.

    A class's vector is the mean of its unit text embeddings over `templates`, each with
    "{}" where the class's name goes, made a unit again (arXiv:2103.00020, section
    3.1.4). `names` say what classes are called, in the order of the source's, () as the
    source does. `file` reads both from JSON instead: {"names": {class: name} or [name,
    ...], "templates": [...]}; either may be left out. `tokenize` is that of training;
    `preprocess` None uses the recipe's.

    Scores: accuracy, accuracy_top5 (with more than 5 classes), control_chance (1 / C),
    examples and unreadable (counts).
    """

    source: Source
    tokenize: Tokenize
    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("{}",)
    file: str | None = None
    preprocess: tuple[Op, ...] | None = None
    every_steps: int = 1000
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_fields(self)
        check_templates(self.templates)

    def prepare(self, context: Context) -> Runner:
        check_towers(context)
        names, templates = self._prompts(context)
        prompts = [template.replace("{}", n) for n in names for template in templates]
        # One text a row, whatever training draws.
        tokenize = dataclasses.replace(self.tokenize, captions=0)
        embed = TextEmbedder(context, tokenize, prompts, self.batch_size)

        def look(forward: Forward, batch: Batch, rng: Array) -> dict[str, Array]:
            image = forward(image=batch["image"])["image_embedding"]
            return {"embedding": image, "label": batch["label"]}

        step = context.make_eval_step(look)
        ops = context.preprocess if self.preprocess is None else self.preprocess
        where = (self.source, ops, self.batch_size)
        if context.check_step(step, *where)["label"].ndim != 1:
            raise ValueError(
                f"{context.name}: {self.source.name(0)} has several labels an image; "
                "zero-shot accuracy needs exactly one."
            )

        def run(state: Any) -> dict[str, Any]:
            texts = embed(state).reshape(len(names), len(templates), -1)
            classes = normalised(normalised(texts).mean(axis=1))
            rows = context.rows(step, state, *where)
            counts = context.counts(self.source, len(rows["label"]))
            hits = ranks(rows["embedding"], classes, rows["label"])
            scores = {"accuracy": float((hits == 0).mean())}
            if len(names) > TOP:
                scores["accuracy_top5"] = float((hits < TOP).mean())
            return {**scores, "control_chance": 1 / len(names), **counts}

        return run

    def _prompts(self, context: Context) -> tuple[list[str], tuple[str, ...]]:
        """Returns the classes' names in the source's order, and templates."""
        classes = tuple(self.source.class_names)
        if not classes:
            raise ValueError(
                f"{context.name}: {self.source.name(0)} has no classes; give a "
                "labelled set."
            )
        names, templates = self.names or classes, self.templates
        if self.file is not None:
            found = read_prompts(self.file)
            names = found.get("names", names)
            templates = tuple(found.get("templates", templates))
        where = self.file or "names"
        by_name = isinstance(names, Mapping)
        if by_name:
            missing = [name for name in classes if name not in names]
            if missing:
                hint = did_you_mean(missing[0], names)
                raise ValueError(
                    f"{context.name}: {where} does not name {some(missing)} of the "
                    f"source's classes.{hint} Add them."
                )
            names = [names[name] for name in classes]
        if len(names) != len(classes):
            raise ValueError(
                f"{context.name}: {where} has {len(names)} names for {len(classes)} "
                f"classes, {some(classes)}; give one for each, in this order."
            )
        if not by_name and tuple(names) != classes:
            pairs = [
                f"{a} is called {b!r}" for a, b in zip(classes, names, strict=True)
            ]
            context.log(f"{context.name}: by their order {some(pairs, 3)}")
        return list(names), templates


def ranks(
    images: Float[np.ndarray, "M E"],
    classes: Float[np.ndarray, "C E"],
    labels: Any,
) -> np.ndarray:
    """Returns how many other classes lie at least as near as the right one, int [M]."""
    scores = images @ classes.T
    own = np.take_along_axis(scores, np.asarray(labels)[:, None], axis=1)
    # Classes of equal score count as nearer, or one vector for all would be right.
    return (scores >= own).sum(axis=1) - 1


def check_templates(templates: Any) -> None:
    """Raises ValueError unless there are templates, each with a place for a name."""
    wrong = [t for t in templates if not isinstance(t, str) or t.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(
            f"ZeroShot(templates={tuple(templates)}): give at least one, each with "
            'one "{}" where the class\'s name goes, such as "a photo of a {}".'
        )


def read_prompts(path: str) -> dict[str, Any]:
    """Returns "names" and "templates" of a JSON file, those of both that it has.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON of that form.
    """
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"There is no file of prompts {path}; give the path of a JSON file, or "
            "names and templates in the recipe."
        )
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    form = '{"names": {class: name} or [name, ...], "templates": ["a photo of a {}"]}'
    if not isinstance(found, dict) or not found.keys() <= {"names", "templates"}:
        keys = some(sorted(found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path} holds {keys}; expected {form}.")
    names = found.get("names", [])
    texts = names.values() if isinstance(names, dict) else names
    if not isinstance(names, dict | list) or not all(isinstance(n, str) for n in texts):
        raise ValueError(f"{path}: names must be texts; expected {form}.")
    if "templates" in found:
        check_templates(found["templates"])
    return found
