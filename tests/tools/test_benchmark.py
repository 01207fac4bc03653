"""The benchmark's tables: every row is there, and what can be counted is right."""

import importlib.util
import pathlib
import sys

import pytest
from benchmark_tool import benchmark, tables

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "recipes" / "digits_spread.py"
OF_A_STEP = (
    "parameters",
    "model FLOPs of a step",
    "XLA FLOPs over model FLOPs",
    "XLA's memory of a step",
    "bare step",
    "bare step, images/s",
    "bare step, MFU",
    "compile time",
    "compile CPU-seconds",
)
OF_A_RECIPE = (
    *OF_A_STEP,
    "whole loop",
    "whole loop over bare step",
    "whole loop, images/s",
    "CPU-seconds per 1,000 images, loop",
    "CPU-seconds per 1,000 images, bare step",
    "blocked per save, first",
    "blocked per save, later",
    "start to first step, cold cache",
    "start to first step, warm cache",
    "peak memory of a training process",
    "peak device memory",
)
# What a machine with jax, flax, optax and ml_collections may lack.
LACKING = (
    "orbax",
    "grain",
    "cv2",
    "simplejpeg",
    "tensorboard",
    "tensorflow",
    "tensorflow_datasets",
    "sklearn",
    "torch",
    "pandas",
    "jaxtyping",
    "beartype",
)
BARE_MACHINE = f"""
import importlib.abc, importlib.machinery, runpy, sys
LACKING = {LACKING!r}

class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in LACKING:
            raise ModuleNotFoundError(f"No module named {{name!r}} on a bare machine")

class Bare(importlib.machinery.PathFinder):
    # importlib.util.find_spec must say that it is not there, as it would.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in LACKING:
            return None
        return super().find_spec(name, path, target)

sys.meta_path = [
    Bare if finder is importlib.machinery.PathFinder else finder
    for finder in sys.meta_path
]
import jax, flax.linen, optax, ml_collections
from ml_collections import config_flags
before = set(sys.modules)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print("new:", *sorted(new - set(sys.stdlib_module_names)))
"""


def vit(width: int, mlp: int, tokens: int, pixels: int, classes: int, depth: int = 1):
    """Returns (parameters, FLOPs of one image's step) of a ViT, by hand."""
    attention = 4 * (width * width + width)
    perceptron = 2 * width * mlp + mlp + width
    block = attention + perceptron + 2 * 2 * width
    stem = pixels * width + width
    head = width * classes + classes
    parameters = stem + depth * block + 2 * width + head
    products = 4 * width**2 + 2 * width * mlp + 2 * tokens * width
    forward = 2 * tokens * (pixels * width + depth * products) + 2 * width * classes
    return parameters, 3 * forward - 2 * tokens * pixels * width


@pytest.mark.slow
def test_bare_steps_need_four_libraries_and_count_right(tmp_path):
    written = tmp_path / "table.json"
    spec = "ViT:Ti/16,depth=1,width=24,mlp_dim=32"
    shown = benchmark(
        *("--synthetic", "--model", spec, "--model", f"{spec},remat=full"),
        *("--batch_size", 2, "--image_size", 32, "--steps", 1, "--rounds", 2),
        *("--json", written),
        before=("-c", BARE_MACHINE),
    )
    assert shown.returncode == 0, shown.stderr
    # The stand-in is no library; of the four some modules come late.
    new = set(shown.stdout.splitlines()[-1].split()[1:])
    ours = {"big_vision_lite", "model_spec", "jaxtyping"}
    assert new - {"jax", "jaxlib", "jax_plugins", "numpy"} == ours
    found = tables(written)
    *models, memory = found.values()
    parameters, flops = vit(24, 32, tokens=4, pixels=16 * 16 * 3, classes=1000)
    for rows in models:
        assert set(OF_A_STEP) <= set(rows)
        assert rows["parameters"] == [parameters]
        assert rows["model FLOPs of a step"] == [pytest.approx(2 * flops / 1e9)]
        assert len(rows["bare step"]) == len(rows["bare step, images/s"]) == 2
        assert rows["bare step, images/s"][0] == pytest.approx(
            2 * 1e3 / rows["bare step"][0]
        )
        assert rows["bare step, MFU"] == []  # no data sheet says what a CPU can do
    assert memory["peak memory of this process"][0] > 50
    for title in found:
        assert title in shown.stdout
    # What is recomputed is work of XLA, and no model FLOPs.
    plain, remat = (rows["XLA FLOPs over model FLOPs"][0] for rows in models)
    assert remat > plain


@pytest.mark.slow
@pytest.mark.tools
def test_a_recipe_gets_its_table(tmp_path):
    written = tmp_path / "table.json"
    shown = benchmark(
        *("--config", RECIPE, "--steps", 2, "--rounds", 2, "--starts", 0),
        *("--config.data.batch_size=32", "--json", written),
    )
    assert shown.returncode == 0, shown.stderr
    (rows,) = tables(written).values()
    assert set(rows) == set(OF_A_RECIPE)
    parameters, flops = vit(16, 32, tokens=4, pixels=16, classes=10)
    assert rows["parameters"] == [parameters]
    assert rows["model FLOPs of a step"] == [pytest.approx(32 * flops / 1e9)]
    for name in ("bare step", "whole loop", "whole loop over bare step"):
        assert len(rows[name]) == 2
    ratios = [a / b for a, b in zip(rows["whole loop"], rows["bare step"], strict=True)]
    assert rows["whole loop over bare step"] == pytest.approx(ratios)
    saves = rows["blocked per save, first"] + rows["blocked per save, later"]
    assert len(saves) == 2
    assert rows["start to first step, cold cache"] == []
    for name in OF_A_RECIPE:
        assert name in shown.stdout


@pytest.mark.slow
@pytest.mark.tools
def test_starts_are_those_of_the_real_program(tmp_path):
    written = tmp_path / "table.json"
    shown = benchmark(
        *("--config", RECIPE, "--steps", 1, "--rounds", 1, "--starts", 1),
        *("--config.num_steps=30", "--json", written),
    )
    assert shown.returncode == 0, shown.stderr
    (rows,) = tables(written).values()
    assert len(rows["start to first step, cold cache"]) == 1
    assert len(rows["start to first step, warm cache"]) == 1
    assert all(
        megabytes > 100 for megabytes in rows["peak memory of a training process"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Which recipe?"),
        (("--config", "configs/quikstart.py"), "quickstart.py"),
        (("--synthetic", "--config=x"), "--synthetic knows no --config=x"),
        (("--synthetic", "--model", "S/16"), "NAME:SIZE"),
        (("--synthetic", "--model", "ViT:S/16,heads=3"), "it has width, depth"),
        (("--synthetic", "--model", "ViT:S/16,remat=all"), "none, dots, full"),
        (("--synthetic", "--dtype", "float8"), "float32, bfloat16"),
        (("--synthetic", "--rounds", "0"), "start at 1"),
        (("--against", "timm", "--dtype", "bfloat16"), "--against knows no --dtype"),
        (("--against", "keras"), "timm"),
    ],
)
def test_a_wrong_option_is_one_message(arguments, message, capsys):
    path = ROOT / "tools" / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    # The last lines of the file print these messages and exit with 1.
    with pytest.raises((ValueError, OSError, SystemExit)) as refused:
        module.main([*arguments])
    assert message in f"{refused.value}{capsys.readouterr().err}"
    assert sys.modules.pop("benchmark") is module
