"""Sets up platform, processes and caches before JAX initialises its devices."""

import contextlib
import enum
import importlib.metadata
import importlib.util
import logging
import os
import pathlib
import platform
import subprocess
import sys
import threading
import warnings
from typing import Any

import jax
from absl import logging as absl_logging

from big_vision_lite.runtime import cpu


class Platform(enum.StrEnum):
    """The kind of device to run on."""

    CPU = "cpu"
    GPU = "gpu"
    TPU = "tpu"


CACHE = "~/.cache/big_vision_lite/compiled"
# Seconds until a reminder that other processes are missing, until giving up, and for
# which a process may be silent (frozen, or its host gone) before the others end.
REMIND_SECONDS = 20
JOIN_SECONDS = 300
HEARTBEAT_SECONDS = 60


def set_up(
    platform: Platform | None,
    *,
    deterministic: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    platform_flag: str = "--config.platform",
) -> None:
    """Chooses the platform, joins the other processes, sets up memory and caches.

    `platform_flag` is the flag that chooses the platform, for messages.

    Raises:
        ValueError: the machine has a GPU that this JAX cannot use, the chosen platform
            is missing, or the other processes cannot be joined.
    """
    cpu.set_up()
    if platform is not None:
        name = "cuda" if platform == Platform.GPU else platform.value
        jax.config.update("jax_platforms", name)
    if deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    join(coordinator, num_processes, process_id, platform)
    if platform is None and not os.environ.get("JAX_PLATFORMS"):
        check_not_idle(platform_flag)
    cache_compiled()
    if platform is not None:
        check_there(platform, platform_flag)


