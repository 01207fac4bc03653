"""Measures a recipe, or bare train steps on made-up images; one table.

  python tools/benchmark.py --config configs/quickstart.py [--config.data.batch_size=64]
  python tools/benchmark.py --synthetic --model ViT:S/16 --model ViT:S/16,remat=dots

A recipe runs as `big_vision_lite.train` runs it, without its evaluators. Windows of
`--steps` steps of the whole loop alternate with as many bare calls of the same compiled
step on a batch that is on the device already, so that both meet the same neighbours on
the machine; a save follows every window. Compiling, and starting from nothing (a
process of its own, with an empty and with a filled compile cache), come `--starts`
times. Every figure is a median, with its range.

`--synthetic` measures bare steps only: AdamW, 1,000 classes, uint8 images on the
device, models as NAME:SIZE with fields after commas (attention=cudnn, pooling=...),
several of them in alternating rounds. It needs jax, flax, optax and ml_collections;
where jaxtyping is missing, its annotations are left out.

  python tools/benchmark.py --against timm --model ViT:S/16 --model ResNet:R50

`--against timm` measures the same steps of the same models there too, in alternating
rounds (see tools/against_timm.py); CPU-seconds are what to compare on a shared machine.

Model FLOPs are the matrix products and convolutions of the step by formula, without
what rematerialisation repeats; MFU compares them with the devices' data sheet.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import os
import pathlib
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import model_spec

from big_vision_lite.runtime import cpu
from big_vision_lite.runtime.cpu import SteadyStep

# Steps of a window before its clock starts: batches made ahead during the bare steps
# would count as free.
UNTIMED = 4
# Steps a started process makes before it is stopped; its memory has grown by then.
FIRST_STEPS = 20
CLASSES = 1000
MEGA, GIGA = 1e6, 1e9


@dataclasses.dataclass(kw_only=True)
class Row:
    """One line of the table: all its values, in the unit that is shown."""

    name: str
    unit: str
    values: list[float]

    def text(self) -> str:
        if not self.values:
            return "not known here"
        middle = number(statistics.median(self.values))
        if len(self.values) == 1:
            return f"{middle} {self.unit}".rstrip()
        spread = f"({number(min(self.values))} - {number(max(self.values))})"
        return f"{middle} {self.unit} {spread}".replace("  ", " ")


def number(value: float) -> str:
    """Writes counts whole and everything else with four digits."""
    whole = float(value).is_integer() and abs(value) >= 1000
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def show(title: str, rows: Sequence[Row]) -> None:
    width = max(len(row.name) for row in rows)
    print(f"\n{title}\n" + "-" * len(title))
    for row in rows:
        print(f"{row.name:{width}}  {row.text()}")


def machine() -> dict[str, str]:
    """Describes what the figures belong to."""
    device = jax.devices()[0]
    cpus = [
        line.split(":", 1)[1].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "cpu": f"{cpus[0] if cpus else platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}",
        "jax": f"{jax.__version__}, Python {platform.python_version()}",
    }


def step_rows(
    compiled: Any, step_flops: int, milliseconds: Sequence[float], batch_size: int
) -> list[Row]:
    """Returns what a compiled step and its times tell."""
    from big_vision_lite.runtime import targets

    devices = jax.device_count()
    # XLA counts the program of one device.
    xla_flops = compiled.cost_analysis()["flops"] * devices
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak = targets.peak_flops(jax.devices()[0].device_kind)
    seconds = [value / 1e3 for value in milliseconds]
    utilisation = [step_flops / s / (peak * devices) for s in seconds] if peak else []
    return [
        Row(name="model FLOPs of a step", unit="G", values=[step_flops / GIGA]),
        Row(
            name="XLA FLOPs over model FLOPs", unit="", values=[xla_flops / step_flops]
        ),
        Row(name="XLA's memory of a step", unit="MB", values=[needed / MEGA]),
        Row(name="bare step", unit="ms", values=list(milliseconds)),
        Row(
            name="bare step, images/s",
            unit="",
            values=[batch_size / s for s in seconds],
        ),
        Row(name="bare step, MFU", unit="", values=utilisation),
    ]


def memory_rows() -> list[Row]:
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    # Linux counts in KiB.
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [
        Row(
            name="peak device memory",
            unit="MB",
            values=[] if peak is None else [peak / MEGA],
        ),
        Row(name="peak memory of this process", unit="MB", values=[resident / MEGA]),
    ]


def count_parameters(state: Any) -> int:
    leaves = jax.tree.leaves((state.params, state.frozen))
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def timed_compile(step: SteadyStep, *specs: Any) -> tuple[Any, float, float]:
    """Returns (the compiled step, seconds, CPU-seconds); no cache helps."""
    jax.clear_caches()
    began, cpu = time.perf_counter(), time.process_time()
    compiled = step.compile(*specs)
    return compiled, time.perf_counter() - began, time.process_time() - cpu


# A recipe.


class Windows:
    """A train step that measures the loop around it, and itself alone.

    The state goes through the bare steps too: nothing here learns, it is only timed.
    """

    class Over(Exception):
        """All windows are measured; the loop has nothing more to tell."""

    def __init__(self, step: Any, steps: int, rounds: int):
        self._step = step
        self._steps = steps
        self._rounds = rounds
        self._count = 0
        self._clock = (0.0, 0.0)
        self.loop: list[tuple[float, float]] = []  # (seconds, CPU-seconds) of a step
        self.bare: list[tuple[float, float]] = []

    def __call__(self, state: Any, batch: Any) -> Any:
        if len(self.loop) == self._rounds:
            raise Windows.Over
        self._count += 1
        outputs = self._step(state, batch)
        position = (self._count - 1) % (UNTIMED + self._steps)
        if position == UNTIMED - 1:
            jax.block_until_ready(outputs)
            self._start()
        elif position == UNTIMED + self._steps - 1:
            jax.block_until_ready(outputs)
            self.loop.append(self._stop())
            outputs = self._alone(*outputs, batch)
        return outputs

    def _alone(self, state: Any, metrics: Any, batch: Any) -> Any:
        # Meanwhile the threads fill up their batches ahead, and rest.
        for _ in range(UNTIMED):
            state, metrics = self._step(state, batch)
        jax.block_until_ready(state)
        self._start()
        for _ in range(self._steps):
            state, metrics = self._step(state, batch)
        jax.block_until_ready(state)
        self.bare.append(self._stop())
        return state, metrics

    def _start(self) -> None:
        self._clock = (time.perf_counter(), time.process_time())

    def _stop(self) -> tuple[float, float]:
        wall, cpu = self._clock
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        return seconds[0] / self._steps, seconds[1] / self._steps


def recipe_rows(argv: Sequence[str], steps: int, rounds: int, starts: int) -> list[Row]:
    """Measures the recipe that `argv` names, with its overrides."""
    # Not at the top: --synthetic does without what they import.
    from big_vision_lite import train
    from big_vision_lite.recipes import command_line
    from big_vision_lite.runs import checkpoint
    from big_vision_lite.runtime import flops, startup

    command = command_line.parse(["benchmark", *argv], lambda values: None)
    if command.config is None:
        raise ValueError("Which recipe? Add --config configs/quickstart.py.")
    config = command.config
    # Compiled programs come from no cache but the one that is measured.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
    startup.set_up(config.platform, deterministic=config.deterministic)
    windows_steps = rounds * (UNTIMED + steps) + 1
    measured = dataclasses.replace(
        config,
        # Long enough, and not shorter than what the schedule was made for.
        num_steps=max(windows_steps, config.resolve_steps(len(config.data.source))),
        evaluators={},
        init=(),
        checkpoints=checkpoint.Checkpoints(every_steps=UNTIMED + steps),
        profile_steps=(),
    )
    seen: dict[str, Any] = {}
    build = train.build

    def build_windows(*arguments: Any, **options: Any) -> Any:
        built = seen["program"] = build(*arguments, **options)
        seen["windows"] = Windows(built.train_step, steps, rounds)
        return dataclasses.replace(built, train_step=seen["windows"])

    blocked: list[float] = []
    save = checkpoint.Checkpointer.save

    def timed_save(self: Any, step: int, state: Any) -> None:
        jax.block_until_ready(state)
        began = time.perf_counter()
        save(self, step, state)
        blocked.append(1e3 * (time.perf_counter() - began))
        self.wait()  # the next window has the machine for itself

    train.build = build_windows
    checkpoint.Checkpointer.save = timed_save
    try:
        with tempfile.TemporaryDirectory() as folder:
            workdir = train.epath.Path(folder) / "run"
            train.train(measured, workdir, quiet=True)
    except Windows.Over:
        pass
    finally:
        train.build = build
        checkpoint.Checkpointer.save = save

    built, windows = seen["program"], seen["windows"]
    mesh = built.abstract.step.sharding.mesh
    plain = dataclasses.replace(measured, model=model_spec.without_remat(config.model))
    with jax.set_mesh(mesh):
        compiles = [
            timed_compile(
                SteadyStep(built.train_step, mesh), built.abstract, built.spec
            )
            for _ in range(max(1, starts))
        ]
        once = build(plain, mesh, built.spec).train_step
        step_flops = flops.count(once, built.abstract, built.spec)
    batch_size = config.data.batch_size
    loop, bare = (
        [1e3 * wall for wall, _ in times] for times in (windows.loop, windows.bare)
    )
    started = [seen for _ in range(starts) for seen in start_twice(argv, config)]
    return [
        Row(name="parameters", unit="", values=[count_parameters(built.abstract)]),
        *step_rows(compiles[0][0], step_flops, bare, batch_size),
        Row(name="whole loop", unit="ms", values=loop),
        Row(
            name="whole loop over bare step",
            unit="",
            values=[a / b for a, b in zip(loop, bare, strict=True)],
        ),
        Row(
            name="whole loop, images/s",
            unit="",
            values=[1e3 * batch_size / value for value in loop],
        ),
        Row(
            name="CPU-seconds per 1,000 images, loop",
            unit="s",
            values=[1e3 * cpu / batch_size for _, cpu in windows.loop],
        ),
        Row(
            name="CPU-seconds per 1,000 images, bare step",
            unit="s",
            values=[1e3 * cpu / batch_size for _, cpu in windows.bare],
        ),
        Row(name="blocked per save, first", unit="ms", values=blocked[:1]),
        Row(name="blocked per save, later", unit="ms", values=blocked[1:]),
        Row(name="compile time", unit="s", values=[c[1] for c in compiles]),
        Row(name="compile CPU-seconds", unit="s", values=[c[2] for c in compiles]),
        Row(
            name="start to first step, cold cache",
            unit="s",
            values=[s["first_step"] for s in started if s["cold"]],
        ),
        Row(
            name="start to first step, warm cache",
            unit="s",
            values=[s["first_step"] for s in started if not s["cold"]],
        ),
        Row(
            name="peak memory of a training process",
            unit="MB",
            values=[s["memory"] / MEGA for s in started],
        ),
        memory_rows()[0],
    ]


def start_twice(argv: Sequence[str], config: Any) -> Iterator[dict[str, Any]]:
    """Starts the real program with an empty compile cache, and again with its cache."""
    off = [f"--config.evaluators.{name}.every_steps=0" for name in config.evaluators]
    with tempfile.TemporaryDirectory() as folder:
        for cold in (True, False):
            workdir = pathlib.Path(folder) / f"run_{cold}"
            command = [sys.executable, "-m", "big_vision_lite.train", *argv, *off]
            command += [f"--workdir={workdir}", "--config.log_every_steps=1"]
            yield {"cold": cold, **start(command, cache=f"{folder}/cache")}


def start(command: Sequence[str], cache: str) -> dict[str, float]:
    """Starts a training, stops it after some steps; seconds to the first, and memory.

    It is stopped by a signal, so that its memory holds a save, too.
    """
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=cache)
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=pathlib.Path(__file__).parents[1],
    )
    first_step, lines, stopped = None, [], False
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        found = re.match(r"step +(\d+)/", line)
        if found is None:
            continue
        if first_step is None:
            first_step = time.perf_counter() - began
        if int(found.group(1)) >= FIRST_STEPS and not stopped:
            process.send_signal(signal.SIGTERM)
            stopped = True
    _, status, usage = os.wait4(process.pid, 0)
    # Known now, and no longer to be asked of the system.
    process.returncode = os.waitstatus_to_exitcode(status)
    if first_step is None:
        raise ValueError(f"{' '.join(command)} made no step:\n{''.join(lines)}")
    return {"first_step": first_step, "memory": usage.ru_maxrss * 1024}


# Made-up images.


@dataclasses.dataclass(kw_only=True)
class Bare:
    """A compiled train step with its state and its batch on the device."""

    step: SteadyStep
    compiled: Any
    compile_seconds: tuple[float, float]
    state: Any
    batch: Mapping[str, Any]
    parameters: int
    step_flops: int
    times: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def run(self, steps: int) -> None:
        """Times `steps` steps; the time of one is kept."""
        began, cpu = time.perf_counter(), time.process_time()
        # Of several models only the one that computes keeps memory.
        with contextlib.closing(self.step):
            for _ in range(steps):
                self.state, _ = self.step(self.state, self.batch)
            jax.block_until_ready(self.state)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        self.times.append((wall / steps, cpu / steps))


def build_bare(
    spec: str,
    dtype: str,
    batch_size: int,
    image_size: int,
    clip_norm: float | None = 1.0,
) -> Bare:
    """Compiles the real train step of a model, and makes its state and a batch."""
    from big_vision_lite.objectives.classification import SoftmaxClassification
    from big_vision_lite.runtime import flops, layout, sharding
    from big_vision_lite.schedules import WarmupCosine
    from big_vision_lite.training import state as state_lib
    from big_vision_lite.training.optimizers import AdamW
    from big_vision_lite.training.step import make_train_step

    mesh = sharding.make_mesh(sharding.Mesh())
    layout.check_batch_size(batch_size, mesh)
    rng = np.random.default_rng(0)
    shape = (batch_size, image_size, image_size, 3)
    batch = sharding.put(
        {
            "image": rng.integers(0, 256, shape, np.uint8),
            "label": rng.integers(0, CLASSES, batch_size, np.int32),
        },
        mesh,
    )
    specs = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in batch.items()
    }
    schedule = WarmupCosine(peak=1e-3, warmup_steps=100)
    optimizer = AdamW(schedule=schedule, clip_norm=clip_norm).build(10_000)
    model = model_spec.build(spec, num_classes=CLASSES, dtype=dtype)

    def program(model: Any) -> Any:
        init = state_lib.make_initializer(model, specs, optimizer)
        rules = (sharding.ShardingRule(pattern=".*"),)
        abstract = state_lib.blueprint(init, rules, mesh)
        step = make_train_step(
            model, SoftmaxClassification(), optimizer, mesh, abstract
        )
        return init, abstract, step

    with jax.set_mesh(mesh):
        init, abstract, step = program(model)
        steady = SteadyStep(step, mesh)
        compiled, *compile_seconds = timed_compile(steady, abstract, specs)
        once = program(model_spec.without_remat(model))[2]
        return Bare(
            step=steady,
            compiled=compiled,
            compile_seconds=(compile_seconds[0], compile_seconds[1]),
            state=state_lib.create(init, abstract, 0),
            batch=batch,
            parameters=count_parameters(abstract),
            step_flops=flops.count(once, abstract, specs),
        )


def synthetic_tables(
    models: Sequence[str],
    dtype: str,
    batch_size: int,
    image_size: int,
    steps: int,
    rounds: int,
) -> dict[str, list[Row]]:
    """Measures bare steps of all `models`, one round of each after the other."""
    cpu.set_up()
    built = {spec: build_bare(spec, dtype, batch_size, image_size) for spec in models}
    for bare in built.values():
        bare.run(2)
        bare.times.clear()
    for _ in range(rounds):
        for bare in built.values():
            bare.run(steps)
    tables = {}
    for spec, bare in built.items():
        times = [1e3 * wall for wall, _ in bare.times]
        tables[f"{spec}, {dtype}, {batch_size} x {image_size} px"] = [
            Row(name="parameters", unit="", values=[bare.parameters]),
            *step_rows(bare.compiled, bare.step_flops, times, batch_size),
            Row(
                name="CPU-seconds per 1,000 images",
                unit="s",
                values=[1e3 * cpu / batch_size for _, cpu in bare.times],
            ),
            Row(name="compile time", unit="s", values=[bare.compile_seconds[0]]),
            Row(name="compile CPU-seconds", unit="s", values=[bare.compile_seconds[1]]),
        ]
    tables["all of them"] = memory_rows()
    return tables


def against_tables(
    models: Sequence[str], batch_size: int, image_size: int, steps: int, rounds: int
) -> dict[str, list[Row]]:
    """Measures each model against timm's, one model after the other."""
    import against_timm

    tables = {}
    for spec in models:
        setting = against_timm.Setting(
            spec=spec, batch_size=batch_size, image_size=image_size
        )
        found = against_timm.compare(setting, steps, rounds)
        rows = [
            Row(name=f"parameters, {side}", unit="", values=[count])
            for side, count in found.parameters.items()
        ]
        for what, times in (("CPU-seconds", found.cpu), ("seconds", found.wall)):
            rows += [
                Row(name=f"{what} a step, {side}", unit="s", values=values)
                for side, values in times.items()
            ]
            ratios = found.ratios(times)
            rows += [Row(name=f"{what}, ours over timm's", unit="", values=ratios)]
        tables[f"{spec}, float32, {batch_size} x {image_size} px"] = rows
    return tables


