"""The README's first command, and what its reader does next."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import cv2
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("module_optimised")

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = ("tensorflow", "torch", "pandas")
README = (ROOT / "README.md").read_text()
TRAIN = (
    "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python -m "
    "big_vision_lite.train --config configs/quickstart.py --workdir runs/first"
)
TEST = (
    "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python "
    "-m pytest -n 2 --dist loadfile"
)


@pytest.fixture(scope="module")
def tripwires(tmp_path_factory) -> pathlib.Path:
    """Makes heavy packages importable, and whoever imports one leaves a note."""
    folder = tmp_path_factory.mktemp("tripwires")
    for name in HEAVY:
        (folder / name).mkdir()
        note = f"open({str(folder / 'imported')!r}, 'a').write({name!r})\n"
        (folder / name / "__init__.py").write_text(note)
    return folder


def run(arguments: list, tripwires: pathlib.Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(tripwires)},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory, tripwires) -> pathlib.Path:
    """Runs a seventh of the quickstart, in a folder of its own."""
    flags = ("num_steps=60", "optimizer.schedule.warmup_steps=6")
    return quickstart(
        tmp_path_factory, tripwires, *(f"--config.{flag}" for flag in flags)
    )


def quickstart(tmp_path_factory, tripwires, *flags) -> pathlib.Path:
    words = TRAIN.split(" && ")[-1].split()[2:]
    workdir = tmp_path_factory.mktemp("quickstart") / "first"
    finished = run([*words[:-1], workdir, *flags], tripwires)
    (workdir / "shown.txt").write_text(finished.stdout)
    assert finished.stderr == ""
    return workdir


def test_the_readme_has_the_two_commands_and_ci_runs_the_second():
    assert TRAIN in README and TEST in README
    ci = (ROOT / ".ci" / "run").read_text()
    steps = ("-m venv", 'pip" install', "-m pytest")
    lines = [line for line in ci.splitlines() if any(step in line for step in steps)]
    assert lines[0].startswith("python3 -m venv")
    assert lines[1].endswith("pip\" install --quiet -e '.[test]'")
    assert 'python" -m pytest -n 2 --dist loadfile --at_least=' in lines[2]
    # Then what the second command leaves out where torch is not installed.
    assert "install --quiet -e '.[test,torch]'" in lines[3]
    assert "-n 2 --dist loadfile -m 'parity and not slow'" in lines[4]
    # And what the compilers make of whole models.
    assert "-m slow tests/training/test_compiled.py --at_least=" in lines[-1]


def scores(workdir: pathlib.Path) -> dict[str, float]:
    records = [
        json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()
    ]
    return {name: value for r in records for name, value in r.items()}


@pytest.mark.slow
@pytest.mark.processes
def test_the_whole_quickstart_scores_what_the_readme_says(tmp_path_factory, tripwires):
    whole = quickstart(tmp_path_factory, tripwires)
    assert scores(whole)["test/accuracy"] >= 0.95


def test_a_seventh_of_the_quickstart_learns_the_digits(first):
    found = scores(first)
    assert found["test/accuracy"] >= 0.85
    assert found["test/examples"] == 359
    for kind in ("accuracy", "control_raw_pixels", "control_untrained"):
        assert f"fewshot/digits/10_shot/{kind}" in found
    shown = (first / "shown.txt").read_text()
    assert "data-efficiency probe" in shown
    for word in ("raw pixels", "untrained", "big_vision_lite.predict --workdir"):
        assert word in shown


def test_no_run_imports_tensorflow_torch_or_pandas(first, tripwires):
    assert not (tripwires / "imported").exists()


def test_the_run_predicts_a_folder_of_images(first, tripwires, tmp_path):
    from big_vision_lite.data.sources import Digits

    test = Digits(split="test")
    for index in range(40):
        cv2.imwrite(str(tmp_path / f"{index:02d}.png"), test[index]["image"])
    out = tmp_path / "preds.csv"
    run(
        ["big_vision_lite.predict", "--workdir", first, "--images", tmp_path]
        + ["--out", out],
        tripwires,
    )
    with out.open() as file:
        rows = list(csv.reader(file))[1:]
    found = np.array([int(row[1]) for row in rows])
    assert (found == [test[index]["label"] for index in range(40)]).mean() >= 0.9


def test_the_readme_names_only_files_of_the_repository():
    words = README.replace("`", " ").replace(":", " ").split()
    paths = [w.strip("(),.;") for w in words if w.startswith(("configs/", "tools/"))]
    paths = [p for p in paths if "." in p and "NAME" not in p and "mine" not in p]
    assert len(paths) > 8
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_readme_shows_the_recipe_as_it_is():
    recipe = (ROOT / "configs" / "vit_s16_i1k.py").read_text()
    body = recipe[recipe.index("def get_config") :].rstrip()
    assert body in README


def test_the_objective_of_the_readme_works():
    code = README[README.index("from big_vision_lite.types import Objective") :]
    code = code[: code.index("```")]
    names: dict = {}
    exec("import dataclasses, jax, jax.numpy as jnp\n" + code, names)
    import jax.numpy as jnp

    logits = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
    batch = {"image": None, "label": jnp.array([0, 2])}
    losses, metrics = names["FocalLoss"]()(
        lambda image: {"logits": logits}, batch, None
    )
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p = p[[0, 1], [0, 2]]
    np.testing.assert_allclose(losses, -((1 - p) ** 2) * np.log(p), rtol=1e-5)
    assert metrics["accuracy"].tolist() == [1.0, 0.0]
