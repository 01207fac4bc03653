"""Self-distillation: a student predicts what its own average says of other views."""

import dataclasses
import enum
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from big_vision_lite.objectives.collapse import entropy, spread
from big_vision_lite.objectives.views import flat_views, split, unit, valid_rows
from big_vision_lite.types import Batch, Forward, Objective

# B images, G global views, V views, K prototypes, D dimensions


class Balance(enum.StrEnum):
    """What keeps the teacher from choosing one prototype for all images.

    SINKHORN  prototypes get equal shares of the batch, by three rounds of scaling rows
              and columns (arXiv:2006.09882); the teacher sees the whole batch
    CENTRE    a running mean is subtracted from the scores (arXiv:2104.14294); the
              model keeps it: centre_momentum=0.9
    """

    SINKHORN = "sinkhorn"
    CENTRE = "centre"


@dataclasses.dataclass(kw_only=True)
class SelfDistillation(Objective):
    """DINO: the student predicts its average's prototypes of other views of an image.

    After arXiv:2104.14294; the recipe sets ema=Average(...) and the model has
    prototypes. The teacher sees the views under `global_views`, the student those and,
    if the name is given, `local_views`. The loss is the mean over pairs of different
    views of the cross-entropy from the teacher's shares, softmax(scores /
    teacher_temperature) balanced by `balance`, to softmax(scores /
    student_temperature). The teacher's temperature grows from
    `teacher_temperature_start`, None for none, over the first `teacher_warmup` of the
    run. `koleo_weight` adds KoLeo on the pooled features of each global view. Sinkhorn
    and KoLeo are of the global batch.

    Metrics: teacher_entropy in nats, prototypes_used (those that are the teacher's
    first choice for some view), teacher_distance (1 - cosine of the embeddings of
    student and teacher) and those of `collapse.spread`.
    """

    needs_whole_batch: ClassVar[bool] = True
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    teacher_temperature_start: float | None = None
    teacher_warmup: float = 0.3
    balance: Balance = Balance.SINKHORN
    koleo_weight: float = 0.0
    global_views: str = "views"
    local_views: str = ""

    def __post_init__(self) -> None:
        start = self.teacher_temperature_start
        values = (self.student_temperature, self.teacher_temperature, start or 1.0)
        if min(values) <= 0 or not 0 < self.teacher_warmup <= 1:
            raise ValueError(
                f"SelfDistillation: temperatures {values} must be above 0 and "
                f"teacher_warmup={self.teacher_warmup} a share of the run above 0."
            )

    def __call__(
        self, forward: Forward, batch: Batch, rng: Array
    ) -> tuple[Float[Array, " B"], dict[str, Array]]:
        images = flat_views(batch, self.global_views, least=2)
        size = len(batch[self.global_views])
        if size < 2:
            raise ValueError(
                "A batch of one image gives every prototype the same share; use "
                "--config.data.batch_size=2 or more, hundreds are usual."
            )
        valid = valid_rows(batch, size)
        teacher = jax.lax.stop_gradient(forward(image=images, params="ema"))
        student = forward(image=images)
        scores = split(teacher["scores"], batch, self.global_views)
        targets = self._targets(forward, scores, teacher, valid)
        predicted = [split(student["scores"], batch, self.global_views)]
        if self.local_views:
            local = forward(image=flat_views(batch, self.local_views, least=1))
            predicted.append(split(local["scores"], batch, self.local_views))
        log_shares = jax.nn.log_softmax(
            jnp.concatenate(predicted, axis=1) / self.student_temperature
        )
        pairs = -jnp.einsum("bgk,bvk->bgv", targets, log_shares)
        # A view is not predicted from itself.
        other = 1 - jnp.eye(pairs.shape[1], pairs.shape[2])
        losses = (pairs * other).sum(axis=(1, 2)) / other.sum()
        if self.koleo_weight:
            pooled = split(student["pooled"], batch, self.global_views)
            views = range(pooled.shape[1])
            apart = sum(koleo(pooled[:, view], valid) for view in views)
            losses = losses + self.koleo_weight * apart
        chosen = jax.nn.one_hot(targets.argmax(axis=-1), targets.shape[-1])
        cosine = unit(student["embedding"]) * unit(teacher["embedding"])
        metrics = {
            "teacher_entropy": entropy(targets).mean(axis=1),
            "prototypes_used": chosen.any(axis=(0, 1)).sum().astype(jnp.float32),
            "teacher_distance": 1 - cosine.sum(axis=-1).mean(),
            **spread(student["pooled"]),
        }
        return losses, metrics

    def _targets(
        self,
        forward: Forward,
        scores: Float[Array, "B G K"],
        teacher: dict[str, Array],
        valid: Bool[Array, " B"],
    ) -> Float[Array, "B G K"]:
        temperature = self.teacher_temperature
        if self.teacher_temperature_start is not None:
            start = self.teacher_temperature_start
            part = jnp.minimum(forward.progress / self.teacher_warmup, 1)
            temperature = start + (temperature - start) * part
        rows = scores.reshape(-1, scores.shape[-1])
        valid = jnp.repeat(valid, scores.shape[1])
        if self.balance == Balance.SINKHORN:
            targets = sinkhorn(rows / temperature, valid)
        else:
            if "centre" not in teacher:
                raise ValueError(
                    "balance=centre subtracts a running mean that the model keeps; use "
                    "--config.model.centre_momentum=0.9, or balance=sinkhorn."
                )
            targets = jax.nn.softmax((rows - teacher["centre"]) / temperature)
            # Used from the next step on.
            forward(method="observe", scores=rows)
        return jax.lax.stop_gradient(targets.reshape(scores.shape))


def sinkhorn(
    logits: Float[Array, "N K"], valid: Bool[Array, " N"], rounds: int = 3
) -> Float[Array, "N K"]:
    """Returns shares of prototypes for each valid row, used about equally by all.

    From exp(logits), `rounds` times: every prototype's column is scaled to the sum 1 /
    K, then every row to the sum 1 (arXiv:2006.09882).
    """
    # By logarithms: at low temperatures exp overflows, and rows far below vanish.
    shares = jnp.where(valid[:, None], logits.astype(jnp.float32), -jnp.inf)
    for _ in range(rounds):
        column = jax.nn.logsumexp(shares, axis=0) + jnp.log(shares.shape[1])
        shares = shares - column
        row = jax.nn.logsumexp(shares, axis=1, keepdims=True)
        shares = jnp.where(valid[:, None], shares - row, -jnp.inf)
    return jnp.exp(shares)


def koleo(features: Float[Array, "B D"], valid: Bool[Array, " B"]) -> Float[Array, ""]:
    """Returns KoLeo (arXiv:1806.03198): -mean log distance of nearest unit vectors."""
    x = unit(features)
    similarity = jnp.where(
        jnp.eye(len(x), dtype=bool) | ~valid[None, :], -jnp.inf, x @ x.T
    )
    nearest = x[jax.lax.stop_gradient(similarity.argmax(axis=1))]
    distance = jnp.sqrt(jnp.square(x - nearest + 1e-8).sum(axis=1))
    losses = -jnp.log(distance + 1e-8)
    return jnp.where(valid, losses, 0).sum() / jnp.maximum(valid.sum(), 1)