def set_up_to_use(trained_on: str | None, platform: Platform | None) -> None:
    """Sets up to use a saved step, on the CPU if its recipe chose that.

    `platform`, else JAX_PLATFORMS, takes precedence. A step trained on another platform
    runs on JAX's default one: a pod's checkpoint may be used on a laptop.
    """
    if platform is None and not os.environ.get("JAX_PLATFORMS"):
        platform = Platform.CPU if trained_on == Platform.CPU else None
    set_up(platform, platform_flag="--platform")


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    platform: Platform | None = None,
) -> None:
    """Joins the other processes of the run, if there are any.

    Finds them by the three arguments, under Slurm's srun, or on a TPU VM, which knows
    its slice.

    Raises:
        ValueError: the arguments are incomplete or contradict each other, the port is
            taken, or Slurm reserved several tasks but srun did not start this one.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        if coordinator is None or num_processes is None or process_id is None:
            raise ValueError(
                "--coordinator, --num_processes and --process_id go together, for "
                "example --coordinator=host-0:1234 --num_processes=4 --process_id=0."
            )
        if ":" not in coordinator or not 0 <= process_id < num_processes:
            raise ValueError(
                f"--coordinator={coordinator} --num_processes={num_processes} "
                f"--process_id={process_id}: the coordinator is host:port of process "
                "0, and processes count from 0 to one less than their number."
            )
        _meet(
            f"process {process_id} of {num_processes}",
            coordinator,
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            # Flags win over whatever a launcher has left in the environment.
            cluster_detection_method="deactivate",
        )
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        tasks, task = os.environ["SLURM_NTASKS"], os.environ["SLURM_PROCID"]
        if "SLURM_STEP_NODELIST" not in os.environ:
            raise ValueError(
                f"Slurm reserved {tasks} tasks, but this one was not started by srun: "
                "srun python -m big_vision_lite.train ... starts all of them; with "
                "SLURM_NTASKS=1 before the command this one trains alone."
            )
        _meet(f"task {task} of {tasks}", os.environ["SLURM_STEP_NODELIST"])
        if _own_gpus():
            # JAX gives each task the GPU of its number on the node, which is right
            # only where tasks share the GPUs that they see. To be tested on Slurm.
            jax.config.update("jax_cuda_visible_devices", "all")
    elif platform in (None, Platform.TPU) and _on_tpu_vm():
        _meet("a TPU VM", "worker 0 of its slice")


def _meet(who: str, where: str, **arguments: Any) -> None:
    """Calls jax.distributed.initialize, and reports a long wait.

    By itself it waits in silence and then ends in a stack trace.
    """
    # On CPUs each device that waits for another holds a thread. With as many threads as
    # cores none may be left for the work that they wait for: a deadlock.
    virtual: int = jax.config.values["jax_num_cpu_devices"]
    threads = 4 * max(2, os.cpu_count() or 1, virtual)
    os.environ.setdefault("PJRT_NPROC", str(threads))
    text = (
        f"the other processes: this is {who}, they meet at {where}. Is the same "
        "command running on every host (gcloud ... --worker=all, srun), and can they "
        "reach that address?"
    )
    if where.startswith(("localhost", "127.", "[::1]")):
        text += f" {where} is this host alone: others need its real address."

    def give_up() -> None:
        print(f"\nerror: no sign in {JOIN_SECONDS} s of {text}", file=sys.stderr)
        os._exit(1)

    timers = [
        threading.Timer(REMIND_SECONDS, print, [f"Waiting for {text}"]),
        threading.Timer(JOIN_SECONDS, give_up),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=2 * JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"Cannot join the other processes as {who} at {where}: {error}. To name "
            "them yourself: --coordinator=HOST:PORT --num_processes=N --process_id=I "
            "(N=1 and I=0 for one machine alone); a port in use: choose another."
        ) from error
    finally:
        for timer in timers:
            timer.cancel()


def _own_gpus() -> bool:
    """Returns whether this Slurm task alone sees its GPUs on this node."""
    tasks, nodes = (
        int(os.environ.get(f"SLURM_{name}", 0)) for name in ("NTASKS", "NNODES")
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tasks == nodes or len([v for v in visible.split(",") if v]) == 1


def _on_tpu_vm(dev: pathlib.Path = pathlib.Path("/dev")) -> bool:
    """Returns whether TPU chips and their library are present."""
    if os.environ.get("JAX_PLATFORMS", "tpu") != "tpu":
        return False
    chips = [*dev.glob("accel[0-9]*"), *dev.glob("vfio/[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def check_not_idle(
    platform_flag: str, proc: pathlib.Path = pathlib.Path("/proc")
) -> None:
    """Raises ValueError if JAX would ignore a GPU of this machine."""
    driver = proc / "driver" / "nvidia" / "version"
    if not driver.exists() or jax.default_backend() != "cpu":
        return
    words = driver.read_text().split()
    numbers = [w for w in words if w[:1].isdigit() and "." in w]
    raise ValueError(
        f"This machine has an NVIDIA GPU (driver {numbers[0] if numbers else '?'}) but "
        f"JAX {jax.__version__} was installed for CPU only. Install: pip install -e "
        f"'.[cuda]'. To use the CPU on purpose: {platform_flag}=cpu"
    )


def check_there(platform: Platform, platform_flag: str) -> None:
    """Raises ValueError if this machine or this JAX lacks the platform."""
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        jax.config.update("jax_platforms", "")
        there = sorted({str(device.platform) for device in jax.devices()})
        reason = str(error).strip().splitlines()[:1]
        extra = {Platform.GPU: "cuda", Platform.TPU: "tpu"}.get(platform)
        install = f" If it has one: pip install -e '.[{extra}]'." if extra else ""
        raise ValueError(
            f"{platform_flag}={platform}: JAX {jax.__version__} finds no {platform} on "
            f"this machine{''.join(f' ({line})' for line in reason)}. There is: "
            f"{', '.join(there)}, so {platform_flag}={there[0]}.{install}"
        ) from error


def cache_compiled() -> None:
    """Keeps compiled programs on disk, so that a restart does not compile again.

    JAX_COMPILATION_CACHE_DIR chooses another folder; set it to "" to keep none.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", CACHE)
    if folder:
        path = str(pathlib.Path(folder).expanduser())
        jax.config.update("jax_compilation_cache_dir", path)
        # Small programs, too: a restart needs dozens of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of this code and of the libraries that affect results."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    found["python"] = platform.python_version()
    root = pathlib.Path(__file__).parents[2]
    # An installed copy lies in no repository, or in another one.
    if (root / ".git").exists():
        with contextlib.suppress(FileNotFoundError):  # a machine without git
            commit = subprocess.run(
                ["git", "-C", str(root), "rev-parse", "HEAD"],
                capture_output=True,
                text=True,
                check=False,
            )
            if commit.returncode == 0:
                found["commit"] = commit.stdout.strip()
    return found


def machine() -> dict[str, Any]:
    """Returns devices, processes and visible cores, on which exact bits depend."""
    return {
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": cpu.available(),
    }


OURS = "big_vision_lite"


class _PlainLines(logging.Handler):
    """Prints "warning: ..." without time, thread and line of code."""

    def emit(self, record: logging.LogRecord) -> None:
        # The current sys.stderr: a live progress line keeps such lines above itself.
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


_PLAIN = _PlainLines(logging.WARNING)


def _is_foreign(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] != OURS


def quiet() -> None:
    """Silences libraries' log output; may be called again."""
    # Errors, too: Orbax logs the stack of every thread that a full disk stops, and also
    # raises the error, which we print as one message with the stack in the trace file.
    absl_logging.set_verbosity(absl_logging.FATAL)
    absl_logging.use_absl_handler()
    absl_logging.get_absl_handler().addFilter(_is_foreign)
    ours = logging.getLogger(OURS)
    ours.setLevel(logging.WARNING)  # the root's level is now FATAL
    ours.addHandler(_PLAIN)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # A cut or unwritable entry of the compile cache costs one compilation, no more.
    warnings.filterwarnings("ignore", message="Error .* persistent compilation cache")
