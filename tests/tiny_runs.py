"""The smallest real runs that the tests of the core share."""

import dataclasses
import functools
import os
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies

from big_vision_lite import trees
from big_vision_lite.conversion import export
from big_vision_lite.conversion.formats import Library
from big_vision_lite.conversion.preprocessing import Preprocessing
from big_vision_lite.data.ops import Decode, Resize
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.models.vit import ViT
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.runtime import layout, sharding
from big_vision_lite.runtime.sharding import (
    TENSOR_PARALLEL_VIT,
    Layout,
    Mesh,
    ShardingRule,
)
from big_vision_lite.schedules import Average, Constant
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.gradient_point import (
    SAM,
    GradientPoint,
    ScheduleFreeAdamW,
)
from big_vision_lite.training.layerwise import LAMB, LARS, Muon
from big_vision_lite.training.optimizers import SGD, Lion
from big_vision_lite.training.step import make_train_step
from big_vision_lite.types import Logits, Model, Objective, Optimizer, layers_of

FSDP = (ShardingRule(pattern=".*"),)
RULES = {
    "fsdp": FSDP,
    "optimizer": (ShardingRule(pattern=".*", layout=Layout.OPTIMIZER),),
    "tensor": TENSOR_PARALLEL_VIT,
}


class Block(nn.Module, kw_only=True):
    dropout: float

    @nn.compact
    def __call__(self, x, train):
        y = jnp.tanh(nn.Dense(x.shape[-1], name="dense")(x))
        y = nn.Dropout(self.dropout, name="dropout")(y, deterministic=not train)
        return layout.pin_batch(x + y)


class Net(nn.Module, Model, kw_only=True):
    """A stack of residual dense blocks: compiles in a tenth of a ViT's time."""

    width: int = 16
    depth: int = 2
    dropout: float = 0.0
    batch_norm: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, image, *, train=False):
        x = image.astype(jnp.float32).reshape(image.shape[0], -1) / 255
        x = nn.Dense(self.width, name="stem")(x)
        if self.batch_norm:
            x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        for index in range(self.depth):
            # By position, as rematerialised blocks must.
            x = block(dropout=self.dropout, name=f"block_{index:02d}")(x, train)
        return {"pooled": x, "logits": nn.Dense(10, name="head")(x)}


def tpus(name: str, num_slices: int = 1) -> list[Any]:
    """Returns described TPUs, or skips where their compiler is not installed."""
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options = {"num_slices": num_slices} if num_slices > 1 else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    return found.devices


def tiny_vit(**overrides: Any) -> ViT:
    fields = dict(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=4)
    return ViT(**{**fields, "head": Classifier(num_classes=10), **overrides})


