"""LARS, LAMB and Muon: optimizers that scale the update of each layer as a whole.

A kernel that starts at zero, as heads do, has a norm of zero, of which LARS and LAMB
take a share: leave it out by Rule(pattern="head/.*", weight_decay_multiplier=0.0). So
a ViT of two blocks comes to 74.1 % of 8 px digits in 150 steps of LAMB, with the head
to 35.9 %; to 68.9 % with LARS, 82.4 % with Muon, 74.1 % with AdamW and 68.6 % with
plain SGD (three seeds, sd 2 to 6: tests/training/test_optimizers_learn.py).
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vision_lite import trees
from big_vision_lite.training.optimizers import (
    ChainConfig,
    MomentumDtype,
    Rule,
    chain,
    check_chain,
    check_fraction,
    multipliers_of,
)
from big_vision_lite.types import Schedule


@dataclasses.dataclass(kw_only=True)
class LARS:
    """SGD whose step in each layer is a share of the layer's norm (arXiv:1708.03888).

    With g the gradient, u = g + weight_decay * p becomes trust_coefficient * |p| / |u|
    * u, and momentum adds that up; the learning rate multiplies the sum, as in SGD (the
    paper has it inside). `weight_decay` is the factor of an L2 penalty, not the share
    of AdamW. Parameters without decay, by default all but kernels, move as SGD's. For
    batches of thousands: a peak of 0.3 * batch / 256 (SimCLR, arXiv:2002.05709, B.6).
    """

    schedule: Schedule
    momentum: float = 0.9
    trust_coefficient: float = 0.001
    weight_decay: float = 1e-6
    clip_norm: float | None = None
    rules: tuple[Rule, ...] = ()
    layer_decay: float | None = None
    momentum_dtype: MomentumDtype = MomentumDtype.FLOAT32

    def __post_init__(self) -> None:
        check_chain(self)
        check_fraction("momentum", self.momentum)
        if not self.trust_coefficient > 0:
            raise ValueError(
                f"optimizer.trust_coefficient={self.trust_coefficient} must be above "
                "0.0, for example 0.001."
            )

    def build(
        self, num_steps: int, layers: Sequence[str] = ()
    ) -> optax.GradientTransformation:
        """Returns the chain for `num_steps` updates of a model with these `layers`."""
        direction = optax.chain(
            _penalise(self),
            _adapt(self, self.trust_coefficient),
            optax.trace(
                decay=self.momentum,
                accumulator_dtype=jnp.dtype(self.momentum_dtype.value),
            ),
        )
        plain = dataclasses.replace(self, weight_decay=0.0)
        return chain(plain, direction, num_steps, layers)


@dataclasses.dataclass(kw_only=True)
class LAMB:
    """Adam whose step in each layer is a share of the layer's norm (arXiv:1904.00962).

    With d Adam's direction, u = d + weight_decay * p becomes |p| / |u| * u. So
    `weight_decay` is torch's, not the share of AdamW here. Parameters without decay, by
    default all but kernels, move as Adam's. For batches of thousands.
    """

    schedule: Schedule
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float = 0.01
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
        direction = optax.chain(
            optax.scale_by_adam(
                b1=self.beta1,
                b2=self.beta2,
                eps=self.epsilon,
                mu_dtype=jnp.dtype(self.momentum_dtype.value),
            ),
            _penalise(self),
            _adapt(self, 1.0),
        )
        plain = dataclasses.replace(self, weight_decay=0.0)
        return chain(plain, direction, num_steps, layers)


@dataclasses.dataclass(kw_only=True)
class Muon:
    """Momentum made orthogonal, for the matrices of the blocks; AdamW for the rest.

    Five Newton-Schulz rounds bring the singular values of Nesterov momentum near 1
    (kellerjordan.github.io/posts/muon, 2024). Times `update_rms` * sqrt(larger side)
    the update is about as large as Adam's, so that AdamW's learning rate and decay
    serve for all parameters (arXiv:2502.16982, section 2.2).

    Matrices are the kernels inside the numbered blocks of the backbone (the model's
    `layers`) or, if given, all parameters whose whole name matches one of `matrices`. A
    kernel is one matrix from all its inputs to all its outputs: of queries, keys and
    values [D, H, Dh] from D to H Dh, of attention's output [H, Dh, D] from H Dh to D,
    of a convolution [h, w, C, D] from h w C to D (C of one group, if there are
    several). The rest, embeddings, heads, biases, norms, also decoders and projectors
    beside the backbone, gets Adam with `beta1`, `beta2` and `epsilon`.
    """

    schedule: Schedule
    momentum: float = 0.95
    update_rms: float = 0.2
    matrices: tuple[str, ...] = ()
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: float | None = 1.0
    rules: tuple[Rule, ...] = ()
    layer_decay: float | None = None
    momentum_dtype: MomentumDtype = MomentumDtype.FLOAT32

    def __post_init__(self) -> None:
        check_chain(self)
        check_fraction("momentum", self.momentum)
        check_fraction("beta1", self.beta1)
        check_fraction("beta2", self.beta2)
        if not self.update_rms > 0:
            raise ValueError(
                f"optimizer.update_rms={self.update_rms} must be above 0.0; Adam's "
                "updates have about 0.2."
            )

    def build(
        self, num_steps: int, layers: Sequence[str] = ()
    ) -> optax.GradientTransformation:
        """Returns the chain for `num_steps` updates of a model with these `layers`."""
        dtype = jnp.dtype(self.momentum_dtype.value)

        def kinds(params: Any) -> Any:
            found = self._matrices(params, layers)
            return trees.map_named(
                lambda name, _: "matrix" if name in found else "rest", params
            )

        orthogonal = optax.contrib.scale_by_muon(
            beta=self.momentum,
            mu_dtype=dtype,
            weight_dimension_numbers=lambda updates: trees.map_named(_axes, updates),
        )
        scaled = optax.stateless(
            lambda updates, _: trees.map_named(self._to_rms, updates)
        )
        adam = optax.scale_by_adam(
            b1=self.beta1, b2=self.beta2, eps=self.epsilon, mu_dtype=dtype
        )
        direction = optax.partition(
            {"matrix": optax.chain(orthogonal, scaled), "rest": adam}, kinds
        )
        return chain(self, direction, num_steps, layers)

    def _matrices(self, params: Any, layers: Sequence[str]) -> set[str]:
        leaves = trees.flatten(params)
        if self.matrices:
            rules = [(pattern, True) for pattern in self.matrices]
            matched = trees.match(rules, leaves, what="optimizer.matrices")
            found = {name for name in leaves if matched[name]}
            flat = [name for name in found if leaves[name].ndim < 2]
            if flat:
                raise ValueError(
                    f"optimizer.matrices match {flat[0]} "
                    f"{trees.describe(leaves[flat[0]])}, which is no matrix; end the "
                    'pattern with "/kernel".'
                )
            return found
        blocks = [re.compile(layer) for layer in layers]
        blocks = [pattern for pattern in blocks if pattern.groups]
        found = {
            name
            for name in leaves
            if name.endswith("/kernel") and any(b.fullmatch(name) for b in blocks)
        }
        if not found:
            raise ValueError(
                "Muon takes the kernels of the model's numbered blocks, and "
                f"layers={tuple(layers)} of its class name none of {', '.join(leaves)}."
                " Name them in the recipe, --config.optimizer.matrices="
                "\"('encoder/.*kernel',)\", or use AdamW."
            )
        return found

    def _to_rms(self, name: str, update: jax.Array) -> jax.Array:
        inputs = _num_inputs(name, update.ndim)
        sides = math.prod(update.shape[:inputs]), math.prod(update.shape[inputs:])
        # An orthogonal matrix has the root mean square 1 / sqrt(larger side).
        return update * (self.update_rms * math.sqrt(max(sides)))


def _num_inputs(name: str, ndim: int) -> int:
    """Returns how many of a kernel's first dimensions are inputs."""
    heads = re.fullmatch(r"(?:.*/)?(?:query|key|value)/kernel", name)
    return 1 if heads else ndim - 1


