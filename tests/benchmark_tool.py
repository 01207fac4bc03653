"""Runs tools/benchmark.py and reads what it measured."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def benchmark(
    *arguments: object, before: tuple[object, ...] = ()
) -> subprocess.CompletedProcess:
    command = [sys.executable, *before, ROOT / "tools" / "benchmark.py", *arguments]
    environment = dict(os.environ, JAX_NUM_CPU_DEVICES="1")
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment,
    )


def tables(path: pathlib.Path) -> dict[str, dict[str, list[float]]]:
    """Returns {title: {row: values}}."""
    content = json.loads(path.read_text())["tables"]
    return {
        title: {row["name"]: row["values"] for row in rows}
        for title, rows in content.items()
    }
