"""The README's first command, and what its reader does next."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import cv2
import draw_rooms
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("module_optimised")

ROOT = pathlib.Path(__file__).parents[1]
HEAVY = ("tensorflow", "torch", "pandas")
README = (ROOT / "README.md").read_text()
TRAIN, TEST, PREDICT = (
    block.split("```")[0].replace("\\\n ", "").strip()
    for block in README.split("```bash\n")[1:4]
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
    setup, install, train = (part.split() for part in TRAIN.split(" && "))
    assert setup == ["python3", "-m", "venv", ".venv"]
    assert install == [".venv/bin/pip", "install", "-e", "."]
    workdir = tmp_path_factory.mktemp("quickstart") / "first"
    assert train[-2:] == ["--workdir", "runs/first"]
    finished = run([*train[2:-1], workdir, *flags], tripwires)
    (workdir / "shown.txt").write_text(finished.stdout)
    assert finished.stderr == ""
    return workdir


def test_ci_runs_the_second_command_of_the_readme():
    install, test = TEST.split(" && ")[1:]
    assert install == ".venv/bin/pip install -e '.[test]'"
    ci = (ROOT / ".ci" / "run").read_text()
    steps = ("-m venv", 'pip" install', "-m pytest")
    lines = [line for line in ci.splitlines() if any(step in line for step in steps)]
    assert lines[0].startswith("python3 -m venv")
    assert lines[1].endswith("pip\" install --quiet -e '.[test]'")
    assert f"{test.removeprefix('.venv/bin/python ')} --at_least=" in lines[2]
    # Then what the second command leaves out where torch is not installed.
    assert "install --quiet -e '.[test,torch]'" in lines[3]
    assert "-n 2 --dist loadfile -m 'parity and not slow'" in lines[4]
    # And all slow ones.
    assert "-m slow --at_least=" in lines[-1]


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
    given = {"runs/first": first, "FOLDER": tmp_path, "preds.csv": out}
    words = PREDICT.split()[2:]
    assert given.keys() <= set(words)
    run([given.get(word, word) for word in words], tripwires)
    with out.open() as file:
        rows = list(csv.reader(file))[1:]
    found = np.array([int(row[1]) for row in rows])
    assert (found == [test[index]["label"] for index in range(40)]).mean() >= 0.9


def test_the_python_of_the_readme_names_the_digits(first):
    from big_vision_lite.data.sources import Digits

    test = Digits(split="test")
    (code,) = (b for b in README.split("```python\n") if "bvl.load" in b[:200])
    images = [test[index]["image"] for index in range(40)]
    names: dict = {"images": images}
    exec(code.split("```")[0].replace("runs/first", str(first)), names)
    assert names["features"].shape == (40, 128)
    found = names["probabilities"].argmax(-1)
    labels = np.array([test[index]["label"] for index in range(40)])
    assert (found == labels).mean() >= 0.9
    assert names["model"].class_names == test.class_names


def test_the_commands_of_the_readme_take_two_lines_at_most():
    for block in README.split("```bash\n")[1:]:
        commands = block.split("```")[0].strip().splitlines()
        assert len(commands) <= 2 and max(map(len, commands)) <= 88, commands


def test_the_picture_of_the_rooms_is_the_one_of_today():
    assert draw_rooms.OUT.read_text() == draw_rooms.draw()


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