def _axes(name: str, update: jax.Array) -> optax.contrib.MuonDimensionNumbers:
    inputs = _num_inputs(name, update.ndim)
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=tuple(range(inputs)),
        output_axis=tuple(range(inputs, update.ndim)),
    )


def _penalised(config: ChainConfig, params: Any) -> dict[str, float]:
    """Returns the decay multiplier of each parameter, without that of its layer."""
    # The chain scales the whole direction by layer; here it would cancel.
    fields: Any = config
    found = multipliers_of(dataclasses.replace(fields, layer_decay=None), (), params)
    return {name: multiplier.weight_decay for name, multiplier in found.items()}


def _penalise(config: ChainConfig) -> optax.GradientTransformation:
    """Adds weight_decay * p to the updates of parameters that decay."""

    def update(updates: Any, params: Any) -> Any:
        factors = _penalised(config, params)

        def one(name: str, update: Any, param: Any) -> Any:
            factor = config.weight_decay * factors[name]
            return update + factor * param if factor else update

        named = trees.map_named(lambda name, _: name, params)
        return jax.tree.map(one, named, updates, params)

    return optax.stateless(update)


def _adapt(config: ChainConfig, coefficient: float) -> optax.GradientTransformation:
    """Scales the updates of parameters that decay to a share of the parameter's norm.

    A norm of 0 leaves the update as it is.
    """

    def decays(params: Any) -> Any:
        factors = _penalised(config, params)
        return trees.map_named(lambda name, _: factors[name] > 0, params)

    ratio = optax.scale_by_trust_ratio(trust_coefficient=coefficient)
    return optax.masked(ratio, decays)