def written_weights(
    model: Any, library: Library, folder: pathlib.Path, classes: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Writes `model`, fresh, for images of 32x32x3 px; returns its variables."""
    image = jnp.zeros((1, 32, 32, 3), jnp.uint8)
    fresh = jax.jit(model.init)(jax.random.key(0), image)
    variables = trees.flatten(jax.tree.map(np.asarray, fresh["params"]))
    road = Preprocessing(
        ops=(Decode(), Resize(size_px=32)),
        mean=model.mean,
        std=model.std,
        image_size_px=(32, 32),
    )
    exported = export.export(
        *(model, variables, road, 3, classes, Logits.SOFTMAX, library, str(folder))
    )
    export.write(exported, folder)
    return variables


def keep_gradient() -> optax.GradientTransformation:
    """Plain gradient descent whose state is the gradient itself, bit for bit."""
    return optax.chain(optax.trace(decay=0.0), optax.scale(-0.1))


def gradients(state: Any) -> dict[str, np.ndarray]:
    found = trees.flatten(jax.device_get(state.opt_state))
    return {n.split("trace/", 1)[1]: x for n, x in found.items() if "trace/" in n}


def rows(size: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (size, 8, 8, 1)).astype(np.uint8)
    return {"image": images, "label": np.arange(size, dtype=np.int32) % 10}


@dataclasses.dataclass
class Run:
    """A step and its state on some devices, without pipeline, folder or loop."""

    mesh: jax.sharding.Mesh
    init: Any
    abstract: Any
    step: Any
    state: Any

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return sharding.put(batch, self.mesh)

    def advance(self, *batches: dict[str, np.ndarray]) -> list[dict[str, float]]:
        """Steps through the batches; returns the metrics of each."""
        found = []
        with jax.set_mesh(self.mesh):
            for batch in batches:
                self.state, metrics = self.step(self.state, self.put(batch))
                found.append(jax.device_get(metrics))
        return found


OPTIMIZERS = {"gradient": keep_gradient, "adam": lambda: optax.adam(0.1)}
RATE = Constant(peak=0.05)
# Net's blocks have no numbers that its class would name.
MATRICES = (".*(dense|attention|mlp).*/kernel",)
OF_PACKAGE: dict[str, Optimizer] = {
    "lion": Lion(schedule=Constant(peak=0.01)),
    "lars": LARS(schedule=Constant(peak=10.0), weight_decay=0.1),
    "lamb": LAMB(schedule=RATE),
    "muon": Muon(schedule=RATE, matrices=MATRICES),
    "sam": SAM(base=SGD(schedule=RATE), radius=0.2),
    "schedule_free": ScheduleFreeAdamW(schedule=RATE),
}


class Called(Objective):
    """A function (forward, batch, rng) as an objective."""

    def __init__(self, function: Any):
        self.function = function

    def __call__(self, forward, batch, rng):
        return self.function(forward, batch, rng)


def start(
    model: Any = None,
    *,
    devices: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    rules: str = "fsdp",
    optimizer: str = "gradient",
    objective: Any = None,
    freeze: tuple[str, ...] = (),
    seed: int = 0,
    **step: Any,
) -> Run:
    """Returns a run with a state of its own; equal arguments share a compiled step."""
    if step.get("micro_batches") == 1:
        del step["micro_batches"]  # the default
    options = tuple(sorted(step.items()))
    places = (devices, fsdp, tensor, rules)
    parts = _parts(model or Net(), places, optimizer, objective, freeze, seed, options)
    return Run(*parts, filled(parts[2]))


@functools.cache
def _parts(
    model: Any,
    places: tuple[Any, ...],
    optimizer: str,
    objective: Any,
    freeze: tuple[str, ...],
    seed: int,
    options: tuple[tuple[str, Any], ...],
) -> tuple[Any, ...]:
    devices, fsdp, tensor, rules = places
    shape = Mesh(data=-1, fsdp=fsdp, tensor=tensor)
    mesh = sharding.make_mesh(shape, jax.devices()[:devices])
    step = dict(options)
    if optimizer in OPTIMIZERS:
        transformation, point = OPTIMIZERS[optimizer](), GradientPoint()
    else:
        config = OF_PACKAGE[optimizer]
        transformation = config.build(step.get("num_steps", 20), layers_of(model))
        point = GradientPoint.of(config, None)
    if "ema" in step:
        ema = step.pop("ema")
        start, end = ema if isinstance(ema, tuple) else (ema, None)
        point = dataclasses.replace(point, average=Average(start=start, end=end))
    if objective is not None and not isinstance(objective, Objective):
        objective = Called(objective)
    with jax.set_mesh(mesh):
        init = state_lib.make_initializer(
            model,
            rows(),
            transformation,
            freeze=freeze,
            ema=point.average is not None,
        )
        abstract = state_lib.blueprint(init, RULES[rules], mesh)
    train_step = make_train_step(
        model,
        objective or SoftmaxClassification(),
        transformation,
        mesh,
        abstract,
        seed=seed,
        point=point,
        **step,
    )
    return mesh, init, abstract, train_step


def filled(abstract: Any) -> Any:
    """A state as if training had begun: no initialiser is compiled, no head is zero."""

    def noise(tree: Any) -> Any:
        def of(name: str, leaf: Any) -> np.ndarray:
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            return rng.normal(0, 0.3, leaf.shape).astype(np.float32)

        return trees.map_named(of, tree)

    values = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    params = noise(abstract.params)
    values = values.replace(
        params=params,
        frozen=noise(abstract.frozen),
        ema=None if abstract.ema is None else params,
    )
    # Copies: two leaves of one host array would share its memory on the CPU.
    return jax.tree.map(
        lambda value, leaf: jax.device_put(jnp.array(value), leaf.sharding),
        values,
        abstract,
    )


def assert_same_step(found: dict, expected: dict) -> None:
    for name, gradient in expected["gradients"].items():
        scale = np.abs(gradient).max()
        if name.endswith("key/bias"):
            # Softmax does not see what all its logits share: zero but for rounding.
            assert scale < 1e-7 and np.abs(found["gradients"][name]).max() < 1e-7
            continue
        assert scale > 1e-5, f"{name} has no gradient, so nothing is compared"
        error = np.abs(found["gradients"][name] - gradient).max() / scale
        assert error < 1e-5, (name, error)
    losses = [m["loss"] for m in found["metrics"]]
    wanted = [m["loss"] for m in expected["metrics"]]
    np.testing.assert_allclose(losses[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(losses, wanted, atol=1e-4)
    assert wanted[0] != wanted[1]
    for now, then in zip(found["metrics"], expected["metrics"], strict=True):
        np.testing.assert_allclose(now["gradient_norm"], then["gradient_norm"], 1e-4)


COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def collectives(text: str) -> list[tuple[str, list[list[int]]]]:
    """Lists (kind, dimensions of every result) of the collectives in a program."""
    found = []
    for line in text.splitlines():
        kind = re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line)
        if kind:
            shapes = re.findall(r"\w+\[([\d,]*)\]", kind.group(1))
            sizes = [[int(n) for n in shape.split(",") if n] for shape in shapes]
            found.append((kind.group(2), sizes))
    return found


def computation(text: str, name: str) -> str:
    """Returns a computation's text and that of all it calls."""
    own = re.search(rf"^%?{re.escape(name)} .*?^}}", text, re.M | re.S).group(0)
    called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", own)
    return own + "".join(computation(text, other) for other in set(called))
