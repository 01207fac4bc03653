"""A real context around a tiny model: real batches, steps and meshes, no training."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import AxisType

from big_vision_lite.data.sources.arrays import InMemory
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runtime import layout
from big_vision_lite.training.state import TrainState
from big_vision_lite.types import Model


class Pixels(nn.Module, Model):
    """Pooled features and logits are the pixels times a learned gain: known answers."""

    has_head: bool = True

    @nn.compact
    def __call__(self, image, train=False):
        gain = self.param("gain", nn.initializers.ones, ())
        flat = image.reshape(len(image), -1).astype(jnp.float32) * gain
        outputs = {"pooled": flat}
        return outputs | {"logits": flat / 32} if self.has_head else outputs


class Network(nn.Module, Model):
    """Two layers with random weights: what an untrained network would give."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, image, train=False):
        x = image.reshape(len(image), -1).astype(jnp.float32) / 127.5 - 1
        pooled = nn.relu(nn.Dense(48, name="hidden")(x))
        logits = nn.Dense(self.num_classes, name="head")(pooled)
        return {"pooled": pooled, "logits": logits}


@dataclasses.dataclass
class Damaged:
    """A set in which some files are no images."""

    source: InMemory
    bad: tuple[int, ...]

    @property
    def class_names(self):
        return self.source.class_names

    @property
    def fingerprint(self):
        return f"{self.source.fingerprint} but {self.bad}"

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        example = self.source[index]
        return example | {"image": b"no image"} if index in self.bad else example

    def name(self, index):
        return f"image {index}"


def make_mesh(devices: int):
    return jax.make_mesh(
        (devices, 1),
        layout.BATCH_AXES,
        (AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )


def make_state(model, mesh, image_shape, *, seed=0, step=4, ema=None):
    image = jnp.zeros((mesh.size, *image_shape), jnp.uint8)
    params = jax.jit(model.init)(jax.random.key(seed), image)["params"]
    state = TrainState(
        step=jnp.int32(step),
        params=params,
        frozen={},
        collections={},
        opt_state=(),
        ema=ema,
    )
    return jax.device_put(state, layout.replicated(mesh))


def make_context(
    workdir,
    mesh,
    model,
    class_names=(),
    *,
    objective=None,
    image_shape=(8, 8, 1),
    messages=None,
    untrained=None,
    ops=(),
):
    return Context(
        name="val",
        model=model,
        mesh=mesh,
        preprocess=ops,
        class_names=tuple(class_names),
        workdir=epath.Path(workdir),
        seed=0,
        objective=objective or SoftmaxClassification(),
        num_steps=4,
        threads=2,
        abstract_state=make_state(model, mesh, image_shape),
        untrained_state=untrained
        or functools.partial(make_state, model, mesh, image_shape, step=0),
        log=(messages if messages is not None else []).append,
    )


def score_images(scores):
    """Images [N, 1, 1, C] whose logits under `Pixels` are scores / 32."""
    return np.asarray(scores, np.uint8)[:, None, None, :]
