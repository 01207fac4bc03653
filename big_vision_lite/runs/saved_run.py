"""Holds a checkpoint loaded for evaluation or prediction."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from big_vision_lite.config import TrainConfig
from big_vision_lite.conversion import files as weights
from big_vision_lite.runs import step_folder
from big_vision_lite.runtime import sharding
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.gradient_point import average_of
from big_vision_lite.training.state import TrainState
from big_vision_lite.types import layers_of


@dataclasses.dataclass(kw_only=True)
class SavedRun:
    """One loaded step of a run: the state without the optimizer state.

    `folder` is the step folder, or the path of foreign weights; `class_names` are those
    of the training source. `mesh` spans the devices of the state; call functions built
    for it under `jax.set_mesh(mesh)`.
    """

    folder: epath.Path
    config: TrainConfig
    manifest: Mapping[str, Any]
    mesh: jax.sharding.Mesh
    state: TrainState

    @property
    def step(self) -> int:
        """Returns the number of finished updates."""
        return int(self.manifest["step"])

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.manifest["class_names"])

    def place_for_results(self) -> epath.Path:
        """Returns the run's folder, or the parent of a copied step folder or weights.

        For downloaded weights, returns the current folder.
        """
        if os.fspath(self.folder).startswith(weights.HUB):
            return epath.Path(".")
        above = self.folder.parent
        if above.name == step_folder.FOLDER:
            return above.parent
        return above

    def untrained(self) -> TrainState:
        """Returns the run's randomly initialised state, the same bit for bit."""
        spec = {
            name: jax.ShapeDtypeStruct((1, *leaf["shape"]), leaf["dtype"])
            for name, leaf in self.manifest["input"].items()
        }
        config = self.config
        initialize = state_lib.make_initializer(
            config.model,
            spec,
            config.optimizer.build(self.manifest["num_steps"], layers_of(config.model)),
            freeze=config.freeze,
            ema=average_of(config.optimizer, config.ema) is not None,
        )
        abstract = state_lib.blueprint(initialize, config.sharding, self.mesh)
        return state_lib.create(initialize, abstract, config.seed)


def state_of(tree: Mapping[str, Any]) -> TrainState:
    """Returns the train state of a step's tree, without the optimizer state."""
    # flax.struct makes the constructor, which type checkers do not see.
    make: Any = TrainState
    return make(
        step=tree["step"],
        params=tree["params"],
        frozen=tree.get("frozen", {}),
        collections=tree.get("collections", {}),
        opt_state=(),
        ema=tree.get("ema"),
        ema_statistics=tree.get("ema_statistics"),
        recalibrated=tree.get("recalibrated"),
    )


def fitting(
    mesh: sharding.Mesh, num_devices: int, log: Callable[[str], None]
) -> sharding.Mesh:
    """Returns `mesh` if it fits, else one with all devices on "data", logging that."""
    if mesh.shape(num_devices) is not None:
        return mesh
    log(
        f"The run's mesh (data={mesh.data}, fsdp={mesh.fsdp}, tensor={mesh.tensor}) "
        f"does not fit {num_devices} devices: data={num_devices}, fsdp=1 instead."
    )
    return sharding.Mesh()
