"""Each optimizer against plain SGD: a small ViT on handwritten digits, equal steps."""

import functools

import jax
import numpy as np
import tiny_runs
from tiny_runs import start, tiny_vit

from big_vision_lite.data.ops import Decode
from big_vision_lite.data.sources import Digits
from big_vision_lite.schedules import Constant, WarmupCosine
from big_vision_lite.training import state as state_lib
from big_vision_lite.training.gradient_point import SAM, ScheduleFreeAdamW
from big_vision_lite.training.layerwise import LAMB, LARS, Muon
from big_vision_lite.training.optimizers import SGD, AdamW, Lion
from big_vision_lite.training.step import make_eval_step

NUM_STEPS, BATCH = 150, 64


def cosine(peak):
    return WarmupCosine(peak=peak, warmup_steps=15)


def plain(peak):
    return SGD(schedule=cosine(peak), momentum=0.0)


# Optimizer by learning rate, and the rates among which the best was looked for.
KINDS = {
    "sgd": (plain, (0.1, 0.3, 1.0, 3.0)),
    "momentum": (lambda r: SGD(schedule=cosine(r)), (0.03, 0.1, 0.3, 1.0)),
    "adamw": (lambda r: AdamW(schedule=cosine(r)), (1e-3, 3e-3, 1e-2, 3e-2)),
    "lion": (lambda r: Lion(schedule=cosine(r)), (3e-4, 1e-3, 3e-3, 1e-2)),
    "lars": (lambda r: LARS(schedule=cosine(r)), (1.0, 3.0, 10.0, 30.0)),
    "lamb": (lambda r: LAMB(schedule=cosine(r)), (3e-3, 1e-2, 3e-2, 0.1)),
    "muon": (lambda r: Muon(schedule=cosine(r)), (3e-3, 1e-2, 3e-2, 0.1)),
    "sam": (lambda r: SAM(base=plain(r)), (0.1, 0.3, 1.0, 3.0)),
    "sam, adamw": (
        lambda r: SAM(base=AdamW(schedule=cosine(r))),
        (1e-3, 3e-3, 1e-2, 3e-2),
    ),
    "schedule_free": (
        lambda r: ScheduleFreeAdamW(schedule=Constant(peak=r, warmup_steps=15)),
        (3e-3, 1e-2, 3e-2, 0.1),
    ),
}


@functools.cache
def digits(split):
    source, decode, rng = Digits(split=split), Decode(channels=1), None
    examples = [decode(source[i], rng) for i in range(len(source))]
    return {key: np.stack([e[key] for e in examples]) for key in ("image", "label")}


def accuracy(kind, rate, split="test", seed=0):
    optimizer = KINDS[kind][0](rate)
    name = f"{kind} {rate}"
    tiny_runs.OF_PACKAGE[name] = optimizer
    run = start(VIT, optimizer=name, num_steps=NUM_STEPS)
    with jax.set_mesh(run.mesh):
        run.state = state_lib.create(run.init, run.abstract, seed)
    train, rng = digits("train"), np.random.default_rng(seed)
    images = train["image"][:TRAIN], train["label"][:TRAIN]
    for _ in range(NUM_STEPS):
        chosen = rng.choice(TRAIN, BATCH, replace=False)
        image, label = (x[chosen] for x in images)
        run.advance({"image": image, "label": label.astype(np.int32)})
    held = {"test": digits("test"), "held": {k: x[TRAIN:] for k, x in train.items()}}
    judge = make_eval_step(VIT, lambda f, b, _: f(image=b["image"])["logits"])
    logits = judge(run.state, {"image": held[split]["image"]})
    return float((np.argmax(logits, axis=-1) == held[split]["label"]).mean())


VIT, TRAIN = tiny_vit(width=32, depth=2, mlp_dim=64, num_heads=2, patch_size=2), 1000
