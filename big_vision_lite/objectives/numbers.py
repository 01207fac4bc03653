"""Outputs that are numbers and no classes, of weights that came without a loss."""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from big_vision_lite.types import Batch, Forward, Logits, Objective


@dataclasses.dataclass(kw_only=True)
class Numbers(Objective):
    """Says that the logits are numbers: those of a regression or an embedding.

    What loss they were trained with is unknown, so nothing can be trained with it.
    """

    logits: ClassVar[Logits | None] = Logits.NONE

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        raise ValueError(
            "The outputs of these weights are numbers (a regression or an embedding), "
            "and no loss of them is known. Take them with predict, or fine-tune: "
            "--config configs/finetune.py:init=WEIGHTS,data=FOLDER"
        )
