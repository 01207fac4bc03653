"""Binds a model to parameters, random keys and mode, for objectives to call."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend import core

from big_vision_lite.messages import did_you_mean, some
from big_vision_lite.models.blocks.batch_norm import BatchNorm
from big_vision_lite.types import Array, Model


class MissingOutput(ValueError):
    """Raised when an objective or evaluator asks for what the model does not give."""


class Outputs(dict[str, Any]):
    """The outputs of a model by name; one that is missing is said by name."""

    def __missing__(self, name: str) -> Any:
        hint = did_you_mean(name, self)
        if name == "logits" and not hint:
            hint = (
                " It has no head: give it one, such as head=Classifier(num_classes=10);"
                " FewShot evaluates a model without."
            )
        raise MissingOutput(f'the model gives {some(sorted(self))}, no "{name}".{hint}')


def _flatten(outputs: Outputs) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    names = tuple(sorted(outputs))
    return [(jax.tree_util.DictKey(n), outputs[n]) for n in names], names


jax.tree_util.register_pytree_with_keys(
    Outputs, _flatten, lambda names, leaves: Outputs(zip(names, leaves, strict=True))
)


class BoundModel:
    """The model that an objective calls as `forward(**inputs)`; see types.Forward.

    Each call folds its ordinal into the random key, so two views get different dropout
    masks, and passes the collections it changed to the next call. Without `train`,
    there is no dropout and collections do not change; `rng` serves the model's own
    draws, such as masks. `progress` is the fraction of the run that is done. Modules in
    `frozen_modules` are always in evaluation mode.
    """

    def __init__(
        self,
        model: Model,
        params: Any,
        collections: Any,
        *,
        rng: Array | None = None,
        train: bool = False,
        progress: Array | None = None,
        ema: Any = None,
        ema_statistics: Any = None,
        frozen_modules: frozenset[str] = frozenset(),
    ):
        self.collections = collections
        self._model = model
        self._params = params
        self._ema = ema
        self._ema_statistics = ema_statistics or {}
        self._rng = rng
        self._train = train
        self._progress = progress
        self._frozen_modules = frozen_modules
        self._calls = 0
        self._trace = core.get_opaque_trace_state(convention="flax")

    @property
    def progress(self) -> Array:
        """Returns the fraction of the run done, float32: 0 at step 1, 1 after the last.

        Raises:
            ValueError: the length of the run is unknown.
        """
        if self._progress is None:
            raise ValueError(
                "forward.progress is not known here: give num_steps to "
                "make_train_step or make_eval_step."
            )
        return self._progress

    def __call__(
        self,
        *,
        method: str | None = None,
        capture: tuple[str, ...] = (),
        params: str = "online",
        statistics: str = "running",
        **inputs: Any,
    ) -> dict[str, Any]:
        """Runs the model (or its `method`) on `inputs`.

        `capture` names modules ("encoder/block_03") whose outputs come back under
        "captured". `params="ema"` uses the averaged parameters without gradient, in
        evaluation mode, and changes no collection; in training its batch norms can take
        the mean and variance of the batch: `statistics="batch"`.

        Raises:
            ValueError: called inside scan, vmap, grad or checkpoint; `params="ema"`
                without an average; unknown `statistics`, or "batch" without "ema".
            MissingOutput: a name in `capture` is no module.
        """
        if self._trace != core.get_opaque_trace_state(convention="flax"):
            raise ValueError(
                "forward() was called inside jax.lax.scan, vmap, grad or checkpoint, "
                "where its random keys and collections would be wrong; call it outside "
                "and transform what comes after."
            )
        variables = {"params": self._choose(params), **self.collections}
        if params == "ema":
            variables |= self._ema_statistics
        train = self._train and params == "online"
        of_batch = self._of_batch(statistics, params)
        rngs = random_keys(self._model, self._rng, self._calls)
        self._calls += 1
        mutable = list(self.collections) if train or of_batch else []
        mode = self._normalise_by_batch if of_batch else self._evaluate_frozen
        with nn.intercept_methods(mode):
            outputs, changed = self._model.apply(
                variables,
                **inputs,
                train=train,
                method=method,
                rngs=rngs,
                mutable=[*mutable, "intermediates"] if capture else mutable,
                capture_intermediates=_captures(capture) if capture else False,
            )
        changed = dict(changed)
        if capture:
            captured = _captured(changed.pop("intermediates", {}), capture)
            outputs = {**outputs, "captured": captured}
        if not of_batch:
            self.collections = {**self.collections, **changed}
        return Outputs(outputs) if isinstance(outputs, Mapping) else outputs

    def _choose(self, params: str) -> Any:
        if params == "online":
            return self._params
        if params == "ema" and self._ema is not None:
            return jax.lax.stop_gradient(self._ema)
        raise ValueError(
            f'forward(params="{params}"): allowed are "online" and, when the recipe '
            'sets ema=Average(start=...), "ema".'
        )

    def _of_batch(self, statistics: str, params: str) -> bool:
        allowed = ("running", "batch") if params == "ema" else ("running",)
        if statistics not in allowed:
            raise ValueError(
                f'forward(params="{params}", statistics="{statistics}"): allowed are '
                '"running" and, with params="ema", "batch".'
            )
        return statistics == "batch" and self._train

    def _evaluate_frozen(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if "/".join(context.module.path) not in self._frozen_modules:
            return call(*args, **kwargs)
        # `train` may come by position: rematerialised blocks cannot take it by name.
        names = list(inspect.signature(context.orig_method).parameters)
        args = [
            False if name == "train" else value
            for name, value in zip(names, args, strict=False)
        ] + list(args[len(names) :])
        if "train" in kwargs:
            kwargs = {**kwargs, "train": False}
        if isinstance(context.module, nn.BatchNorm):
            # Its parent may train; a module lives for one call, so this is local.
            object.__setattr__(context.module, "use_running_average", True)
        return call(*args, **kwargs)

    def _normalise_by_batch(
        self, call: Any, args: Any, kwargs: Any, context: Any
    ) -> Any:
        """Sets batch norms that are not frozen to training mode.

        The caller throws away what they write into the running averages.
        """
        module = context.module
        frozen = "/".join(module.path) in self._frozen_modules
        if frozen or context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, BatchNorm):
            return call(args[0], True)
        if isinstance(module, nn.BatchNorm):
            # Linen takes it from the field or from the call, not from both.
            object.__setattr__(module, "use_running_average", None)
            return call(args[0], use_running_average=False)
        return call(*args, **kwargs)


def random_keys(model: Model, rng: Array | None, call: int) -> dict[str, Array]:
    """Returns the random keys by name for one call of the model, {} without `rng`."""
    if rng is None:
        return {}
    key = jax.random.fold_in(rng, call)
    return {
        name: jax.random.fold_in(key, index)
        for index, name in enumerate(model.random_keys)
    }


def progress_of(step: Array, num_steps: int | None) -> Array | None:
    """Returns the fraction of `num_steps` updates that is done, None if unknown."""
    return None if num_steps is None else step.astype(jnp.float32) / num_steps


def _captures(names: tuple[str, ...]) -> Callable[[nn.Module, str], bool]:
    return lambda module, method: (
        method == "__call__" and "/".join(module.path) in names
    )


def _captured(intermediates: Any, names: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for name in names:
        node = intermediates
        for part in name.split("/"):
            node = node.get(part, {})
        if "__call__" not in node:
            raise MissingOutput(
                f'capture="{name}" is no module of the model. Modules are named like '
                '"encoder/block_03".'
            )
        found[name] = node["__call__"][0]
    return found
