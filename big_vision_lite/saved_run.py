"""A run as its folder holds it: configuration, manifest, and the state to evaluate."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from big_vision_lite import (
    imported,
    layout,
    run_folder,
    sharding,
    step_folder,
    trees,
)
from big_vision_lite import state as state_lib
from big_vision_lite.config import TrainConfig
from big_vision_lite.conversion import foreign, weights
from big_vision_lite.state import TrainState

OPTIMIZER = "opt_state/"


@dataclasses.dataclass(kw_only=True)
class SavedRun:
    """One step of a run, loaded: everything of the state but the optimiser's.

    `folder` is the step folder, or where weights of another library lie, `class_names`
    are those of the training source, `mesh` spans this machine's devices; call what was
    built with it under `jax.set_mesh(mesh)`.
    """

    folder: epath.Path
    config: TrainConfig
    manifest: Mapping[str, Any]
    mesh: jax.sharding.Mesh
    state: TrainState

    @property
    def step(self) -> int:
        """The number of updates behind the state."""
        return int(self.manifest["step"])

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.manifest["class_names"])

    def place_for_results(self) -> epath.Path:
        """Returns the run's folder, or what holds copied step folders or weights.

        For weights that were downloaded it is the current folder.
        """
        if os.fspath(self.folder).startswith(weights.HUB):
            return epath.Path(".")
        above = self.folder.parent
        if above.name == step_folder.FOLDER:
            return above.parent
        return above

    def untrained(self, spec: Mapping[str, Any]) -> TrainState:
        """Returns the run's state before step 1, on batches of shapes `spec`.

        With the shapes of the training batches it is the same, bit for bit.
        """
        config = self.config
        initialize = state_lib.make_initializer(
            config.model,
            dict(spec),
            config.optimizer.build(self.manifest["num_steps"]),
            freeze=config.freeze,
            ema=config.ema is not None,
        )
        abstract = state_lib.blueprint(initialize, config.sharding, self.mesh)
        return state_lib.create(initialize, abstract, config.seed)


def locate(
    path: str | epath.Path, log: Callable[[str], None] = print
) -> str | epath.Path:
    """Returns the step folder that a run's path means, or the path of weights as it is.

    Raises:
        FileNotFoundError: there is neither; says what was looked at.
    """
    return path if weights.is_foreign(os.fspath(path)) else step_folder.find(path, log)


def load(
    path: str | epath.Path,
    *,
    allowed_modules: Sequence[str] = (),
    devices: Sequence[Any] | None = None,
    log: Callable[[str], None] = print,
) -> SavedRun:
    """Loads the newest step of a run or checkpoints folder, a step folder, or weights.

    Weights are files and folders of other libraries and `hub:organisation/name`. On
    `devices`, by default all: in the run's own mesh where that fits, else with the
    parameters whole on each of them.

    Raises:
        FileNotFoundError: there is no complete checkpoint; says what was looked at.
        DamagedCheckpoint: a file or a leaf is not what was saved.
        ValueError: config.json needs a class that may not be imported.
    """
    devices = jax.devices() if devices is None else devices
    if weights.is_foreign(os.fspath(path)):
        return _from_weights(os.fspath(path), devices, log)
    folder = step_folder.find(path, log)
    manifest = step_folder.verified_manifest(folder)
    config = run_folder.read_config(folder, allowed_modules)
    mesh = sharding.make_mesh(fitting(config.mesh, len(devices), log), devices)
    shapes = trees.unflatten(
        {
            name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
            for name, leaf in manifest["leaves"].items()
            if not name.startswith(OPTIMIZER)
        }
    )
    parameters = state_lib.merge(shapes["params"], shapes.get("frozen", {}))
    places = sharding.shardings(shapes, config.sharding, mesh, parameters=parameters)
    wanted = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place
        ),
        shapes,
        places,
    )
    tree = step_folder.restore_part(folder, trees.flatten(wanted), manifest)
    return SavedRun(
        folder=folder,
        config=config,
        manifest=manifest,
        mesh=mesh,
        state=_state(tree),
    )


def _from_weights(
    path: str, devices: Sequence[Any], log: Callable[[str], None]
) -> SavedRun:
    """Returns weights of another library as a run that has made no step."""
    found = foreign.load(path)
    for note in (f"{path}: {found.format}", *found.notes):
        log(note)
    mesh = sharding.make_mesh(sharding.Mesh(), devices)
    whole = layout.replicated(mesh)
    variables = {n: jax.device_put(x, whole) for n, x in found.variables.items()}
    params, collections = state_lib.split_variables(variables)
    step = jax.device_put(np.zeros((), np.int32), whole)
    tree = {"step": step, "params": params, "collections": collections}
    return SavedRun(
        folder=epath.Path(path),
        config=imported.recipe(found),
        manifest={
            "step": 0,
            "num_steps": 1,
            "class_names": list(found.class_names),
            "origin": found.origin,
        },
        mesh=mesh,
        state=_state(tree),
    )


def _state(tree: Mapping[str, Any]) -> TrainState:
    # flax.struct makes the constructor, which type checkers do not see.
    make: Any = TrainState
    return make(
        step=tree["step"],
        params=tree["params"],
        frozen=tree.get("frozen", {}),
        collections=tree.get("collections", {}),
        opt_state=(),
        ema=tree.get("ema"),
    )


def fitting(
    mesh: sharding.Mesh, num_devices: int, log: Callable[[str], None]
) -> sharding.Mesh:
    """Returns `mesh` if it fits; else one with all on "data", and says so."""
    if mesh.shape(num_devices) is not None:
        return mesh
    log(
        f"The run's mesh (data={mesh.data}, fsdp={mesh.fsdp}, tensor={mesh.tensor}) "
        f"does not fit {num_devices} devices: data={num_devices}, fsdp=1 instead."
    )
    return sharding.Mesh()
