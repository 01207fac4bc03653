"""Describes machines to compile for, present or absent, and their chips' peak rates.

The TPU compiler (libtpu) and NVIDIA's (two CUDA wheels) compile for devices that are
only described. `parse("v5e:2x4")` returns such a machine, `Target.describe()` its
devices.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any

import jax

from big_vision_lite.messages import did_you_mean
from big_vision_lite.runtime import plugins

# The name of this machine as a target.
HERE = "here"
INSTALL = "pip install -e '.[plan]'"
GIB = 2**30
# The fraction of a GPU's memory that JAX takes by default, and its setting.
GPU_FRACTION, GPU_FRACTION_SETTING = 0.75, "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """The data-sheet rates of one JAX device, which no program fully reaches.

    `kind` is a prefix of its `device_kind`; `flops` are dense bfloat16 FLOP/s, `memory`
    the bytes that a program may use, `bandwidth` bytes/s to and from memory, `link`
    bytes/s sent to other devices, `clock` cycles/s.
    """

    kind: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    clock: float
    generation: str = ""
    # A described v4 is two cores with half of everything, a real one is one device.
    described_as: int = 1


def _tpu(
    generation: str,
    kind: str,
    tflops: float,
    gigabytes: float,
    gibibytes: float,
    link: float,
    gigahertz: float,
    described_as: int = 1,
) -> Chip:
    return Chip(
        generation=generation,
        kind=kind,
        flops=tflops * 1e12,
        bandwidth=gigabytes * 1e9,
        memory=gibibytes * GIB,
        link=link * 1e9,
        clock=gigahertz * 1e9,
        described_as=described_as,
    )


def _gpu(
    generation: str,
    kind: str,
    tflops: float,
    gigabytes: float,
    memory: float,
    link: float,
    gigahertz: float,
) -> Chip:
    return Chip(
        generation=generation,
        kind=kind,
        flops=tflops * 1e12,
        bandwidth=gigabytes * 1e9,
        memory=memory * 1e9,
        link=link * 1e9,
        clock=gigahertz * 1e9,
    )


# From the data sheets of cloud.google.com/tpu/docs and NVIDIA. A device of v2, v3 and
# TPU7x is a core, half a chip. A TPU's memory is the free memory that libtpu 0.0.42
# reports; its clock follows from the peak of its matrix units. The first `kind` that is
# a prefix of a device's kind counts.
TPUS = (
    _tpu("v6e", "TPU v6", 918.0, 1640.0, 31.25, 400.0, 1.75),
    _tpu("v5e", "TPU v5 lite", 197.0, 819.0, 15.75, 200.0, 1.5),
    _tpu("v5e", "TPU v5e", 197.0, 819.0, 15.75, 200.0, 1.5),
    _tpu("v5p", "TPU v5", 459.0, 2765.0, 95.74, 600.0, 1.75),
    _tpu("v4", "TPU v4", 275.0, 1228.0, 30.5, 300.0, 1.05, described_as=2),
    _tpu("v3", "TPU v3", 61.5, 450.0, 15.48, 70.0, 0.94),
    _tpu("v2", "TPU v2", 22.5, 350.0, 7.48, 50.0, 0.7),
    _tpu("tpu7x", "TPU7x", 1153.5, 3690.0, 94.75, 300.0, 2.2),
)
GPUS = (
    _gpu("", "NVIDIA H200 NVL", 835.5, 4800.0, 151.4, 450.0, 1.785),
    _gpu("h200", "NVIDIA H200", 989.4, 4800.0, 151.4, 450.0, 1.98),
    _gpu("", "NVIDIA GH200", 989.4, 4000.0, 102.0, 450.0, 1.98),
    _gpu("", "NVIDIA H100 NVL", 835.5, 3900.0, 100.0, 300.0, 1.785),
    _gpu("", "NVIDIA H100 PCIe", 756.0, 2000.0, 85.0, 64.0, 1.755),
    _gpu("h100", "NVIDIA H100", 989.4, 3352.0, 84.9, 450.0, 1.98),
    _gpu("b200", "NVIDIA B200", 2250.0, 7672.0, 191.5, 900.0, 1.965),
    _gpu("a100", "NVIDIA A100", 312.0, 2039.0, 85.1, 300.0, 1.41),
    _gpu("", "NVIDIA L40S", 362.0, 864.0, 48.0, 32.0, 2.52),
    _gpu("", "NVIDIA L4", 121.0, 300.0, 24.0, 32.0, 2.04),
)

# GPUs as XLA:GPU describes them: cores, float32 units per core, bytes/s, L2 in bytes,
# clock in GHz, memory, shared memory per core and per block (opt-in) in bytes, compute
# capability, name (NVIDIA's data; XLA's own descriptions agree). Rates and memory are
# those of `GPUS`, unrounded.
_DESCRIBED = {
    "a100": (108, 64, 2_039_040_000_000, 41_943_040, 1.41, 85_100_068_864)
    + (167_936, 166_912, 8, "NVIDIA A100-SXM4-80GB"),
    "h100": (132, 128, 3_352_320_000_000, 52_428_800, 1.98, 84_942_979_072)
    + (233_472, 232_448, 9, "NVIDIA H100 80GB HBM3"),
    "h200": (132, 128, 4_800_000_000_000, 52_428_800, 1.98, 151_397_597_184)
    + (233_472, 232_448, 9, "NVIDIA H200 141GB HBM3e"),
    "b200": (148, 128, 7_672_320_000_000, 132_644_864, 1.965, 191_514_411_008)
    + (233_472, 232_448, 10, "NVIDIA B200"),
}
# No device is there to try kernels on: matrix products go to cuBLAS, because Triton's
# default tiles do not exist for every shape, which is an error.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of a JAX device by its `device_kind`, None if unknown."""
    chips = (*GPUS, *TPUS)
    return next((c for c in chips if device_kind.startswith(c.kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """Returns the data-sheet bfloat16 FLOP/s of a device, None if unknown."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A machine to compile for: devices of one kind, as the user names them.

    `kind` is "tpu", "gpu" or "cpu"; `chip` is None if its rates are unknown, as for
    CPUs.
    """

    name: str
    kind: str
    generation: str
    shape: str
    chip: Chip | None

    def describe(self) -> list[Any]:
        """Returns the described devices; those of this process for "here" and "cpu".

        Raises:
            ValueError: there is no such slice, its compiler is not installed, or this
                process has too few CPU devices.
        """
        if self.name == HERE:
            return jax.devices()
        if self.kind == "cpu":
            return _cpus(self)
        _check_installed(self)
        return _tpus(self) if self.kind == "tpu" else _gpus(self)

    @property
    def memory(self) -> float | None:
        """Returns the bytes that a program gets on one device, None if unknown."""
        if self.chip is None:
            return None
        return self.chip.memory * (GPU_FRACTION if self.kind == "gpu" else 1)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Returns compiler options for a described GPU, {} for any other target."""
        described = self.kind == "gpu" and self.name != HERE
        return dict(GPU_OPTIONS) if described else {}


def here() -> Target:
    """Returns this machine as a target, with the devices that JAX finds."""
    devices = jax.devices()
    return Target(
        name=HERE,
        kind=devices[0].platform,
        generation="",
        shape=str(len(devices)),
        chip=chip_of(devices[0].device_kind),
    )


def parse(name: str) -> Target:
    """Parses "v5e:2x4", "tpu7x:2x2x1", "h100:8", "h100:2x8" (2 hosts) or "cpu:8".

    Raises:
        ValueError: the chip is unknown or the shape wrong; names the known chips.
    """
    generation, colon, shape = name.strip().lower().partition(":")
    tpus = {chip.generation: chip for chip in TPUS}
    gpus = {chip.generation: chip for chip in GPUS if chip.generation}
    known = (*sorted(tpus), *gpus, "cpu")
    if generation not in known:
        raise ValueError(
            f'Unknown target "{name}".{did_you_mean(generation, known)} {_known()}'
        )
    fits = re.fullmatch(
        r"\d+(x\d+){0,2}" if generation in tpus else r"(\d+x)?\d+", shape
    )
    if not colon or fits is None or "0" in shape.split("x"):
        raise ValueError(
            f'The target "{name}" does not say how many devices. {_known()}'
        )
    if generation == "cpu":
        return Target(name=name, kind="cpu", generation="cpu", shape=shape, chip=None)
    chip = (tpus | gpus)[generation]
    part = chip.described_as
    if part > 1:
        chip = dataclasses.replace(
            chip,
            flops=chip.flops / part,
            bandwidth=chip.bandwidth / part,
            memory=chip.memory / part,
            link=chip.link / part,
        )
    kind = "tpu" if generation in tpus else "gpu"
    return Target(name=name, kind=kind, generation=generation, shape=shape, chip=chip)


@contextlib.contextmanager
def lowering_without_gpu(target: Target) -> Iterator[None]:
    """Allows cuDNN's attention to be lowered for a described GPU.

    Lowering asks the GPU for versions; here it gets those that `describe` gives XLA.
    """
    if target.kind != "gpu" or target.name == HERE:
        yield
        return
    import jax._src.cudnn.fused_attention_stablehlo as fused

    capability = float(_DESCRIBED[target.generation][8])
    asked = fused.check_cudnn_version, fused.check_compute_capability
    fused.check_cudnn_version = lambda: 90800
    fused.check_compute_capability = lambda needed: capability >= float(needed)
    try:
        yield
    finally:
        fused.check_cudnn_version, fused.check_compute_capability = asked


def _known() -> str:
    return (
        f"Known are the TPUs {', '.join(sorted({c.generation for c in TPUS}))} with "
        f"their topology (v5e:2x4, v5p:4x4x4), the GPUs {', '.join(_DESCRIBED)} with "
        "their number (h100:8, two hosts of them h100:2x8), and cpu:8."
    )


def _check_installed(target: Target) -> None:
    module = "libtpu" if target.kind == "tpu" else plugins.CUDA_PLUGINS[0]
    if plugins.importable(module):
        return
    what = "libtpu" if target.kind == "tpu" else "jax-cuda12-plugin with its pjrt wheel"
    raise ValueError(
        f"{target.name} cannot be compiled for: {what} is not installed. Install the "
        f"compilers, they need no device: {INSTALL}. Without them: --on cpu:8"
    )


def _cpus(target: Target) -> list[Any]:
    count = 1
    for part in target.shape.split("x"):
        count *= int(part)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"{target.name} needs {count} CPU devices, this process has "
            f"{len(devices)}; set JAX_NUM_CPU_DEVICES={count} before the command."
        )
    return devices[:count]


def _tpus(target: Target) -> list[Any]:
    from jax.experimental import topologies

    # There is no metadata server outside the cloud, and a second process may compile.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    dims = [int(n) for n in target.shape.split("x")]
    dims += [1] * (2 - len(dims))
    options: dict[str, Any] = {}
    if any(n == 1 for n in dims[:2]):
        # One host with all the chips; by default a host has 2x2 chips.
        options["chips_per_host_bounds"] = tuple([*dims, 1, 1][:3])
    name = f"{target.generation}:{'x'.join(map(str, dims))}"
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        like = (
            "4x4x4 or 2x2x1" if target.generation in ("v4", "v5p", "tpu7x") else "2x4"
        )
        raise ValueError(
            f"libtpu knows no topology {target.name}: {str(error).splitlines()[0]}. "
            f"Use one that exists, such as {target.generation}:{like}."
        ) from error
    return list(found.devices)


def _gpus(target: Target) -> list[Any]:
    from jax.experimental import topologies

    hosts, _, each = target.shape.rpartition("x")
    shape = f"1x{hosts or 1}x{each}"
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=shape,
        topology=shape,
        target_config=_description(target.generation),
    )
    return list(found.devices)


def _description(generation: str) -> str:
    """Returns the description of an absent GPU for XLA:GPU."""
    cores, units, rate, l2, clock, memory, shared, optin, capability, name = _DESCRIBED[
        generation
    ]
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32
      shared_memory_per_block: 49152 shared_memory_per_core: {shared}
      threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {units}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {rate} l2_cache_size: {l2} clock_rate_ghz: {clock}
      device_memory_size: {memory} shared_memory_per_block_optin: {optin}
      cuda_compute_capability {{ major: {capability} minor: 0 }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }}
    device_description_str: "{name}" """
