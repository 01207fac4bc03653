"""The pairing of a data set's classes with those of a model, by name or in order."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from big_vision_lite.config import MatchClasses
from big_vision_lite.messages import some
from big_vision_lite.types import Array, Batch


@dataclasses.dataclass(kw_only=True)
class ClassTable:
    """A label mapping: `indices[c]` is the model's label of the source's class c."""

    indices: Int32[np.ndarray, " classes"]
    message: str | None

    @property
    def is_identity(self) -> bool:
        """Returns whether every class has the same label on both sides."""
        return np.array_equal(self.indices, np.arange(len(self.indices)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classes:
    """The `names` of the model's classes, and a source's labels among them."""

    evaluator: str  # for messages
    names: tuple[str, ...]
    # The model's label for each of the source's; None: they are the same.
    indices: Int32[np.ndarray, " classes"] | None = None

    def translate(self, batch: Batch) -> Batch:
        """Returns the batch with its "label", [B] or [B, C], in the model's order."""
        if self.indices is None or "label" not in batch:
            return batch
        label, indices = batch["label"], jnp.asarray(self.indices)
        if label.ndim == 1:
            return {**batch, "label": indices[label]}
        empty = jnp.zeros((label.shape[0], len(self.names)), label.dtype)
        return {**batch, "label": empty.at[:, indices].set(label)}

    def logits(self, outputs: dict[str, Array]) -> Array:
        """Returns the model's "logits" [B, C], float32, one for each class.

        Raises:
            ValueError: the model has no logits, or not as many as there are classes.
        """
        logits = outputs["logits"].astype(jnp.float32)
        if logits.shape[-1] != len(self.names):
            raise ValueError(
                f"{self.evaluator}: the model has {logits.shape[-1]} logits, "
                f"but there are {len(self.names)} classes; give its head as many "
                "outputs as there are classes."
            )
        return logits


def class_table(
    theirs: Sequence[str],
    ours: Sequence[str],
    *,
    name: str,
    ours_is: str,
    match: MatchClasses = MatchClasses.BY_NAME,
    option: str | None = None,
) -> ClassTable:
    """Returns the labels in `ours` of the classes `theirs`, matched by class name.

    Matching by number would give wrong labels without an error if a class is missing
    or the order differs: that is done only when it is asked for. In messages `name` and
    `ours_is` name the two sides, and `option` the flag of `match`.

    Raises:
        ValueError: the source has a class that `ours` lacks, or names are ambiguous.
    """
    if tuple(theirs) == tuple(ours):
        return ClassTable(indices=np.arange(len(ours), dtype=np.int32), message=None)
    if match == MatchClasses.IN_ORDER:
        if len(theirs) != len(ours):
            raise ValueError(
                f"{name} has {len(theirs)} classes, {ours_is} {len(ours)}: in order "
                f"they do not match; use {option or 'match_classes'}=by_name."
            )
        return ClassTable(indices=np.arange(len(ours), dtype=np.int32), message=None)
    hint = ""
    # In order only works with as many classes as the model has.
    if option is not None and len(theirs) == len(ours):
        hint = f" Where only the names differ and not the order: {option}=in_order"
    for whose, names in ((name, theirs), (ours_is, ours)):
        twice = sorted({n for n in names if list(names).count(n) > 1})
        if twice:
            raise ValueError(
                f"{whose} has classes of the same name ({some(twice)}), so that "
                f"those of {name} cannot be told apart; give every class its own name."
                + hint
            )
    number = {class_name: index for index, class_name in enumerate(ours)}
    unknown = [n for n in theirs if n not in number]
    if unknown:
        raise ValueError(
            f"{name} has {len(unknown)} classes unknown to {ours_is}: "
            f"{some(unknown)}. It knows {len(ours)}: {some(ours)}. Rename the "
            f"classes, or take them out of {name}." + hint
        )
    missing = [n for n in ours if n not in set(theirs)]
    message = None
    if missing:
        message = (
            f"{name} has {len(theirs)} of the {len(ours)} {ours_is} classes (missing: "
            f"{some(missing)}) - indices follow {ours_is}."
        )
    indices = np.array([number[n] for n in theirs], np.int32)
    return ClassTable(indices=indices, message=message)
