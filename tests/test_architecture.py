"""The tree shows the architecture: who imports whom, and how long a file may be."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "big_vision_lite"
FILES = sorted(PACKAGE.rglob("*.py"))

# Lowest row first: a module may import from lower rows, or from its own group. The
# groups of one row never import each other.
ROWS = (
    ({"wording"},),
    ({"types"}, {"trees"}, {"files"}, {"cores"}, {"runtime", "flops"}),
    ({"layout"}, {"processes"}),
    (
        {"schedules", "optimizers"},
        {"sharding"},
        {"models"},
        {"data"},
        {"metrics"},
        {"console", "progress", "clocks", "profiler"},
        {"serialize"},
        {"stop"},
        {"log_lines"},
    ),
    ({"objectives"}, {"state"}, {"conversion"}),
    (
        {"bound_model", "step", "accumulation"},
        {
            "integrity",
            "step_folder",
            "checkpoint",
            "adapt",
            "resample",
            "loaded_weights",
        },
    ),
    ({"evaluators"},),
    (
        {"config", "recipe_args", "mistakes", "command_line", "devices"},
        {"__init__"},
    ),
    (
        {
            "environment",
            "run_folder",
            "program",
            "estimate",
            "compile_process",
            "fitting",
            "evaluation",
            "diagnose",
            "monitor",
            "dry_run",
            "saved_run",
            "imported",
            "start",
            "hyperrule",
        },
    ),
    ({"plan"}, {"train"}, {"evaluate"}, {"predict", "predictions"}),
)
# finetune trains; train imports no evaluator, so there is no circle.
EXCEPTIONS = {
    ("evaluators/finetune", name) for name in ("train", "config", "hyperrule")
}
# In data/ only these may import jax: ops run in worker threads and processes.
JAX_IN_DATA = {"pipeline", "device_ops", "stream"}
# diagnose looks into every module of a model for the first bad tensor.
LINEN = {"models", "bound_model", "step", "state", "config", "diagnose"}


def module_of(path: pathlib.Path) -> str:
    return str(path.relative_to(PACKAGE).with_suffix(""))


def top(module: str) -> str:
    return module.split("/")[0]


def place(module: str) -> tuple[int, int]:
    for row, groups in enumerate(ROWS):
        for index, group in enumerate(groups):
            if top(module) in group:
                return row, index
    raise AssertionError(f"{module} has no place in ROWS: give it one")


def imports(path: pathlib.Path) -> set[str]:
    """Lists the dotted names a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports out in full"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def own_imports(path: pathlib.Path) -> set[str]:
    found = set()
    for name in imports(path):
        if not name.startswith("big_vision_lite."):
            continue
        parts = name.split(".")[1:]
        for length in (len(parts), len(parts) - 1):
            candidate = "/".join(parts[:length])
            if candidate and (PACKAGE / f"{candidate}.py").exists():
                found.add(candidate)
            elif candidate and (PACKAGE / candidate).is_dir():
                found.add(f"{candidate}/__init__")
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_follow_the_arrows(path):
    module = module_of(path)
    row, group = place(module)
    for other in sorted(own_imports(path)):
        if (module, other) in EXCEPTIONS or top(other) == top(module):
            continue
        other_row, other_group = place(other)
        same_group = (row, group) == (other_row, other_group)
        assert other_row < row or same_group, f"{module} may not import {other}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_are_short_and_named_by_a_noun(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 400, f"{module_of(path)} has {lines} lines; split it by nouns"
    assert path.stem not in {"utils", "misc", "base", "registry", "helpers", "common"}
    assert not {"trainers", "projects"} & set(path.parts)


@pytest.mark.parametrize("path", sorted((PACKAGE / "data").glob("*.py")), ids=module_of)
def test_only_the_pipeline_of_data_imports_jax(path):
    if path.stem not in JAX_IN_DATA:
        roots = {name.split(".")[0] for name in imports(path)}
        assert "jax" not in roots


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_models_and_the_step_know_linen(path):
    if top(module_of(path)) not in LINEN:
        assert not any(name.startswith("flax") for name in imports(path))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_imports_tensorflow_torch_or_pandas(path):
    roots = {name.split(".")[0] for name in imports(path)}
    # Only torch opens its own archives, and only when one is given.
    allowed = {"torch"} if module_of(path) == "conversion/weights" else set()
    assert not roots & {"tensorflow", "torch", "timm", "pandas", "pickle"} - allowed


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())), module_of(path)


def test_the_table_names_only_files_that_exist():
    named = {name for groups in ROWS for group in groups for name in group}
    there = {top(module_of(path)) for path in FILES}
    assert named - there <= {"conversion", "files"}


# What a backend's file may do: kernels have gradients of their own, the CPU's file
# talks to malloc and to XLA:CPU.
TRICKS = ("custom_vjp", "optimization_barrier", "mallopt", "xla_cpu")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_tricks_for_a_backend_stay_in_its_file(path):
    if module_of(path) == "runtime/cpu" or "kernels" in path.parts:
        return
    text = path.read_text()
    assert not [trick for trick in TRICKS if trick in text]
