"""A small run on images made here: squares, discs and crosses, a colour a class."""

import atexit
import functools
import pathlib
import shutil
import tempfile

import cv2
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from etils import epath

from big_vision_lite import train
from big_vision_lite.config import Checkpoints, TrainConfig
from big_vision_lite.data.ops import Decode, FlipLeftRight, Resize
from big_vision_lite.data.pipeline import Stream
from big_vision_lite.data.sources import ImageFolder
from big_vision_lite.evaluators.classification import Classification
from big_vision_lite.evaluators.fewshot import FewShot, FewShotSet
from big_vision_lite.models.blocks.heads import Classifier
from big_vision_lite.objectives.classification import SoftmaxClassification
from big_vision_lite.runs import load
from big_vision_lite.schedules import WarmupCosine
from big_vision_lite.training.optimizers import AdamW
from big_vision_lite.types import Model

# What --allow_module needs to be told.
MODULE = "shapes_run"
CLASSES = ("cross", "disc", "square")
COLOURS = {"cross": (220, 60, 60), "disc": (60, 200, 80), "square": (70, 80, 230)}
SUFFIXES = (".jpg", ".png", ".JPEG", ".webp", ".bmp")
SIZE = 16


def draw(shape: str, rng: np.random.Generator, side: int = 24) -> np.ndarray:
    """Returns one image, uint8 RGB, with noise of position, size and pixels."""
    image = rng.integers(0, 60, (side, side, 3)).astype(np.uint8)
    x, y = (int(v) for v in rng.integers(side // 3, 2 * side // 3, 2))
    r = int(rng.integers(side // 5, side // 3))
    colour = COLOURS[shape]
    if shape == "disc":
        cv2.circle(image, (x, y), r, colour, -1)
    elif shape == "square":
        cv2.rectangle(image, (x - r, y - r), (x + r, y + r), colour, -1)
    else:
        cv2.line(image, (x - r, y), (x + r, y), colour, 3)
        cv2.line(image, (x, y - r), (x, y + r), colour, 3)
    return image


def make_folder(
    root: pathlib.Path,
    counts: dict[str, int],
    *,
    classes=CLASSES,
    seed: int = 0,
    side: int = 24,
) -> pathlib.Path:
    """Writes `root`/split/class/*.{jpg,png,...}, `counts` images a class and split."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                suffix = SUFFIXES[index % len(SUFFIXES)]
                bgr = draw(name, rng, side)[..., ::-1]
                encoded, data = cv2.imencode(suffix.lower(), bgr)
                assert encoded
                (folder / f"{index:03d}{suffix}").write_bytes(data.tobytes())
    return root


class Net(nn.Module, Model, kw_only=True):
    """Two dense layers: compiles in a tenth of the time of a small ViT."""

    width: int = 16
    dropout: float = 0.0
    head: Classifier | None = None

    @nn.compact
    def __call__(self, image, *, train=False):
        x = image.reshape(len(image), -1).astype(jnp.float32) / 127.5 - 1
        x = jnp.tanh(nn.Dense(self.width, name="encoder")(x))
        pooled = nn.Dropout(self.dropout, name="dropout")(x, deterministic=not train)
        outputs = {"pooled": pooled}
        return outputs | ({} if self.head is None else self.head(pooled))


def small_model(num_classes: int | None = 3) -> Net:
    return Net(
        head=None if num_classes is None else Classifier(num_classes=num_classes)
    )


def load_run(path: pathlib.Path, **more):
    """Loads a run whose model comes from this file."""
    return load.load(str(path), allowed_modules=[MODULE], **more)


def recipe(folder: pathlib.Path, **changes) -> TrainConfig:
    """Ten steps on `folder`, evaluated every five, few-shot and on its split val."""
    train, val = (
        ImageFolder(path=str(folder), split=split) for split in ("train", "val")
    )
    config = dict(
        num_steps=10,
        model=small_model(),
        objective=SoftmaxClassification(),
        data=Stream(
            source=train,
            ops=(Decode(), Resize(size_px=SIZE), FlipLeftRight()),
            batch_size=16,
            threads=2,
        ),
        preprocess=(Decode(), Resize(size_px=SIZE)),
        optimizer=AdamW(schedule=WarmupCosine(peak=1e-2, warmup_steps=2)),
        evaluators={
            "val": Classification(source=val, batch_size=16, every_steps=5),
            "fewshot": FewShot(
                sets=(FewShotSet(name="shapes", train=train, test=val),),
                shots=(1, 5),
                seeds=(0, 1),
                batch_size=16,
                every_steps=5,
            ),
        },
        checkpoints=Checkpoints(every_steps=5, keep_latest=2),
        log_every_steps=5,
    )
    return TrainConfig(**config | changes)


@functools.cache
def shared() -> tuple[pathlib.Path, pathlib.Path]:
    """Returns a folder of images and a run on it; for reading only."""
    root = pathlib.Path(tempfile.mkdtemp(prefix="bvl_ä shapes_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    images = make_folder(root / "shapes", {"train": 24, "val": 9})
    return images, run(root / "run", recipe(images))


def run(workdir: pathlib.Path, config: TrainConfig, **more) -> pathlib.Path:
    """Trains a recipe and returns its folder."""
    train.train(config, epath.Path(workdir), quiet=True, **more)
    return workdir
