"""Two real processes, joined over localhost, train what one process trains."""

import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

TESTS = pathlib.Path(__file__).parent
SCRIPT = TESTS / "journalled_run.py"
NUM_STEPS = 6
RECIPE = TESTS / "recipes" / "digits_spread.py"
# Rows over all four devices, parameters over two.
SPLIT = "--config.mesh.fsdp=2"
# Wall-clock fields differ from run to run by nature.
CLOCK = ("images_per_second", "data_wait", "eta_seconds", "mfu")
# Generous: what hangs is ended here, and the test fails.
LIMIT_SECONDS = 300
# What the end of one process may take to end the other: the connection breaks at once,
# a silent one is given up after devices.HEARTBEAT_SECONDS.
APART_SECONDS = 90


@dataclasses.dataclass(kw_only=True)
class Finished:
    """Exit code and output of one process, and when it ended (inf: it was killed)."""

    code: int
    text: str
    ended: float


def launch(
    folder: pathlib.Path,
    *flags: str,
    processes: int,
    devices: int,
    moments: dict[int, str] | None = None,
) -> list[Finished]:
    """Runs `processes` processes of `devices` CPU devices each to their ends."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, JAX_NUM_CPU_DEVICES=str(devices))
    port = free_port()
    running = []
    for index in range(processes):
        command = [sys.executable, SCRIPT, folder / "journal"]
        command += [(moments or {}).get(index, "none"), "--"]
        command += [f"--config={RECIPE}", f"--workdir={folder / 'run'}", *flags]
        if processes > 1:
            command += [f"--coordinator=localhost:{port}"]
            command += [f"--num_processes={processes}", f"--process_id={index}"]
        with (folder / f"output.{index}").open("w") as output:
            running.append(
                subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, env=environment
                )
            )
    deadline = time.monotonic() + LIMIT_SECONDS
    ended: dict[int, float] = {}
    try:
        while len(ended) < processes and time.monotonic() < deadline:
            for index, process in enumerate(running):
                if index not in ended and process.poll() is not None:
                    ended[index] = time.monotonic()
            time.sleep(0.05)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [
        Finished(
            code=process.returncode,
            text=(folder / f"output.{index}").read_text(),
            ended=ended.get(index, float("inf")),
        )
        for index, process in enumerate(running)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def outputs(finished: list[Finished]) -> str:
    return "\n".join(
        f"process {index}: exit {process.code}\n{process.text}"
        for index, process in enumerate(finished)
    )


def succeed(finished: list[Finished]) -> str:
    assert all(process.code == 0 for process in finished), outputs(finished)
    return finished[0].text


def records(folder: pathlib.Path) -> list[dict]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in found]


def rows(folder: pathlib.Path, first_step: int = 1) -> list[str]:
    """Lists "step name row digest" of all processes together."""
    lines = [
        line
        for path in folder.glob("journal.*")
        for line in path.read_text().splitlines()
        if int(line.split()[0]) >= first_step
    ]
    return sorted(lines)


def manifest(folder: pathlib.Path, step: int) -> dict:
    path = folder / "run" / "checkpoints" / str(step) / "manifest.json"
    return json.loads(json.loads(path.read_text())["body"])


def check_same_training(found: list[dict], expected: list[dict]) -> None:
    """Compares records; the sums over devices are added in another order."""
    assert [sorted(r) for r in found] == [sorted(r) for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            if name.endswith(("accuracy", "accuracy_top5", "examples", "unreadable")):
                assert ours[name] == value, (name, theirs["step"])
            else:
                # float32 has 6e-8; Adam's division by the gradient's size passes the
                # last bits of small gradients on to the next steps.
                np.testing.assert_allclose(ours[name], value, rtol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("one")
    succeed(launch(folder, SPLIT, processes=1, devices=4))
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("two")
    succeed(launch(folder, SPLIT, processes=2, devices=2))
    return folder


def test_two_processes_read_the_rows_of_one(one, two):
    assert rows(two) == rows(one)
    assert len(rows(one)) == NUM_STEPS * 64 * 2  # images and labels


def test_two_processes_train_and_score_like_one(one, two):
    check_same_training(records(two), records(one))


def test_two_processes_record_every_step_once(two):
    logged = [r["step"] for r in records(two) if "train/loss" in r]
    assert logged == list(range(1, NUM_STEPS + 1))
    scored = [r["step"] for r in records(two) if "test_ema/accuracy" in r]
    assert scored == [3, 6]
    assert "step 6/6" in (two / "output.0").read_text()
    assert "loss" not in (two / "output.1").read_text()
    assert len(list((two / "run" / "tensorboard").iterdir())) == 1


def test_one_process_resumes_the_checkpoint_of_two(one, two, tmp_path):
    shutil.copytree(two / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    text = succeed(launch(tmp_path, processes=1, devices=1))
    assert "resuming from step 3" in text
    assert "saved on 4 devices, restoring on 1" in text
    assert rows(tmp_path) == rows(one, first_step=4)
    check_same_training(records(tmp_path), records(one))
    assert manifest(two, 6)["leaves"].keys() == manifest(tmp_path, 6)["leaves"].keys()


@pytest.mark.slow
@pytest.mark.processes
def test_a_folder_in_use_stops_both_processes_at_once(two, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        finished = launch(tmp_path, processes=2, devices=1)
    assert [p.code for p in finished] == [1, 1], outputs(finished)
    assert "is in use by" in finished[0].text
    assert "process 0 stopped" in finished[1].text
    assert "is in use by" in finished[1].text
    assert "Traceback" not in outputs(finished)
    assert abs(finished[0].ended - finished[1].ended) < APART_SECONDS


@pytest.mark.slow
@pytest.mark.processes
def test_a_signal_to_one_process_stops_both_at_one_step_and_both_resume(one, tmp_path):
    seldom = "--config.log_every_steps=1000"  # a stop does not wait for a line of log
    stopped = launch(tmp_path, seldom, processes=2, devices=2, moments={1: "term:4"})
    expected = 128 + signal.SIGTERM
    assert [p.code for p in stopped] == [expected, expected], outputs(stopped)
    assert "Another process: saved step 4" in stopped[0].text
    assert "SIGTERM: saved step 4" in stopped[1].text
    assert manifest(tmp_path, 4)["step"] == 4
    text = succeed(launch(tmp_path, processes=2, devices=2))
    assert "resuming from step 4 of 6" in text
    assert rows(tmp_path) == rows(one)
    logged = [r for r in records(one) if r["step"] > 4 or "train/loss" not in r]
    check_same_training(records(tmp_path), logged)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["kill:5", "raise:5"])
def test_a_process_that_fails_ends_the_other_soon_and_loses_nothing(
    one, tmp_path, victim, moment
):
    failed = launch(tmp_path, processes=2, devices=2, moments={victim: moment})
    assert all(p.code != 0 for p in failed), outputs(failed)
    assert abs(failed[0].ended - failed[1].ended) < APART_SECONDS
    if moment.startswith("raise"):
        assert failed[victim].code == 1
        assert "error: the disk of this host is gone" in failed[victim].text
    text = succeed(launch(tmp_path, processes=2, devices=2))
    assert "resuming from step 3" in text
    check_same_training(records(tmp_path), records(one))
