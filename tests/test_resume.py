"""A killed run loses nothing, by real kills, at moments drawn anew (KILL_SEED=n)."""

import json
import os
import pathlib
import random
import secrets
import shutil
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from big_vision_lite.runs import step_folder

pytestmark = pytest.mark.usefixtures("module_optimised")

SCRIPT = pathlib.Path(__file__).parent / "killable_run.py"
NUM_STEPS = 16
# Wall-clock fields differ from run to run by nature.
CLOCK = ("images_per_second", "data_wait", "eta_seconds", "mfu")


def run(
    folder: pathlib.Path, moment: str, workdir: pathlib.Path | str = "run"
) -> subprocess.CompletedProcess:
    """Starts the program in `folder`, so that its work directory is a relative path."""
    environment = dict(os.environ, JAX_NUM_CPU_DEVICES="2", JAX_PLATFORMS="cpu")
    return subprocess.run(
        [sys.executable, SCRIPT, workdir, folder / "journal", moment],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=folder,
        check=False,
    )


def records(folder: pathlib.Path) -> list[dict]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in found]


def batches(folder: pathlib.Path) -> list[tuple[int, str]]:
    lines = (folder / "journal").read_text().splitlines()
    return [(int(line.split()[0]), line.split()[1]) for line in lines]


def last_parameters(folder: pathlib.Path) -> dict[str, str]:
    manifest = folder / "run" / "checkpoints" / str(NUM_STEPS) / "manifest.json"
    body = json.loads(json.loads(manifest.read_text())["body"])
    return {name: leaf["checksum"] for name, leaf in body["leaves"].items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("straight")
    finished = run(folder, "none")
    assert finished.returncode == 0, finished.stderr
    return folder


def check_equal(pieces: pathlib.Path, straight: pathlib.Path) -> None:
    """Compares records, batches and final checksums with the run in one piece."""
    assert records(pieces) == records(straight)
    assert last_parameters(pieces) == last_parameters(straight)
    expected = dict(batches(straight))
    assert len(expected) == NUM_STEPS
    # Steps after the last save are repeated: each time with the same batch.
    assert all(expected[step] == digest for step, digest in batches(pieces))
    assert {step for step, _ in batches(pieces)} == set(expected)
    keys = [(r["step"], k) for r in records(pieces) for k in r if k != "step"]
    assert len(keys) == len(set(keys)), "a score is recorded twice"
    logged = [r["step"] for r in records(pieces) if "train/loss" in r]
    assert logged == list(range(1, NUM_STEPS + 1)), "a step is missing"


@pytest.fixture
def draw():
    """A random generator whose seed is shown when a test fails."""
    seed = int(os.environ.get("KILL_SEED") or secrets.randbelow(2**32))
    print(f"KILL_SEED={seed}")
    return random.Random(seed)


def test_a_run_killed_during_a_checkpoint_write_continues_bit_for_bit(
    tmp_path, straight, draw
):
    step = draw.choice((8, 12, 16))
    print(f"killed while step {step} is written")
    assert run(tmp_path, f"save:{step}").returncode == -signal.SIGKILL
    resumed = run(tmp_path, "none")
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming from step {step - 4} " in resumed.stdout
    assert "is unfinished (its run was killed" in resumed.stdout
    check_equal(tmp_path, straight)


@pytest.mark.slow
@pytest.mark.processes
def test_the_folder_alone_resumes_its_run_bit_for_bit(tmp_path, straight):
    assert run(tmp_path, "term:6").returncode == 128 + signal.SIGTERM
    resumed = subprocess.run(
        [sys.executable, "-m", "big_vision_lite.train", "--workdir", tmp_path / "run"]
        # What changes no result may be overridden, as with a recipe.
        + ["--config.checkpoints.keep_latest=3"],
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ, JAX_NUM_CPU_DEVICES="2", JAX_PLATFORMS="cpu"),
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step 6 of 16" in resumed.stdout
    assert records(tmp_path) == records(straight)
    assert last_parameters(tmp_path) == last_parameters(straight)
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"8", "12", "16"}


@pytest.mark.slow
@pytest.mark.processes
def test_the_program_as_it_is_killed_with_steps_in_flight_continues_bit_for_bit(
    tmp_path, straight
):
    """Nothing patched: steps are under way while the first save is written."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(straight / "run" / "config.json", workdir)
    command = [sys.executable, "-m", "big_vision_lite.train", "--workdir", workdir]
    environment = dict(os.environ, JAX_NUM_CPU_DEVICES="2", JAX_PLATFORMS="cpu")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as run:
        while run.poll() is None and not list(workdir.glob("checkpoints/4*")):
            time.sleep(0.001)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    done = step_folder.complete_steps(epath.Path(workdir / "checkpoints"))
    assert done in ([], [4])
    resumed = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert records(tmp_path) == records(straight)
    assert last_parameters(tmp_path) == last_parameters(straight)


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_killed_at_three_random_moments_equals_the_straight_run_bit_for_bit(
    tmp_path, straight, draw
):
    for _ in range(3):
        done = max(
            step_folder.complete_steps(epath.Path(tmp_path / "run/checkpoints")),
            default=0,
        )
        if done == NUM_STEPS:
            break
        step = draw.randint(done + 1, min(done + 8, NUM_STEPS))
        moment = f"after:{step}:{draw.randrange(1500)}"
        print(moment)
        assert run(tmp_path, moment).returncode == -signal.SIGKILL
    assert run(tmp_path, "none").returncode == 0
    check_equal(tmp_path, straight)


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_killed_in_saves_and_before_an_evaluation_and_stopped_equals_it_too(
    tmp_path, straight, draw
):
    saves = draw.sample((4, 8, 12, 16), 3)
    moments = list(zip(saves, ("save", "manifest", "evaluate"), strict=True))
    moments.append((draw.choice([n for n in range(1, 16) if n % 4]), "term"))
    for step, what in sorted(moments):
        print(what, step)
        ended = run(tmp_path, f"{what}:{step}")
        if what == "term":
            assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
            assert f"SIGTERM: saved step {step} in" in ended.stdout
        else:
            assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert run(tmp_path, "none").returncode == 0
    check_equal(tmp_path, straight)


def test_a_finished_run_started_again_by_its_absolute_path_changes_nothing(straight):
    assert not (straight / "run" / "run").exists(), "the relative path was taken twice"
    before = (straight / "run" / "metrics.jsonl").read_text()
    again = run(straight, "none", workdir=straight / "run")
    assert again.returncode == 0, again.stderr
    assert (straight / "run" / "metrics.jsonl").read_text() == before
    assert len(batches(straight)) == NUM_STEPS
