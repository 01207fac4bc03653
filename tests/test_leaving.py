"""However a run ends, its exit code says how, and no thread of it is left behind."""

import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from big_vision_lite.console.progress import Progress
from big_vision_lite.runs.session import StepsInFlight

ROOT = pathlib.Path(__file__).parents[1]

# A step that takes seconds is in flight when the body of the loop raises.
BODY = """
import sys
import jax, jax.numpy as jnp
from big_vision_lite.recipes import command_line
from big_vision_lite.console.progress import Progress
from big_vision_lite.runs.session import StepsInFlight

@jax.jit
def slow(x):
    return jax.lax.fori_loop(0, 4000, lambda _, y: jnp.tanh(y @ x), x)

def main(argv):
    with Progress(10, 8, quiet=True) as progress, StepsInFlight() as flight:
        for step, batch in progress.watch(iter([{}] * 10), until=10):
            flight.add(slow(jnp.ones((256, 256))))
            raise ERROR

sys.exit(command_line.run(main, ["train"]))
"""


@pytest.mark.parametrize(
    ("error", "code"), [('ValueError("no images")', 1), ("KeyboardInterrupt", 130)]
)
def test_an_error_amid_a_step_ends_with_its_own_exit_code(error, code):
    ended = subprocess.run(
        [sys.executable, "-c", BODY.replace("ERROR", error)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == code, ended.stderr
    assert "Aborted" not in ended.stderr and "terminate" not in ended.stderr


def test_no_thread_outlives_the_run_that_failed():
    before = set(threading.enumerate())
    caught = None
    try:
        with Progress(10, 8, quiet=True) as progress, StepsInFlight() as flight:
            for _ in progress.watch(iter([{}] * 10), until=10):
                flight.add(jax.jit(jnp.tanh)(jnp.ones(8)))
                raise ZeroDivisionError
    except ZeroDivisionError as error:
        caught = error  # holds the frame, and with it the suspended generator
    assert caught is not None
    assert set(threading.enumerate()) <= before
