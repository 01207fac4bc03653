"""What went wrong in a step whose loss or gradient is not finite."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from big_vision_lite import state as state_lib
from big_vision_lite import trees
from big_vision_lite.state import TrainState
from big_vision_lite.types import Batch, Model


def explain(
    step: int,
    state: TrainState,
    batch: Batch,
    model: Model,
    history: Sequence[Mapping[str, float]],
    learning_rate: float,
    saved: epath.Path,
) -> str:
    """Says where the first NaN or infinity of `step` came from and what to try.

    `history` holds the metrics of the steps up to this one, oldest first.
    """
    bad = _first_bad(state, batch, model)
    norms = [m["gradient_norm"] for m in history]
    finite = [n for n in norms if np.isfinite(n)]
    rise = ""
    if finite:
        rise = (
            f" Gradient norm {finite[0]:.3g} -> {norms[-1]:.3g} in {len(norms)} steps;"
        )
    return (
        f"Loss not finite at step {step}. First bad tensor: {bad}.{rise} learning rate "
        f"{learning_rate:.2e}. Saved: {saved}. Nothing of this step is in the "
        "parameters. Try: --config.optimizer.clip_norm=1.0, a lower peak or a longer "
        "warm-up (--config.optimizer.schedule...), or --config.model.dtype=float32."
    )


def save_crash(folder: epath.Path, state: TrainState) -> None:
    """Writes the state before the bad step, for looking at."""
    ocp.save(folder, state, overwrite=True)


def _first_bad(state: TrainState, batch: Batch, model: Model) -> str:
    images = batch["image"]
    if jnp.issubdtype(images.dtype, jnp.floating) and not _finite(images):
        return "the images themselves"
    params = state_lib.merge(state.params, state.frozen)
    for name, leaf in trees.flatten(params).items():
        if not _finite(leaf):
            return f"parameter {name}"

    @jax.jit
    def forward(params: Any, collections: Any, batch: Batch) -> Any:
        _, changed = model.apply(
            {"params": params, **collections},
            **model.inputs(batch),
            train=False,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        summary = jax.tree.map(
            lambda x: (jnp.isfinite(x).all(), jnp.abs(x).max().astype(jnp.float32)),
            changed["intermediates"],
        )
        # One number a module, in the order in which the modules ran.
        return summary

    found = trees.flatten(forward(params, state.collections, batch))
    outputs = [name[:-2] for name in found if name.endswith("/0")]
    bad = [name for name in outputs if not bool(found[f"{name}/0"])]
    if bad:
        # Inner modules end before outer ones; the deepest name is the closest cause.
        first = max(bad, key=lambda name: name.count("/"))
        largest = {n: float(found[f"{n}/1"]) for n in outputs if n not in bad}
        top = max(largest, key=lambda n: largest[n], default=None)
        seen = f" (largest finite: {top}, max {largest[top]:.2g})" if top else ""
        return f"the output of {_module(first)}{seen}"
    return (
        "none in a forward pass without dropout and augmentation, so it arose in the "
        "loss, the gradient or the augmented images"
    )


def _module(name: str) -> str:
    return name.split("/__call__")[0] or "the model"


def _finite(x: Any) -> bool:
    return bool(jnp.isfinite(x).all())
