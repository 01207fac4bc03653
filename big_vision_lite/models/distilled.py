"""A student beside frozen teachers, for distillation."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, Shaped

from big_vision_lite.models.blocks import layers
from big_vision_lite.models.embedder import unit
from big_vision_lite.models.phi_s import PhiS
from big_vision_lite.runtime import layout
from big_vision_lite.types import Batch, Model


class Distilled(nn.Module, Model, kw_only=True):
    """Returns what the student does, and what each teacher says of the same images.

    "teacher_<i>" holds the outputs of `teachers[i]`, in evaluation mode and without
    gradient: teachers are frozen by freeze=("teachers_.*",) in the recipe, and each
    takes its weights by Init(path=TEACHER, into="teachers_<i>"). A teacher sees the
    very pixels that the student sees, scaled by its own constants; `teacher_size_px`,
    one number a teacher, resizes them (bilinear, antialiased) to the size it wants.
    With `adaptors` the student's pooled features are mapped to the width of each
    teacher's, by a layer norm, GELU and two layers `adaptor_width` wide: "adapted_<i>".
    After training only the student is used.

    What training measures of the teachers is kept in collections, so the batch is not
    split into micro-batches. `standardise_steps` gives "standard_<i>", the teacher's
    pooled features standardised by PHI-S over that many first batches (`phi_s.PhiS`).
    `queue_length` gives "queue_<i>", the unit vectors of the teacher's last so many
    images [Q, D], those of this batch first, and "queue_<i>_filled", how many there
    are; evaluation only reads. 0 switches either off.
    """

    backbone: ClassVar = "student"

    student: Model
    teachers: tuple[Model, ...]
    teacher_size_px: tuple[int, ...] = ()
    adaptors: bool = False
    adaptor_width: int = 1024
    standardise_steps: int = 0
    queue_length: int = 0

    def __post_init__(self) -> None:
        layers.check_positive(adaptor_width=self.adaptor_width)
        for name in ("standardise_steps", "queue_length"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} is negative; use 0 for none."
                )
        if not self.teachers:
            raise ValueError("Distilled has no teachers; give teachers=(ViT(...),).")
        if self.teacher_size_px and len(self.teacher_size_px) != len(self.teachers):
            raise ValueError(
                f"teacher_size_px={self.teacher_size_px} has another length than the "
                f"{len(self.teachers)} teachers; give each one size, or none at all."
            )
        super().__post_init__()

    def notes(self, batch: Batch) -> list[str]:
        """Returns a sentence on each teacher that sees images of another size."""
        height, width = batch["image"].shape[1:3]
        return [
            f"teachers_{index} sees the images of {height} x {width} px as {size} x "
            f"{size} px (model.teacher_size_px)."
            for index, size in enumerate(self.teacher_size_px)
            if (height, width) != (size, size)
        ]

    @nn.compact
    def __call__(
        self, image: Num[Array, "B H W C"], *, train: bool = False
    ) -> dict[str, Any]:
        student: Any = self.student
        outputs = dict(student(image, train=train))
        for index, model in enumerate(self.teachers):
            teacher: Any = model
            seen = image
            if self.teacher_size_px:
                seen = resized(image, self.teacher_size_px[index])
            found = jax.lax.stop_gradient(teacher(seen, train=False))
            outputs[f"teacher_{index}"] = found
            if self.adaptors:
                width = found["pooled"].shape[-1]
                x = layers.layer_norm(layers.Dtype.FLOAT32, f"adaptor_{index}_norm")(
                    outputs["pooled"]
                )
                hidden = layers.Dense(
                    features=self.adaptor_width, name=f"adaptor_{index}_hidden"
                )
                out = layers.Dense(features=width, name=f"adaptor_{index}_out")
                outputs[f"adapted_{index}"] = out(nn.gelu(hidden(x)))
            if self.standardise_steps:
                standard = PhiS(
                    sample_steps=self.standardise_steps, name=f"standard_{index}"
                )
                outputs[f"standard_{index}"] = standard(found["pooled"], train)
            if self.queue_length:
                queue = Queue(length=self.queue_length, name=f"queue_{index}")
                rows, filled = queue(unit(found["pooled"]), train)
                outputs |= {f"queue_{index}": rows, f"queue_{index}_filled": filled}
        return outputs


class Queue(nn.Module, kw_only=True):
    """Keeps the last `length` rows that training showed, the newest first."""

    length: int

    @nn.compact
    def __call__(
        self, rows: Float[Array, "B D"], train: bool
    ) -> tuple[Float[Array, "Q D"], Int[Array, ""]]:
        """Returns the queue, with `rows` in training, and how much of it is filled."""
        shape = (self.length, rows.shape[-1])
        kept = self.variable("queues", "rows", jnp.zeros, shape, jnp.float32)
        filled = self.variable("queues", "filled", jnp.zeros, (), jnp.int32)
        if train and not self.is_initializing():
            rows = layout.gather(jax.lax.stop_gradient(rows))
            kept.value = jnp.concatenate([rows, kept.value])[: self.length]
            filled.value = jnp.minimum(filled.value + len(rows), self.length)
        return kept.value, filled.value


def resized(
    image: Num[Array, "B H W C"], size_px: int
) -> Shaped[Array, "B size_px size_px C"]:
    """Returns square images as float32 in the units of `image`."""
    shape = (len(image), size_px, size_px, image.shape[-1])
    x = image.astype(jnp.float32)
    return jax.image.resize(x, shape, "linear", antialias=True)