def leave_annotations_out() -> None:
    """Puts an empty stand-in where jaxtyping is not installed: it changes no result."""
    if importlib.util.find_spec("jaxtyping") is not None:
        return

    class Annotation:
        def __class_getitem__(cls, item: Any) -> Any:
            return item[0]

    stand_in: Any = types.ModuleType("jaxtyping")
    stand_in.__getattr__ = lambda name: jax.Array if name == "Array" else Annotation
    sys.modules["jaxtyping"] = stand_in


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--config",
        metavar="FILE[:ARG]",
        help="a recipe; --config.a.b=value changes it as in a training",
    )
    add("--synthetic", action="store_true", help="bare steps on made-up images")
    add("--steps", type=int, default=25, help="steps of a window (%(default)s)")
    add("--rounds", type=int, default=5, help="windows (%(default)s)")
    add(
        "--starts",
        type=int,
        default=3,
        help="compilations, and cold and warm starts (%(default)s)",
    )
    add("--json", metavar="FILE", help="write all values there, too")
    add("--against", choices=("timm",), help="bare steps here and there, in turn")
    only = parser.add_argument_group("--synthetic and --against only")
    only.add_argument(
        "--model",
        action="append",
        metavar="SPEC",
        help="ViT:S/16,field=value,...; several times for several (ViT:S/16)",
    )
    number_of = functools.partial(only.add_argument, type=int)
    number_of("--batch_size", default=8, help="images of a step (%(default)s)")
    number_of("--image_size", default=224, help="their side in px (%(default)s)")
    only.add_argument(
        "--dtype", default="float32", help="float32 (the default) or bfloat16"
    )
    options, rest = parser.parse_known_args(argv)
    if min(options.steps, options.rounds) < 1 or options.starts < 0:
        parser.error("--steps and --rounds start at 1, --starts at 0")
    if options.config is not None:
        rest = [f"--config={options.config}", *rest]
    if options.against:
        if rest or options.dtype != "float32":
            parser.error(f"--against knows no {' '.join(rest) or '--dtype'}")
        tables = against_tables(
            options.model or ["ViT:S/16"],
            options.batch_size,
            options.image_size,
            options.steps,
            options.rounds,
        )
    elif options.synthetic:
        if rest:
            parser.error(f"--synthetic knows no {' '.join(rest)}")
        leave_annotations_out()
        tables = synthetic_tables(
            options.model or ["ViT:S/16"],
            options.dtype,
            options.batch_size,
            options.image_size,
            options.steps,
            options.rounds,
        )
    else:
        rows = recipe_rows(rest, options.steps, options.rounds, options.starts)
        tables = {" ".join(rest): rows}
    described = machine() | {"command": " ".join(["python tools/benchmark.py", *argv])}
    for name, value in described.items():
        print(f"{name}: {value}")
    for title, rows in tables.items():
        show(title, rows)
    if options.json:
        plain = {t: [dataclasses.asdict(r) for r in rows] for t, rows in tables.items()}
        text = json.dumps({"machine": described, "tables": plain}, indent=1)
        pathlib.Path(options.json).write_text(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as mistake:
        sys.exit(f"error: {mistake}")
