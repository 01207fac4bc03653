"""Defines learning-rate schedules, and the decay of the parameter average (EMA).

Update `step` counts from 0 and a warm-up multiplies by min(1, step / warmup_steps), so
with a warm-up the very first update has learning rate 0. Formulas as in big_vision.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from big_vision_lite.types import Array


@dataclasses.dataclass(kw_only=True)
class Average:
    """An exponential moving average (EMA): average <- d average + (1 - d) new.

    The decay d is `start`, or grows from there to `end` along half a cosine: 0.996 to
    1 for teachers of self-distillation (arXiv:2006.07733, section 3.3).

    Running statistics of batch norm are averaged alike. Before an evaluation or a
    checkpoint the averaged parameters get statistics of their own, measured on
    `recalibrate_statistics` training batches, of one epoch at most (after
    arXiv:2105.07576, section 3; 100 is our choice); 0 leaves them the averaged ones.
    """

    start: float = 0.9999
    end: float | None = None
    recalibrate_statistics: int = 100

    def __post_init__(self) -> None:
        if self.recalibrate_statistics < 0:
            raise ValueError(
                f"ema.recalibrate_statistics={self.recalibrate_statistics} is no "
                "number of batches; use 0 to keep the averaged statistics."
            )
        if not 0 < self.start < 1:
            raise ValueError(
                f"ema.start={self.start} must lie between 0 and 1; for no average "
                "--config.ema=none."
            )
        if self.end is not None and not self.start <= self.end <= 1:
            raise ValueError(
                f"ema.end={self.end} must lie between start={self.start} and 1, or be "
                "none for a decay that stays."
            )

    def decay(self, progress: Array | None) -> Any:
        """Returns the decay at `progress`, the fraction 0..1 of the run that is done.

        Raises:
            ValueError: the decay grows, but `progress` is None.
        """
        if self.end is None:
            return self.start
        if progress is None:
            raise ValueError("ema.end is set: give num_steps to make_train_step.")
        left = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return self.end - (self.end - self.start) * left


@dataclasses.dataclass(kw_only=True)
class WarmupCosine:
    """Schedule with linear warm-up to `peak`, then half a cosine to 0 at the end."""

    peak: float
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def build(self, num_steps: int) -> Callable[[Any], Array]:
        """Returns the learning rate of update `step` in [0, num_steps), float32."""
        _check_fits(num_steps, warmup_steps=self.warmup_steps)

        def learning_rate(step: Any) -> Array:
            done = _done(step, self.warmup_steps, num_steps)
            decay = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
            return self.peak * decay * _warmup(step, self.warmup_steps)

        return learning_rate


@dataclasses.dataclass(kw_only=True)
class WarmupLinear:
    """Schedule with linear warm-up to `peak`, linear decay to `end_fraction * peak`."""

    peak: float
    warmup_steps: int = 0
    end_fraction: float = 0.0

    def __post_init__(self) -> None:
        _check(self)
        if not 0 <= self.end_fraction <= 1:
            raise ValueError(
                f"schedule.end_fraction={self.end_fraction} is a fraction of the peak: "
                "use 0.0 to 1.0."
            )

    def build(self, num_steps: int) -> Callable[[Any], Array]:
        """Returns the learning rate of update `step` in [0, num_steps), float32."""
        _check_fits(num_steps, warmup_steps=self.warmup_steps)

        def learning_rate(step: Any) -> Array:
            done = _done(step, self.warmup_steps, num_steps)
            low = self.end_fraction
            decay = low + (1.0 - low) * (1.0 - done)
            return self.peak * decay * _warmup(step, self.warmup_steps)

        return learning_rate


@dataclasses.dataclass(kw_only=True)
class WarmupRsqrt:
    """Schedule with linear warm-up, then `peak` / sqrt(1 + steps / timescale_steps).

    It does not depend on the run's length before the last `cooldown_steps`, which
    multiply it by a linear decay to 0: one long run can be cooled down at several
    lengths. `shift_steps` starts later on the curve, to continue another run. ViT-g:
    timescale and warm-up 10_000, cooldown 50_000 of 1M steps (arXiv:2106.04560).
    """

    peak: float
    warmup_steps: int = 0
    timescale_steps: int = 10_000
    shift_steps: int = 0
    cooldown_steps: int = 0

    def __post_init__(self) -> None:
        _check(self)
        if self.timescale_steps < 1:
            raise ValueError(
                f"schedule.timescale_steps={self.timescale_steps} must be at least 1; "
                "10000 is usual."
            )

    def build(self, num_steps: int) -> Callable[[Any], Array]:
        """Returns the learning rate of update `step` in [0, num_steps), float32."""
        _check_fits(
            num_steps,
            warmup_steps=self.warmup_steps,
            cooldown_steps=self.cooldown_steps,
        )

        def learning_rate(step: Any) -> Array:
            since = jnp.maximum(_float(step) - self.warmup_steps, 0.0)
            decay = 1 / jnp.sqrt(1 + (since + self.shift_steps) / self.timescale_steps)
            return (
                self.peak
                * decay
                * _warmup(step, self.warmup_steps)
                * _cooldown(step, self.cooldown_steps, num_steps)
            )

        return learning_rate


@dataclasses.dataclass(kw_only=True)
class Constant:
    """Schedule that stays at `peak` between linear warm-up and linear cooldown to 0."""

    peak: float
    warmup_steps: int = 0
    cooldown_steps: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def build(self, num_steps: int) -> Callable[[Any], Array]:
        """Returns the learning rate of update `step` in [0, num_steps), float32."""
        _check_fits(
            num_steps,
            warmup_steps=self.warmup_steps,
            cooldown_steps=self.cooldown_steps,
        )

        def learning_rate(step: Any) -> Array:
            return (
                self.peak
                * _warmup(step, self.warmup_steps)
                * _cooldown(step, self.cooldown_steps, num_steps)
            )

        return learning_rate


@dataclasses.dataclass(kw_only=True)
class StepDrops:
    """Schedule with linear warm-up to `peak`, multiplied by `factor` after each drop.

    Drops are steps (`drop_steps`) or fractions of the run (`drop_fractions`), in rising
    order. The update at the drop itself still has the old rate; the next has the new
    one, as in BiT (arXiv:1912.11370): its pretraining drops at 30, 60 and 80 of 90
    epochs; its transfers follow `bit_hyperrule_steps`.
    """

    peak: float
    warmup_steps: int = 0
    drop_steps: tuple[int, ...] = ()
    drop_fractions: tuple[float, ...] = ()
    factor: float = 0.1

    def __post_init__(self) -> None:
        _check(self)
        if bool(self.drop_steps) == bool(self.drop_fractions):
            raise ValueError(
                f"schedule.drop_steps={self.drop_steps} and "
                f"schedule.drop_fractions={self.drop_fractions}: give exactly one of "
                "them, or use Constant."
            )
        drops = self.drop_steps or self.drop_fractions
        if list(drops) != sorted(set(drops)) or drops[0] <= 0:
            raise ValueError(
                f"schedule drops {drops} must be positive and in rising order; use "
                f"{tuple(sorted({d for d in drops if d > 0}))}."
            )
        if self.drop_fractions and self.drop_fractions[-1] >= 1:
            raise ValueError(
                f"schedule.drop_fractions={self.drop_fractions} are fractions of the "
                "run, below 1; steps go into drop_steps."
            )

    def build(self, num_steps: int) -> Callable[[Any], Array]:
        """Returns the learning rate of update `step` in [0, num_steps), float32."""
        _check_fits(num_steps, warmup_steps=self.warmup_steps)
        drops = self.drop_steps or tuple(
            round(fraction * num_steps) for fraction in self.drop_fractions
        )
        if self.drop_steps and self.drop_steps[-1] >= num_steps:
            raise ValueError(
                f"schedule.drop_steps={self.drop_steps} go beyond the run of "
                f"{num_steps} steps; use steps below {num_steps}, or drop_fractions, "
                "which follow the length of the run."
            )

        def learning_rate(step: Any) -> Array:
            passed = sum((_float(step) > drop).astype(jnp.float32) for drop in drops)
            decay = jnp.power(self.factor, passed)
            return self.peak * decay * _warmup(step, self.warmup_steps)

        return learning_rate


def bit_hyperrule_steps(num_examples: int) -> tuple[int, int, int, int, int]:
    """Returns BiT-HyperRule's warm-up steps, three drop steps and total steps.

    `num_examples` is the size of the training set (arXiv:1912.11370, section 3.3).
    """
    if num_examples < 20_000:
        return 100, 200, 300, 400, 500
    if num_examples < 500_000:
        return 500, 3000, 6000, 9000, 10_000
    return 500, 6000, 12_000, 18_000, 20_000


def bit_hyperrule(num_examples: int, peak: float = 0.003) -> StepDrops:
    """Returns BiT-HyperRule's schedule; run it for `bit_hyperrule_steps(...)[-1]`.

    `peak` is 0.003 at batch 512; BiT's setting for batch 128 is 0.001.
    """
    warmup_steps, *drop_steps, _ = bit_hyperrule_steps(num_examples)
    return StepDrops(peak=peak, warmup_steps=warmup_steps, drop_steps=tuple(drop_steps))


def _check(schedule: Any) -> None:
    if not 0 < schedule.peak < float("inf"):
        raise ValueError(
            f"schedule.peak={schedule.peak} is not a learning rate; use a positive "
            "number, and freeze= to keep parameters as they are."
        )
    for field in ("warmup_steps", "cooldown_steps", "shift_steps"):
        if getattr(schedule, field, 0) < 0:
            raise ValueError(
                f"schedule.{field}={getattr(schedule, field)} is negative; use 0 or "
                "more steps."
            )


def _check_fits(num_steps: int, **parts: int) -> None:
    """Raises ValueError if warm-up and cooldown leave no step at the peak."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}: a run needs at least 1 step.")
    if sum(parts.values()) >= num_steps and sum(parts.values()) > 0:
        given = [f"schedule.{name}={n}" for name, n in parts.items() if n]
        leave = "leaves" if len(given) == 1 else "leave"
        raise ValueError(
            f"{' and '.join(given)} {leave} nothing of a run of {num_steps} steps; at "
            f"most {num_steps - 1} may go there. For example "
            f"--config.optimizer.schedule.warmup_steps={num_steps // 20}, or a longer "
            f"run with --config.num_steps={20 * sum(parts.values())}"
        )


def _float(step: Any) -> Array:
    # Exact up to 2^24 = 16.7 million steps.
    return jnp.asarray(step, jnp.float32)


def _warmup(step: Any, warmup_steps: int) -> Array:
    if warmup_steps == 0:
        return jnp.ones_like(_float(step))
    return jnp.minimum(1.0, _float(step) / warmup_steps)


def _cooldown(step: Any, cooldown_steps: int, num_steps: int) -> Array:
    if cooldown_steps == 0:
        return jnp.ones_like(_float(step))
    return jnp.clip((num_steps - _float(step)) / cooldown_steps, 0.0, 1.0)


def _done(step: Any, warmup_steps: int, num_steps: int) -> Array:
    """Returns the fraction of the steps after warm-up that is done, in [0, 1]."""
    return jnp.clip((_float(step) - warmup_steps) / (num_steps - warmup_steps), 0, 1)
