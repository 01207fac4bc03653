"""The tree shows the architecture: who imports whom, and how long a file may be."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "big_vision_lite"
FILES = sorted(PACKAGE.rglob("*.py"))

# Rooms and root files: each imports only what stands in lines above its own.
ARROWS = (PACKAGE / "README.md").read_text().split("```arrows\n")[1].split("```")[0]
LINES = [line.split() for line in ARROWS.strip().splitlines()]
PLACE = {name: place for place, names in enumerate(LINES) for name in names}
# A file is a noun, whole. In these rooms a short one is, too.
LONGEST, SHORTEST = 400, 60
SHORT = ("objectives", "evaluators", "models", "conversion/families", "data/sources")
# In data/ only these may import jax: ops run in worker threads and processes.
JAX_IN_DATA = {"data/pipeline", "data/ops/device"}
# What looks into the modules of a model: for its parameters, or its first bad tensor.
LINEN = {"models", "training", "config", "runs/health"}
# What a backend's file may do: kernels have gradients of their own, the CPU's file
# talks to malloc and to XLA:CPU.
TRICKS = ("custom_vjp", "optimization_barrier", "mallopt", "xla_cpu")


def module_of(path: pathlib.Path) -> str:
    return str(path.relative_to(PACKAGE).with_suffix(""))


def room(module: str) -> str:
    return module.split("/")[0]


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
    """Lists the modules of the package that a file imports, as module_of does."""
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


def test_imports_follow_the_arrows():
    wrong = [
        f"{module_of(path)} -> {other}"
        for path in FILES
        if module_of(path) != "__init__"
        for other in sorted(own_imports(path))
        if room(other) != room(module_of(path))
        and PLACE[room(other)] >= PLACE[room(module_of(path))]
    ]
    assert not wrong, wrong


def test_the_line_names_all_rooms_and_root_files():
    there = {room(module_of(path)) for path in FILES} - {"__init__"}
    assert there == set(PLACE)
    assert len(list(PACKAGE.glob("*.py"))) <= 1 + 9


def test_evaluators_do_not_train_but_one():
    training = {
        module_of(path)
        for path in FILES
        if room(module_of(path)) == "evaluators" and "train" in own_imports(path)
    }
    assert training <= {"evaluators/finetune"}


def test_a_file_is_a_noun_whole():
    importers: dict[str, set[str]] = {}
    for path in FILES:
        for other in own_imports(path):
            importers.setdefault(other, set()).add(module_of(path))
    fragments = {}
    for path in FILES:
        module, count = module_of(path), len(path.read_text().splitlines())
        assert count <= LONGEST, f"{module} has {count} lines; split it by nouns"
        names = {"utils", "misc", "base", "registry", "helpers", "common"}
        assert path.stem not in names and not {"trainers", "projects"} & set(path.parts)
        if path.stem == "__init__" or module.startswith(SHORT):
            continue
        if count < SHORTEST and len(importers.get(module, set())) == 1:
            fragments[module] = importers[module]
    assert not fragments, f"merge these into their importers: {fragments}"


def test_only_the_pipeline_of_data_imports_jax():
    using = {
        module_of(path)
        for path in (PACKAGE / "data").rglob("*.py")
        if "jax" in {name.split(".")[0] for name in imports(path)}
    }
    assert using <= JAX_IN_DATA


def test_only_models_and_what_trains_them_know_linen():
    for path in FILES:
        module = module_of(path)
        if not {module, room(module)} & LINEN:
            assert not any(name.startswith("flax") for name in imports(path)), module


def test_no_file_imports_tensorflow_torch_or_pandas():
    for path in FILES:
        roots = {name.split(".")[0] for name in imports(path)}
        # Only torch opens its own archives, and only when one is given.
        allowed = {"torch"} if module_of(path) == "conversion/files" else set()
        foreign = {"tensorflow", "torch", "timm", "pandas", "pickle"} - allowed
        assert not roots & foreign, module_of(path)


def test_every_file_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), module_of(path)


def test_every_folder_is_a_package():
    # A wheel would leave it out otherwise.
    for folder in {path.parent for path in FILES}:
        assert (folder / "__init__.py").exists(), folder


def test_tricks_for_a_backend_stay_in_its_file():
    for path in FILES:
        if module_of(path) == "runtime/cpu" or "kernels" in path.parts:
            continue
        text = path.read_text()
        assert not [trick for trick in TRICKS if trick in text], module_of(path)
