"""Scores that are computed once per run: those of the controls."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax

from big_vision_lite.runs.evaluations import Context
from big_vision_lite.runtime import files, processes


def once(
    context: Context, protocol: Any, compute: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """Returns the scores of `compute()`, from the run's folder if they are there.

    They are kept in WORKDIR/<name>_controls.json and recomputed if `protocol`, a JSON
    value of all that they depend on, changes.
    """
    path = context.workdir / f"{context.name}_controls.json"
    text = json.dumps(protocol, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    kept = json.loads(path.read_text()) if path.exists() else {}
    # Only process 0 records scores, and only its disk is sure to hold the file.
    if processes.on_first(lambda: kept.get("key") == key):
        return kept.get("scores", {})
    scores = compute()
    if jax.process_index() == 0:
        content = {"key": key, "protocol": protocol, "scores": scores}
        with files.writing(path):
            context.workdir.mkdir(parents=True, exist_ok=True)
            files.replace(path, json.dumps(content, indent=1).encode())
    return scores
