"""Opens trained models: a run, a step folder, or weights of another library."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from big_vision_lite import trees
from big_vision_lite.config import TrainConfig
from big_vision_lite.conversion import files as weights
from big_vision_lite.conversion import foreign
from big_vision_lite.conversion.foreign import Foreign
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources.arrays import NoImages
from big_vision_lite.objectives.classification import (
    SigmoidClassification,
    SoftmaxClassification,
)
from big_vision_lite.objectives.numbers import Numbers
from big_vision_lite.recipes import serialize
from big_vision_lite.runs import integrity, step_folder
from big_vision_lite.runs.folder import read_config
from big_vision_lite.runs.saved_run import SavedRun, fitting, state_of
from big_vision_lite.runtime import layout, sharding
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.optimizers import AdamW
from big_vision_lite.types import Logits, Op, backbone_of

OPTIMIZER = "opt_state/"
# What stands for the objective of weights that came without one.
OBJECTIVES = {
    Logits.SOFTMAX: SoftmaxClassification(),
    Logits.SIGMOID: SigmoidClassification(),
    Logits.NONE: Numbers(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """Weights to start from: {name: array}, batch statistics as "batch_stats/...".

    `class_names` is () if unknown, None if irrelevant. `model` is the Linen module of
    the weights, `part` the path of its backbone and `backbone` that module; a module is
    None if its class may not be imported. `origin` goes into manifests. `opened_part`
    is the part of a file of another library that was asked for and taken.
    """

    variables: Mapping[str, Any]
    class_names: tuple[str, ...] | None = ()
    model: Any = None
    part: str = ""
    backbone: Any = None
    origin: Mapping[str, Any] | None = None
    opened_part: str = ""


def locate(
    path: str | os.PathLike[str], log: Callable[[str], None] = print, part: str = ""
) -> "SavedStep | ForeignWeights":
    """Returns the `SavedStep` or `ForeignWeights` at `path`.

    A run folder or its checkpoints folder gives the newest step. `part` is that of a
    file of another library that holds several models ("teacher").

    Raises:
        FileNotFoundError: there is no complete checkpoint; says what is there.
        ValueError: a part is given of a run, which is one model.
    """
    if weights.is_foreign(os.fspath(path)):
        return ForeignWeights(path=os.fspath(path), part=part)
    if part:
        raise ValueError(
            f"part={part} chooses a model in a file of another library, but {path} is "
            "a run of ours, which is one model. Leave it out; to start another run "
            f"from a module of it: --config.init.part={part}"
        )
    return SavedStep(
        folder=step_folder.find(os.fspath(path), log), path=os.fspath(path)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A backbone to fine-tune, and the ops from file bytes to its input."""

    model: Any
    preprocess: tuple[Op, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedStep:
    """A step folder, and the `path` by which the user named it."""

    folder: epath.Path
    path: str

    def platform(self) -> str | None:
        """Returns the platform that the recipe sets, None if unset or unreadable."""
        # A damaged file is reported when the step is loaded and verified.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            document = json.loads((self.folder / step_folder.CONFIG).read_text())
            return document["config"]["platform"]
        return None

    def config(self, allowed_modules: Sequence[str] = ()) -> TrainConfig:
        """Returns the recipe; raises ValueError if a class may not be imported."""
        return read_config(self.folder, allowed_modules)

    def pretrained(self, allowed_modules: Sequence[str] = ()) -> Pretrained:
        """Returns backbone and preprocessing; the rest need not be importable."""
        part = integrity.read_manifest(self.folder)["backbone"]
        document = json.loads((self.folder / step_folder.CONFIG).read_text())
        model = document["config"]["model"]
        for name in part.split("/") if part else ():
            model = model[name]
        ops = document["config"]["preprocess"]
        built = [
            serialize.from_json(
                json.dumps({**document, "config": component}), allowed_modules
            )
            for component in (model, *ops)
        ]
        return Pretrained(model=built[0], preprocess=tuple(built[1:]))

    def weights(
        self, log: Callable[[str], None], allowed_modules: Sequence[str] = ()
    ) -> Loaded:
        """Returns parameters, averaged ones (EMA) if there are any, and statistics."""
        del log  # nothing is assumed of our own files
        variables, manifest = load_variables(self.folder)
        part = manifest["backbone"]
        return Loaded(
            variables=variables,
            class_names=tuple(manifest["class_names"]),
            model=_model_of(self.folder, "", allowed_modules),
            part=part,
            backbone=_model_of(self.folder, part, allowed_modules),
            origin={
                "path": self.path,
                "format": "big_vision_lite",
                "licence": None,
                "origin": manifest.get("origin"),
            },
        )

    def run(
        self,
        allowed_modules: Sequence[str],
        devices: Sequence[Any],
        log: Callable[[str], None],
    ) -> SavedRun:
        """Loads the state, without the optimizer state, on `devices`."""
        manifest = step_folder.verified_manifest(self.folder)
        config = self.config(allowed_modules)
        mesh = sharding.make_mesh(fitting(config.mesh, len(devices), log), devices)
        shapes = trees.unflatten(
            {
                name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
                for name, leaf in manifest["leaves"].items()
                if not name.startswith(OPTIMIZER)
            }
        )
        parameters = state_lib.merge(shapes["params"], shapes.get("frozen", {}))
        places = sharding.shardings(
            shapes, config.sharding, mesh, parameters=parameters
        )
        wanted = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=place
            ),
            shapes,
            places,
        )
        tree = step_folder.restore_part(self.folder, trees.flatten(wanted), manifest)
        return SavedRun(
            folder=self.folder,
            config=config,
            manifest=manifest,
            mesh=mesh,
            state=state_of(tree),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignWeights:
    """Weights of another library: a file, a folder or `hub:organisation/name`.

    `part` is the beginning of the names of one model among several, "" for all.
    """

    path: str
    part: str = ""

    def platform(self) -> None:
        """Returns None: foreign weights record no platform."""
        return None

    def config(self, allowed_modules: Sequence[str] = ()) -> TrainConfig:
        """Returns the model and its preprocessing as a recipe without images."""
        del allowed_modules  # classes of this package alone
        return recipe(self._open())

    def pretrained(self, allowed_modules: Sequence[str] = ()) -> Pretrained:
        """Returns the backbone and its preprocessing."""
        del allowed_modules  # classes of this package alone
        found = self._open()
        _, model = backbone_of(found.model)
        return Pretrained(model=model, preprocess=found.preprocess)

    def weights(
        self, log: Callable[[str], None], allowed_modules: Sequence[str] = ()
    ) -> Loaded:
        """Returns all variables by our names; logs the assumptions made."""
        del allowed_modules  # classes of this package alone
        # A part that the file has not may be a module of the converted model.
        found = foreign.load(self.path, self.part)
        for line in (f"{self.path}: {found.format}", *found.assumptions):
            log(f"init: {line}")
        part, backbone = backbone_of(found.model)
        return Loaded(
            variables=found.variables,
            class_names=found.class_names,
            model=found.model,
            part=part,
            backbone=backbone,
            origin=found.origin,
            opened_part=found.part,
        )

    def run(
        self,
        allowed_modules: Sequence[str],
        devices: Sequence[Any],
        log: Callable[[str], None],
    ) -> SavedRun:
        """Returns the weights as a run at step 0."""
        del allowed_modules  # classes of this package alone
        found = self._open()
        foreign.check_scaling(found)
        for line in (f"{self.path}: {found.format}", *found.assumptions):
            log(str(line))
        mesh = sharding.make_mesh(sharding.Mesh(), devices)
        whole = layout.replicated(mesh)
        variables = {n: jax.device_put(x, whole) for n, x in found.variables.items()}
        params, collections = state_lib.split_variables(variables)
        step = jax.device_put(np.zeros((), np.int32), whole)
        tree = {"step": step, "params": params, "collections": collections}
        return SavedRun(
            folder=epath.Path(self.path),
            config=recipe(found),
            manifest={
                "step": 0,
                "num_steps": 1,
                "class_names": list(found.class_names),
                "origin": found.origin,
                "input": {
                    "image": {
                        "shape": [*found.image_size_px, found.channels],
                        "dtype": "uint8",
                    }
                },
            },
            mesh=mesh,
            state=state_of(tree),
        )

    def _open(self) -> Foreign:
        found = foreign.load(self.path, self.part)
        if self.part and not found.part:
            raise ValueError(
                f'{self.path} has no names that begin with "{self.part}", and holds '
                "one model; leave the part out."
            )
        return found


def load(
    path: "str | os.PathLike[str] | SavedStep | ForeignWeights",
    *,
    allowed_modules: Sequence[str] = (),
    devices: Sequence[Any] | None = None,
    log: Callable[[str], None] = print,
    part: str = "",
) -> SavedRun:
    """Loads the newest step of a run or checkpoints folder, a step folder, or weights.

    Weights are files and folders of other libraries and `hub:organisation/name`, of
    several models in a file the `part`. The state is placed on `devices`, by default
    all: in the run's mesh if that fits, else replicated.

    Raises:
        FileNotFoundError: there is no complete checkpoint; says what is there.
        DamagedCheckpoint: a file or a leaf is not what was saved.
        ValueError: config.json needs a class that may not be imported.
    """
    if isinstance(path, SavedStep | ForeignWeights):
        place = path
    else:
        place = locate(path, log, part)
    devices = jax.devices() if devices is None else devices
    return place.run(allowed_modules, devices, log)


def open_weights(
    path: str,
    log: Callable[[str], None] = print,
    allowed_modules: Sequence[str] = (),
    part: str = "",
) -> Loaded:
    """Reads weights to start from: of a run, a step folder, or another library.

    Of a file of another library with several models the `part` is read, if it has one
    of that name.
    The model is None unless its classes are in this package or `allowed_modules`.

    Raises:
        FileNotFoundError: there is no complete checkpoint; says what is there.
        ValueError: the weights are damaged or in no known format.
    """
    place = locate(path, log)
    if isinstance(place, ForeignWeights):
        place = dataclasses.replace(place, part=part)
    return place.weights(log, allowed_modules)


def recipe(found: Foreign) -> TrainConfig:
    """Returns a configuration with the model and its preprocessing, and no images.

    It serves evaluation, prediction and initialisation, not training.
    """
    return TrainConfig(
        num_steps=1,
        model=found.model,
        objective=OBJECTIVES[found.logits or Logits.SOFTMAX],
        data=Stream(
            source=NoImages(classes=found.class_names, origin=found.path),
            ops=found.preprocess,
            batch_size=1,
        ),
        preprocess=found.preprocess,
        optimizer=AdamW(schedule=WarmupCosine(peak=1e-3, warmup_steps=0)),
    )


def load_variables(folder: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Loads a step folder's parameters and batch statistics, and its manifest.

    Names are those of the model, statistics "batch_stats/...". Averaged parameters
    (EMA) are loaded if the run has them.

    Raises:
        DamagedCheckpoint: a file or a leaf is not what was saved.
    """
    manifest = step_folder.verified_manifest(folder)
    leaves = manifest["leaves"]
    # Statistics belong to their parameters: the first of these that were saved.
    sets = ("recalibrated/", "ema_statistics/", "collections/")
    kept = [f"{x}batch_stats/" for x in sets]
    statistics = [x for x in kept if any(name.startswith(x) for name in leaves)]
    averaged = any(name.startswith("ema/") for name in leaves)
    parts = ("ema/" if averaged else "params/", "frozen/", *statistics[:1])
    # Under a mesh of several devices jit refuses an array that is on only one of them.
    mesh = jax.sharding.get_mesh()
    device = (
        jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if mesh.empty
        else layout.replicated(mesh)
    )
    named = {
        name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"], sharding=device)
        for name, leaf in leaves.items()
        if name.startswith(parts)
    }
    loaded = trees.flatten(step_folder.restore_part(folder, named, manifest))
    return {n.split("/", 1)[1]: np.asarray(x) for n, x in loaded.items()}, manifest


def _model_of(folder: Any, part: str, allowed_modules: Sequence[str]) -> Any:
    document = json.loads((folder / step_folder.CONFIG).read_text())
    model = document["config"]["model"]
    for name in part.split("/") if part else ():
        model = model[name]
    text = json.dumps({**document, "config": model})
    try:
        return serialize.from_json(text, allowed_modules)
    except ValueError:
        # A class of the user or of a newer version: only names are compared then.
        return None
