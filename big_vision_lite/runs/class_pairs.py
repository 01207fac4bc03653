"""The pairing of a data set's classes with those of a model, by name or in order."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from big_vision_lite.config import MatchClasses
from big_vision_lite.conversion.assumption import About, Assumption
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
        """Returns the batch with its labels in the model's order.

        Those are "label", [B], [B, C] or tags int [B, K] padded with -1, and the
        numbers of "target" [B, T].
        """
        if self.indices is None:
            return batch
        indices = jnp.asarray(self.indices)
        found = {n: x for n, x in batch.items() if n in ("label", "target")}
        for name, values in found.items():
            if jnp.issubdtype(values.dtype, jnp.integer):
                found[name] = jnp.where(values < 0, values, indices[values])
            else:
                empty = jnp.zeros((len(values), len(self.names)), values.dtype)
                found[name] = empty.at[:, indices].set(values)
        return {**batch, **found}

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
    or the order differs: that is done when it is asked for, and where one side has no
    names and the others are those numbers. In messages `name` and `ours_is` name the
    two sides, and `option` the flag of `match`.

    Raises:
        ValueError: the source has a class that `ours` lacks, one side has no names, or
            names are ambiguous.
    """
    if tuple(theirs) == tuple(ours):
        return ClassTable(indices=np.arange(len(ours), dtype=np.int32), message=None)
    known = theirs or ours
    numbered = all(n.isdecimal() and int(n) == label for label, n in enumerate(known))
    if match == MatchClasses.IN_ORDER or (numbered and not (theirs and ours)):
        return _in_order(theirs, ours, name, ours_is, option)
    hint = ""
    # In order only works with as many classes as the model has.
    if option is not None and (not theirs or not ours or len(theirs) == len(ours)):
        hint = f" Where only the names differ and not the order: {option}=in_order"
    if not theirs or not ours:
        named, nameless = (name, ours_is) if theirs else (ours_is, name)
        raise ValueError(
            f"{named} has {len(known)} classes ({some(known)}), {nameless} no class "
            f"names: which is which cannot be known.{hint}"
        )
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


def _in_order(
    theirs: Sequence[str],
    ours: Sequence[str],
    name: str,
    ours_is: str,
    option: str | None,
) -> ClassTable:
    """Returns the identity, and that it is assumed."""
    if theirs and ours and len(theirs) != len(ours):
        raise ValueError(
            f"{name} has {len(theirs)} classes, {ours_is} {len(ours)}: in order they "
            f"do not match; use {option or 'match_classes'}=by_name."
        )
    known = theirs or ours
    if theirs and ours:
        pairs = [f"{a} = {b}" for a, b in zip(theirs, ours, strict=True)]
        words = f"{name} and {ours_is} are paired in order: {some(pairs)}"
    else:
        named, nameless = (name, ours_is) if theirs else (ours_is, name)
        pairs = [f"{index} = {one}" for index, one in enumerate(known)]
        words = (
            f"{nameless} has no class names, paired in order with {named}: "
            f"{some(pairs)}"
        )
    return ClassTable(
        indices=np.arange(len(known), dtype=np.int32),
        message=str(Assumption(About.CLASSES, words)),
    )
