"""AdamW, Lion, SGD and Adafactor in one chain: clip, direction, rate, decay.

With lr(step) the schedule, d the optimizer's direction from the clipped gradient and
per-name multipliers m (learning rate) and w (decay), every parameter p moves by

    p <- p - lr(step) * m * d - lr(step) / peak * weight_decay * w * p

so `weight_decay` is the fraction a parameter loses per step at the peak: it follows the
shape of the schedule but is not multiplied by its peak (big_vision's convention).
torch's AdamW multiplies by the learning rate: use torch's value times `peak`, for
example 1e-4 for torch's 0.1 at 1e-3. By default only names ending in "kernel" decay.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from big_vision_lite import trees
from big_vision_lite.types import Params, Schedule


class MomentumDtype(enum.StrEnum):
    """The dtype of the first moment; the second moment is always float32.

    Optax casts the average's decay to this dtype too: in bfloat16, 0.9 acts as 0.8984
    (as it does wherever optax's `mu_dtype` or `accumulator_dtype` is used).
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclasses.dataclass(kw_only=True)
class Rule:
    """Learning-rate and decay multipliers of parameters whose whole name matches.

    `learning_rate_multiplier` multiplies the schedule; 0 leaves the parameters
    untouched, decay included (`freeze=` in the recipe does the same and saves their
    gradient and state). `weight_decay_multiplier` multiplies the optimizer's; None
    keeps the default: 1 for names that end in "kernel", 0 for others.
    """

    pattern: str
    learning_rate_multiplier: float = 1.0
    weight_decay_multiplier: float | None = None

    def __post_init__(self) -> None:
        rate, decay = self.learning_rate_multiplier, self.weight_decay_multiplier
        where = f'optimizer.rules "{self.pattern}"'
        if not rate >= 0:
            raise ValueError(
                f"{where}: learning_rate_multiplier={rate}; use 0.0 or more."
            )
        if decay is not None and not decay >= 0:
            raise ValueError(
                f"{where}: weight_decay_multiplier={decay}; use 0.0 or more, or None "
                "for the default."
            )
        if rate == 0 and decay:
            raise ValueError(
                f"{where}: learning_rate_multiplier=0.0 freezes the parameters, so "
                f"weight_decay_multiplier={decay} would do nothing; leave it out."
            )


@dataclasses.dataclass(kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (see the top of this file for its unit).

    `layer_decay` scales the whole update at depth d of L blocks by
    layer_decay^(L + 1 - d), as in BEiT's and MAE's fine-tuning: embeddings have depth
    0, block i has i + 1, everything after the blocks L + 1 (`trees.layers_above`
    of the model's `layers`).
    `weight_decay_end` lets the decay move from `weight_decay` to it along half a cosine
    over the run, beside the schedule, as in DINO (arXiv:2104.14294); None keeps it.
    """

    schedule: Schedule
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    weight_decay_end: float | None = None
    clip_norm: float | None = 1.0
    rules: tuple[Rule, ...] = ()
    layer_decay: float | None = None
    momentum_dtype: MomentumDtype = MomentumDtype.FLOAT32

    def __post_init__(self) -> None:
        check_chain(self)
        check_fraction("beta1", self.beta1)
        check_fraction("beta2", self.beta2)
        if self.weight_decay_end is not None and not self.weight_decay_end >= 0:
            raise ValueError(
                f"optimizer.weight_decay_end={self.weight_decay_end}; use 0.0 or more, "
                "or None to keep the decay."
            )

    def build(
        self, num_steps: int, layers: Sequence[str] = ()
    ) -> optax.GradientTransformation:
        """Returns the chain for `num_steps` updates of a model with these `layers`."""
        direction = optax.scale_by_adam(
            b1=self.beta1,
            b2=self.beta2,
            eps=self.epsilon,
            mu_dtype=jnp.dtype(self.momentum_dtype.value),
        )
        decay = None
        if (end := self.weight_decay_end) is not None:
            decay = half_cosine(self.weight_decay, end, num_steps)
        return chain(self, direction, num_steps, layers, decay)


@dataclasses.dataclass(kw_only=True)
class Lion:
    """The sign of a mix of gradient and momentum (arXiv:2302.06675, program 1).

    Every parameter moves by the whole learning rate, so it is 3 to 10 times lower than
    AdamW's. `weight_decay` stays AdamW's: the paper raises its own, which the rate
    multiplies, by as much. One moment, half of Adam's state. In 150 steps of a small
    ViT no better than plain SGD (tests/training/test_optimizers_learn.py).
    """

    schedule: Schedule
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 1e-4
    clip_norm: float | None = 1.0
    rules: tuple[Rule, ...] = ()
    layer_decay: float | None = None
    momentum_dtype: MomentumDtype = MomentumDtype.FLOAT32

    def __post_init__(self) -> None:
        check_chain(self)
        check_fraction("beta1", self.beta1)
        check_fraction("beta2", self.beta2)

    def build(
        self, num_steps: int, layers: Sequence[str] = ()
    ) -> optax.GradientTransformation:
        """Returns the chain for `num_steps` updates of a model with these `layers`."""
        direction = optax.scale_by_lion(
            b1=self.beta1,
            b2=self.beta2,
            mu_dtype=jnp.dtype(self.momentum_dtype.value),
        )
        return chain(self, direction, num_steps, layers)


@dataclasses.dataclass(kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum; decay is decoupled, as in AdamW.

    `momentum=0.0` is plain gradient descent without any state.
    """

    schedule: Schedule
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    rules: tuple[Rule, ...] = ()
    layer_decay: float | None = None
    momentum_dtype: MomentumDtype = MomentumDtype.FLOAT32

    def __post_init__(self) -> None:
        check_chain(self)
        check_fraction("momentum", self.momentum)
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "optimizer.nesterov=True does nothing with momentum=0.0; "
                "use momentum=0.9 or nesterov=False."
            )

    def build(
        self, num_steps: int, layers: Sequence[str] = ()
    ) -> optax.GradientTransformation:
        """Returns the chain for `num_steps` updates of a model with these `layers`."""
        direction = optax.identity()
        if self.momentum:
            direction = optax.trace(
                decay=self.momentum,
                nesterov=self.nesterov,
                accumulator_dtype=jnp.dtype(self.momentum_dtype.value),
            )
        return chain(self, direction, num_steps, layers)


@dataclasses.dataclass(kw_only=True)
class Adafactor:
    """Adafactor in big_vision's form for large ViTs (arXiv:2106.04560).

    The second moment of parameters with two dimensions of at least
    `min_factored_size` is kept as a row and a column; its decay 1 - t^-0.8 stops at
    `beta2_cap`. Updates are not clipped by block; momentum is a plain average without
    bias correction, in bfloat16: 2 bytes of state per parameter, Adam has 8.
    """

    schedule: Schedule
    momentum: float = 0.9
    beta2_cap: float = 0.999
    min_factored_size: int = 32
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    rules: tuple[Rule, ...] = ()
    layer_decay: float | None = None
    momentum_dtype: MomentumDtype = MomentumDtype.BFLOAT16

    def __post_init__(self) -> None:
        check_chain(self)
        check_fraction("momentum", self.momentum)
        check_fraction("beta2_cap", self.beta2_cap)

    def build(
        self, num_steps: int, layers: Sequence[str] = ()
    ) -> optax.GradientTransformation:
        """Returns the chain for `num_steps` updates of a model with these `layers`."""

        def beta2(step: Any, power: Any) -> Any:
            t = jnp.asarray(step, jnp.float32) + 1.0
            return jnp.minimum(self.beta2_cap, 1.0 - t**-power)

        direction = optax.chain(
            optax.scale_by_factored_rms(
                min_dim_size_to_factor=self.min_factored_size, decay_rate_fn=beta2
            ),
            optax.ema(
                self.momentum,
                debias=False,
                accumulator_dtype=jnp.dtype(self.momentum_dtype.value),
            ),
        )
        return chain(self, direction, num_steps, layers)


@runtime_checkable
class ChainConfig(Protocol):
    """The fields that optimizers built on `chain` share."""

    schedule: Schedule
    weight_decay: float
    clip_norm: float | None
    rules: tuple[Rule, ...]
    layer_decay: float | None


@dataclasses.dataclass
class Multiplier:
    """The factors of one parameter's learning rate and decay."""

    learning_rate: float
    weight_decay: float


def chain(
    config: ChainConfig,
    direction: optax.GradientTransformation,
    num_steps: int,
    layers: Sequence[str],
    decay: optax.Schedule | None = None,
) -> optax.GradientTransformation:
    """Returns clipping, `direction`, multipliers, decay and schedule as one chain.

    `decay` is the weight decay at each step, None for that of `config`.
    """
    learning_rate, peak = config.schedule.build(num_steps), config.schedule.peak
    clip = optax.identity()
    if config.clip_norm is not None:
        clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        direction,
        optax.scale(peak),
        _multiply_and_decay(config, layers, decay),
        # After the decay, so that it follows the schedule's shape but not its peak.
        optax.scale_by_schedule(lambda step: learning_rate(step) / peak),
        optax.scale(-1.0),
    )


def half_cosine(start: float, end: float, num_steps: int) -> optax.Schedule:
    """Returns the schedule from `start` at step 0 to `end` at step `num_steps`."""

    def value(step: Any) -> Any:
        part = jnp.minimum(step / num_steps, 1)
        return end + (start - end) * (1 + jnp.cos(jnp.pi * part)) / 2

    return value


def _multiply_and_decay(
    config: ChainConfig, layers: Sequence[str], decay_at: optax.Schedule | None
) -> optax.GradientTransformation:
    """Multiplies updates and adds decay, both by the names of the parameters."""

    def init(params: Any) -> Any:
        # So that a wrong rule fails before the first step.
        multipliers_of(config, layers, params)
        if decay_at is None:
            return optax.EmptyState()
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        assert params is not None, "optimizer.update needs the parameters"
        by_name = multipliers_of(config, layers, params)
        weight_decay: Any = config.weight_decay
        if decay_at is not None:
            weight_decay = decay_at(state.count)
            state = optax.ScaleByScheduleState(count=state.count + 1)

        def one(multiplier: Multiplier, update: Any, param: Any) -> Any:
            if multiplier.learning_rate == 0:
                return jnp.zeros_like(update)
            update = update * multiplier.learning_rate
            if decay_at is None and not config.weight_decay:
                return update
            share = multiplier.weight_decay
            return update + weight_decay * share * param if share else update

        multipliers = trees.map_named(lambda name, _: by_name[name], params)
        return jax.tree.map(one, multipliers, updates, params), state

    return optax.GradientTransformation(init, update)


def multipliers_of(
    config: ChainConfig, layers: Sequence[str], params: Params
) -> dict[str, Multiplier]:
    """Returns each parameter's multipliers, by the first rule that matches its name.

    Raises:
        ValueError: a rule matches no name, or `layer_decay` finds no blocks.
    """
    names = trees.names(params)
    rules = trees.match(
        [(rule.pattern, rule) for rule in config.rules], names, what="optimizer.rules"
    )
    scales = dict.fromkeys(names, 1.0)
    if config.layer_decay is not None:
        above = trees.layers_above(names, layers)
        scales = {name: config.layer_decay ** above[name] for name in names}
    multipliers = {}
    for name in names:
        rule = rules[name] or Rule(pattern=name)
        decay = rule.weight_decay_multiplier
        if decay is None:
            decay = float(name.endswith("kernel"))
        # The layer's scale applies to the decay too, as in torch, where the group's
        # learning rate multiplies it: MAE's 0.65 leaves the lowest layers 0.4 % of that
        # rate, and unscaled decay would shrink them to nothing.
        multipliers[name] = Multiplier(
            learning_rate=rule.learning_rate_multiplier * scales[name],
            weight_decay=decay * scales[name],
        )
    return multipliers


def check_chain(config: ChainConfig) -> None:
    """Raises ValueError if a field that optimizers share makes no sense."""
    if not 0 <= config.weight_decay < float("inf"):
        raise ValueError(
            f"optimizer.weight_decay={config.weight_decay} must be 0.0 or more. It is "
            "not multiplied by the learning rate: torch's value times the peak is ours."
        )
    if config.clip_norm is not None and not config.clip_norm > 0:
        raise ValueError(
            f"optimizer.clip_norm={config.clip_norm} must be above 0; "
            "--config.optimizer.clip_norm=none switches clipping off."
        )
    if config.layer_decay is not None and not 0 < config.layer_decay <= 1:
        raise ValueError(
            f"optimizer.layer_decay={config.layer_decay} must be above 0 and at most "
            "1, for example 0.75; none switches it off."
        )


def check_fraction(field: str, value: float) -> None:
    """Raises ValueError unless `value` is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(
            f"optimizer.{field}={value} must be at least 0.0 and below 1.0, for "
            "example 0.9."
        )
