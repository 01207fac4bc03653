"""What is settled before JAX looks at its devices: platform, processes, caches."""

import os
import pathlib

import jax

from big_vision_lite.config import Platform

CACHE = "~/.cache/big_vision_lite/compiled"


def set_up(
    platform: Platform | None,
    *,
    deterministic: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Chooses the platform, joins the other processes, switches the caches on.

    Processes are joined when `coordinator` is given, under Slurm, and on a TPU pod.

    Raises:
        ValueError: the machine has a GPU that this JAX cannot use, or only some of
            the three flags of several processes are given.
    """
    if platform is not None:
        name = "cuda" if platform == Platform.GPU else platform.value
        jax.config.update("jax_platforms", name)
    if deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    join(coordinator, num_processes, process_id)
    if platform is None:
        check_not_idle()
    cache_compiled()


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Calls jax.distributed.initialize where there are several processes."""
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        if any(value is None for value in given):
            raise ValueError(
                "--coordinator, --num_processes and --process_id go together, for "
                "example --coordinator=host-0:1234 --num_processes=4 --process_id=0."
            )
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        jax.distributed.initialize()
    elif len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        jax.distributed.initialize()


def check_not_idle(proc: pathlib.Path = pathlib.Path("/proc")) -> None:
    """Refuses to train on a CPU beside a GPU that JAX was not installed for."""
    driver = proc / "driver" / "nvidia" / "version"
    if not driver.exists() or jax.default_backend() != "cpu":
        return
    words = driver.read_text().split()
    numbers = [w for w in words if w[:1].isdigit() and "." in w]
    raise ValueError(
        f"This machine has an NVIDIA GPU (driver {numbers[0] if numbers else '?'}) but "
        f"JAX {jax.__version__} was installed for CPU only. Install: pip install -e "
        "'.[cuda]'. To train on CPU on purpose: --config.platform=cpu"
    )


def cache_compiled() -> None:
    """Keeps compiled programs on disk, so that a restart does not compile again.

    JAX_COMPILATION_CACHE_DIR chooses another folder; set it to "" to keep none.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", CACHE)
    if folder:
        path = str(pathlib.Path(folder).expanduser())
        jax.config.update("jax_compilation_cache_dir", path)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
