"""Self-distillation: a student predicts what its own average says of other views."""

import dataclasses
import enum
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from big_vision_lite.objectives.collapse import entropy, spread
from big_vision_lite.objectives.masked_patches import MaskedPatches
from big_vision_lite.objectives.views import (
    flat_views,
    mean_over,
    split,
    unit,
    valid_rows,
)
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

    The teacher's batch norms take the statistics of the views that it sees, as in the
    published code, or with `teacher_batch_statistics=False` the running averages, which
    evaluation always takes.

    `patches` adds iBOT (arXiv:2111.07832): patches of the student's global views are
    hidden, and it predicts the teacher's prototypes of them; the model has
    patch_prototypes. The loss of a view without hidden patches counts as 0.

    Metrics: teacher_entropy in nats, prototypes_used (those that are the teacher's
    first choice for some view), teacher_distance (1 - cosine of the embeddings of
    student and teacher), those of `collapse.spread`, and with `patches` patch_loss and
    patch_teacher_entropy of the hidden ones.
    """

    needs_whole_batch: ClassVar[bool] = True
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    teacher_temperature_start: float | None = None
    teacher_warmup: float = 0.3
    balance: Balance = Balance.SINKHORN
    koleo_weight: float = 0.0
    teacher_batch_statistics: bool = True
    global_views: str = "views"
    local_views: str = ""
    patches: MaskedPatches | None = None

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
        teacher = jax.lax.stop_gradient(self._teacher(forward, image=images))
        if self.patches is None:
            student = forward(image=images)
            masked, patch_metrics = 0.0, {}
        else:
            student, masked, patch_metrics = self._predict_patches(
                forward, batch, images, teacher, rng
            )
        scores = split(teacher["scores"], batch, self.global_views)
        targets = self._targets(forward, "centre", scores, valid, teacher)
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
        losses = (pairs * other).sum(axis=(1, 2)) / other.sum() + masked
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
            **patch_metrics,
            **spread(student["pooled"]),
        }
        return losses, metrics

    def _teacher(self, forward: Forward, **inputs: Any) -> dict[str, Array]:
        statistics = "batch" if self.teacher_batch_statistics else "running"
        return forward(params="ema", statistics=statistics, **inputs)

    def _predict_patches(
        self,
        forward: Forward,
        batch: Batch,
        images: Array,
        teacher: dict[str, Array],
        rng: Array,
    ) -> tuple[dict[str, Array], Float[Array, " B"], dict[str, Array]]:
        """Returns the student's outputs for views with hidden patches, and their loss.

        The loss is one value an image, the mean over its views.
        """
        patches = self.patches
        _, rows, columns, _ = teacher["grid"].shape
        assert patches is not None
        places, hidden, replaced = patches.draw(rng, len(images), (rows, columns))
        student = forward(image=images, replaced=replaced)
        tokens = _at(teacher["grid"], places)
        of_teacher = self._teacher(forward, method="score_patches", tokens=tokens)
        tokens = _at(student["grid"], places)
        of_student = forward(method="score_patches", tokens=tokens)
        views = batch[self.global_views].shape[1]
        valid = jnp.repeat(valid_rows(batch, len(images) // views), views)[:, None]
        counted = valid & (hidden | (patches.visible_weight > 0))
        targets = self._targets(
            forward, "patch_centre", of_teacher["scores"], counted, teacher
        )
        log_shares = jax.nn.log_softmax(of_student["scores"] / self.student_temperature)
        losses = -(targets * log_shares).sum(axis=-1)
        progress = jnp.asarray(forward.progress if patches.progress_end else 1.0)
        weighted = (losses * patches.weights(hidden, progress)).sum(axis=1)
        number = jnp.maximum((hidden & valid).sum(), 1)

        def over_hidden(x: Float[Array, "V n"]) -> Float[Array, ""]:
            return jnp.where(hidden & valid, x, 0).sum() / number

        metrics = {
            "patch_loss": over_hidden(losses),
            "patch_teacher_entropy": over_hidden(entropy(targets)),
        }
        return student, weighted.reshape(-1, views).mean(axis=1), metrics

    def _targets(
        self,
        forward: Forward,
        name: str,
        scores: Float[Array, "B V K"],
        counted: Bool[Array, "..."],
        teacher: dict[str, Array],
    ) -> Float[Array, "B V K"]:
        """Returns the teacher's shares; `name` is that of the mean for Balance.CENTRE.

        What is not `counted`, [B] or [B, V], has no part in the balance.
        """
        temperature = self.teacher_temperature
        if self.teacher_temperature_start is not None:
            start = self.teacher_temperature_start
            part = jnp.minimum(forward.progress / self.teacher_warmup, 1)
            temperature = start + (temperature - start) * part
        rows = scores.reshape(-1, scores.shape[-1])
        each = counted.reshape(len(scores), -1)
        each = jnp.broadcast_to(each, scores.shape[:2]).reshape(-1)
        if self.balance == Balance.SINKHORN:
            targets = sinkhorn(rows / temperature, each)
        else:
            if name not in teacher:
                raise ValueError(
                    "balance=centre subtracts a running mean that the model keeps; use "
                    "--config.model.centre_momentum=0.9, or balance=sinkhorn."
                )
            targets = jax.nn.softmax((rows - teacher[name]) / temperature)
            # Used from the next step on.
            forward(method="observe", means={name: mean_over(rows, each)})
        return jax.lax.stop_gradient(targets.reshape(scores.shape))


def _at(
    grid: Float[Array, "V h w E"], places: Int[Array, "V n"]
) -> Float[Array, "V n E"]:
    tokens = grid.reshape(len(grid), -1, grid.shape[-1])
    return jnp.take_along_axis(tokens, places[:, :, None], axis=1)


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
