"""Every recipe builds, is what it was when it was last looked at, and takes two steps.

After a wanted change: UPDATE_GOLDEN=1 pytest tests/test_recipes.py, and look at the
difference.
"""

import os
import pathlib

import pytest

from big_vision_lite import command_line, mistakes, serialize, train

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = pathlib.Path(__file__).parent / "golden"
ARGUMENTS = {
    "quickstart": ("",),
    "fashion_mnist": ("", "epochs=10"),
    "glyphs": ("", "model=vit"),
    "vit_s16_i1k": ("", "fewshot=true"),
    "bit_i1k": ("",),
}
CASES = [(name, arg) for name, args in ARGUMENTS.items() for arg in args]


def parse(name: str, arg: str, *overrides: str):
    recipe = f"{ROOT}/configs/{name}.py" + (f":{arg}" if arg else "")
    command = ["train", f"--config={recipe}", *overrides]
    return command_line.parse(command, train.define_flags).config


def without_version(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if '"version"' not in line)


@pytest.mark.parametrize("name, arg", CASES)
def test_a_recipe_resolves_to_what_is_checked_in(name, arg):
    resolved = without_version(serialize.to_json(parse(name, arg))) + "\n"
    golden = GOLDEN / (f"{name}_{arg.replace('=', '_')}" if arg else name)
    golden = golden.with_suffix(".json")
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(resolved)
    assert resolved == golden.read_text(), f"look at the change, then update {golden}"


@pytest.mark.parametrize("name, arg", CASES)
def test_a_recipe_survives_json_and_back(name, arg):
    config = parse(name, arg)
    text = serialize.to_json(config)
    assert serialize.to_json(serialize.from_json(text)) == text


@pytest.mark.parametrize("name, arg", CASES)
def test_every_leaf_of_a_recipe_can_be_overridden(name, arg):
    """Overriding each leaf by its own value gives the same recipe."""
    config = parse(name, arg)
    overrides = [
        f"--config.{path}={text}"
        for path, value, _ in mistakes.list_leaves(config)
        if (text := as_flag(value)) is not None
    ]
    assert len(overrides) > 30
    assert serialize.to_json(parse(name, arg, *overrides)) == serialize.to_json(config)


def as_flag(value) -> str | None:
    """Writes a value as a user would type it; None where there is nothing to type."""
    if isinstance(value, dict) or value == ():
        return None
    return "none" if value is None else str(value)


def test_every_recipe_is_listed_here_or_tested_with_its_own_data():
    there = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert there - set(ARGUMENTS) <= {"finetune", "folder"}
