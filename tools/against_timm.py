"""Train steps of a model here and of the same model in timm, in turn.

Started by `benchmark.py --against timm`; each side is a process of its own that waits
while the other computes, so that neither's threads, memory or libraries disturb the
other. Both make the same step on the same made-up batch: scale the pixels, forward,
cross-entropy, backward, AdamW; float32.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

# What torchvision's description, not timm's, says of these.
NAMES = {
    "ResNet:R18": "resnet18",
    "ResNet:R34": "resnet34",
    "ResNet:R50": "resnet50",
    "ResNet:R101": "resnet101",
    "ResNet:R152": "resnet152",
    "ResNet:X50_32x4d": "resnext50_32x4d",
    "ResNet:W50_2": "wide_resnet50_2",
}
CLASSES = 1000
WARM_UP_STEPS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What both sides measure."""

    spec: str
    batch_size: int
    image_size: int


@dataclasses.dataclass(kw_only=True)
class Compared:
    """CPU-seconds and seconds of a step, one value a round."""

    parameters: dict[str, int]
    cpu: dict[str, list[float]]
    wall: dict[str, list[float]]

    def ratios(self, times: dict[str, list[float]]) -> list[float]:
        """Returns ours / theirs, round by round."""
        return [a / b for a, b in zip(times["ours"], times["timm"], strict=True)]


class Side:
    """One of the two processes: made ready, then asked for steps."""

    def __init__(self, name: str, setting: Setting):
        # Spinning threads would count as work, of torch's side only.
        environment = dict(os.environ, OMP_WAIT_POLICY="passive")
        fields = json.dumps(dataclasses.asdict(setting))
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__, name, fields],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self._name = name
        self.parameters: int = self._answer()["parameters"]

    def run(self, steps: int) -> dict[str, float]:
        """Returns the CPU-seconds and seconds of one of so many steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:]
            raise ValueError(f"{self._name}: {' '.join(last) or 'it ended'}")
        return json.loads(line)


def compare(setting: Setting, steps: int, rounds: int) -> Compared:
    """Measures both sides in alternating order, `rounds` times `steps` steps.

    Raises:
        ValueError: a side does not know the model, or timm is not installed.
    """
    sides = {name: Side(name, setting) for name in ("ours", "timm")}
    found = Compared(
        parameters={name: side.parameters for name, side in sides.items()},
        cpu={name: [] for name in sides},
        wall={name: [] for name in sides},
    )
    try:
        for number in range(rounds):
            order = list(sides.items())
            for name, side in order if number % 2 == 0 else reversed(order):
                times = side.run(steps)
                found.cpu[name].append(times["cpu"])
                found.wall[name].append(times["wall"])
    finally:
        for side in sides.values():
            side.close()
    return found


def ours(setting: Setting) -> Iterator[Any]:
    """Yields the number of parameters, then nothing after each step."""
    import benchmark
    import jax

    from big_vision_lite.runtime import cpu

    cpu.set_up()
    bare = benchmark.build_bare(
        setting.spec,
        "float32",
        setting.batch_size,
        setting.image_size,
        clip_norm=None,
    )
    yield bare.parameters
    while True:
        bare.state, _ = bare.step(bare.state, bare.batch)
        jax.block_until_ready(bare.state)
        yield


def theirs(setting: Setting) -> Iterator[Any]:
    """As `ours`, of timm's model, channels last where there are convolutions."""
    import numpy as np
    import torch
    import torch_libraries

    torch_libraries.import_torchvision()
    size = setting.image_size
    model = timm_model(setting.spec, size).train()
    layout = torch.contiguous_format
    if not setting.spec.startswith(("ViT:", "MlpMixer:")):
        layout = torch.channels_last
    model = model.to(memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    rng = np.random.default_rng(0)
    shape = (setting.batch_size, size, size, 3)
    # Decoded images are channels last in memory, in any case.
    image = torch.from_numpy(rng.integers(0, 256, shape, np.uint8)).permute(0, 3, 1, 2)
    label = torch.from_numpy(rng.integers(0, CLASSES, setting.batch_size))
    yield sum(parameter.numel() for parameter in model.parameters())
    while True:
        scaled = (image.float() - 127.5) / 127.5
        logits = model(scaled.contiguous(memory_format=layout))
        torch.nn.functional.cross_entropy(logits, label).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def timm_model(spec: str, image_size: int) -> Any:
    """Builds the model in timm, as our export describes it.

    Raises:
        ValueError: it has no counterpart there; says which field.
    """
    import model_spec
    import timm

    from big_vision_lite.conversion import export
    from big_vision_lite.conversion.formats import Library

    if spec in NAMES:
        return timm.create_model(NAMES[spec], num_classes=CLASSES)
    model = model_spec.build(spec, num_classes=CLASSES)
    size = (image_size, image_size)
    form = export.find(model, Library.TIMM, size, channels=3)
    described = form.describe(model, size, channels=3)
    return timm.create_model(described["architecture"], **described["model_args"])


def serve(name: str, setting: Setting) -> None:
    """Prints a line of JSON when ready, and one for every number of steps it reads."""
    # Libraries print where they like; the answers go where nothing else does.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    steps = (ours if name == "ours" else theirs)(setting)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    parameters = next(steps)
    for _ in range(WARM_UP_STEPS):
        next(steps)
    answer(parameters=parameters)
    for line in sys.stdin:
        count = int(line)
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(steps)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        answer(cpu=cpu / count, wall=wall / count)


def main(argv: Sequence[str]) -> None:
    name, fields = argv
    serve(name, Setting(**json.loads(fields)))


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    try:
        main(sys.argv[1:])
    except (ValueError, ImportError) as mistake:
        sys.exit(str(mistake))
