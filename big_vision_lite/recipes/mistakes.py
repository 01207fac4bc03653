"""Explains mistakes in recipes and overrides: where they are and what was meant."""

import ast
import dataclasses
import difflib
import enum
import pathlib
import re
import shlex
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections.config_flags import config_flags, config_path

from big_vision_lite.messages import did_you_mean
from big_vision_lite.recipes import serialize

# What a path raises that leads nowhere, or is none.
WRONG_PATH = (KeyError, IndexError, AttributeError, TypeError)


def explain(
    error: Exception,
    recipe: str | None,
    argv: Sequence[str],
    values: flags.FlagValues,
    recorded: Any = None,
) -> str:
    """Returns one message for an error raised while parsing.

    `recorded` is the overridden configuration if there is no recipe.
    """
    mistake = _mistake_in_recipe(error, recipe)
    if mistake is not None:
        return mistake
    if isinstance(error, flags.UnrecognizedFlagError):
        return _unknown_flag(error.flagname, values)
    no_path = str(error).startswith("Could not parse '")  # such as a.0.b
    if no_path or isinstance(error, WRONG_PATH):
        return unknown_key(recipe, argv, error, recorded)
    return _wrong_value(recipe, argv, recorded) or str(error)


def _wrong_value(recipe: str | None, argv: Sequence[str], recorded: Any) -> str | None:
    """Returns the allowed values of the first override with a wrong value."""
    config = recorded if recipe is None else load(recipe)
    leaves = {} if config is None else {p: (v, t) for p, v, t in list_leaves(config)}
    for word in argv:
        found = re.fullmatch(r"--?config\.([^=]+)=(.*)", word)
        if found is None:
            continue
        path, text = found.groups()
        if path in leaves and (part := _part_of(leaves[path][1])) and text != "build":
            return (
                f"--config.{path}={text}: {path} is a component, none in the recipe; "
                f"give what it holds: --config.{path}.{part}={text}"
            )
        if path in leaves and not _fits(text, leaves[path][1]):
            value, declared = leaves[path]
            return (
                f"--config.{path}={text} is not {_words(declared)}. The recipe has "
                f"--config.{path}={_shown(value)}"
            )
        inside = [leaf for leaf in leaves if leaf.startswith((f"{path}.", f"{path}["))]
        if inside and text != "build":
            return (
                f"--config.{path} is a component: choose it in the recipe, and "
                f"override what it holds, for example --config.{inside[0]}="
                f"{_shown(leaves[inside[0]][0])}"
            )
    return None


def check_tuples(argv: Sequence[str], config: Any) -> None:
    """Raises ValueError for an override of a tuple that could be one value or several.

    ml_collections takes what is no Python literal for a single string, commas and all.
    """
    leaves = {path: declared for path, _, declared in list_leaves(config)}
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        name, given, text = word.partition("=")
        found = re.fullmatch(r"--?config\.(.+)", name)
        kind = serialize.without_none(leaves.get(found.group(1)))[0] if found else None
        if typing.get_origin(kind) is not tuple:
            continue
        text = text if given else after
        item, parts = typing.get_args(kind)[0], _split(text)
        try:
            clear = not isinstance(ast.literal_eval(text), dict | set)
        except (ValueError, SyntaxError, TypeError):
            # A pattern or a name is one string.
            clear = len(parts) < 2 and "," not in text and _balanced(text)
        if clear:
            continue
        if item is str:
            readings = dict.fromkeys([_typed(name, parts), _typed(name, [text])])
            what, type_this = "one string or several", " or, for one, ".join(readings)
        else:
            numbers = [part for part in parts if re.fullmatch(r"-?[\d.]+", part)]
            what = f"{item.__name__}s with commas between"
            type_this = f"{name}={','.join(numbers) or '1,2'}"
        raise ValueError(f"{name}={text} is not clearly {what}: type {type_this}")


def _split(text: str) -> list[str]:
    """Splits at commas and spaces; brackets and quotes around the parts come off."""
    inner = text.strip() if _balanced(text) else text.strip(" ()[]{}")
    if inner[:1] + inner[-1:] in ("()", "[]"):
        inner = inner[1:-1]
    return [part.strip("'\"") for part in re.split(r"[,\s]+", inner) if part]


def _balanced(text: str) -> bool:
    pairs = all(text.count(a) == text.count(b) for a, b in ("()", "[]", "{}"))
    return pairs and text.count("'") % 2 == text.count('"') % 2 == 0


def _typed(name: str, parts: Sequence[str]) -> str:
    """Returns the flag with a tuple as a shell takes it."""
    literal = repr(tuple(parts))
    plain = not set(literal) & set('"$`\\!')
    return f"{name}=" + (f'"{literal}"' if plain else shlex.quote(literal))


def _part_of(declared: Any) -> str | None:
    """Returns the first field of a component's class, None if it is no component.

    For a tuple of components, returns the first field of its elements.
    """
    kind, _ = serialize.without_none(declared)
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return next(iter(serialize.field_types(kind)), None)
    return None


def _fits(text: str, declared: Any) -> bool:
    kind, _ = serialize.without_none(declared)
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        return text.lower() in [name.lower() for name in kind]
    if kind is bool:
        return text.lower() in ("true", "false", "t", "f", "1", "0")
    try:
        kind(text)
    except ValueError:
        return False
    except TypeError:  # tuples: ml_collections knows their items
        return True
    return True


def _words(declared: Any) -> str:
    kind, optional = serialize.without_none(declared)
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        words = f"one of {', '.join(kind)}"
    else:
        name = getattr(kind, "__name__", str(kind))
        words = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return f"{words} or none" if optional else words


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _mistake_in_recipe(error: BaseException | None, recipe: str | None) -> str | None:
    """Returns a message with the line of the recipe that raised, None if none did."""
    if recipe is None:
        return None
    file = recipe.split(":", 1)[0]
    while error is not None:
        # Of the recipe, or of what it imports; "<unknown>" is the text of a flag.
        if isinstance(error, SyntaxError) and error.filename != "<unknown>":
            return f"{error.filename}:{error.lineno}: {error.msg}"
        if isinstance(error, AttributeError) and "'get_config'" in str(error):
            return (
                f"{file} has no function get_config(arg), which returns the "
                "configuration: it is no recipe. See configs/quickstart.py"
            )
        frames = list(traceback.walk_tb(error.__traceback__))
        inside = [(f, line) for f, line in frames if f.f_code.co_filename == file]
        if inside:
            frame, line = inside[-1]
            return f"{file}:{line}: {error}{_meant_field(error, frame.f_globals)}"
        error = error.__cause__ or error.__context__
    return None


def _meant_field(error: BaseException, names: dict[str, Any]) -> str:
    """Suggests a field after "Stream.__init__() got an unexpected keyword argument"."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected .*'(\w+)'", str(error))
    if found is None:
        return ""
    kinds = [v for v in names.values() if isinstance(v, type)]
    kinds += [
        kind
        for module in names.values()
        if isinstance(module, types.ModuleType)
        for kind in vars(module).values()
        if isinstance(kind, type)
    ]
    for kind in kinds:
        if kind.__name__ == found.group(1) and dataclasses.is_dataclass(kind):
            known = [field.name for field in serialize.fields(kind)]
            meant = did_you_mean(found.group(2), known)
            return f".{meant} Fields: {', '.join(known)}."
    return ""


def _unknown_flag(name: str, values: flags.FlagValues) -> str:
    if name.startswith("config."):
        return (
            f"--{name} needs a recipe before it: --config configs/NAME.py --{name}=..."
        )
    known = [n for n in values if values[n].help]
    close = difflib.get_close_matches(name, known, n=1)
    meant = f" Did you mean --{close[0]}?" if close else ""
    return (
        f"There is no flag --{name}.{meant} Flags: "
        f"{', '.join(f'--{n}' for n in sorted(known))}; overrides of the recipe go as "
        "--config.optimizer.weight_decay=0.1."
    )


def unknown_key(
    recipe: str | None, argv: Sequence[str], error: Exception, recorded: Any = None
) -> str:
    """Returns a message: the wrong key of an override, the closest one and its line."""
    config = recorded if recipe is None else load(recipe)
    if config is None:
        return str(error)
    known = []
    for leaf, value, declared in list_leaves(config):
        kind, _ = serialize.without_none(declared)
        if value == ():
            leaf, kind = f"{leaf}[0]", (*typing.get_args(kind), None)[0]
        if value in (None, ()) and dataclasses.is_dataclass(kind):
            known += [f"{leaf}.{name}" for name in serialize.field_types(kind)]
        known.append(leaf)
    for word in argv:
        found = re.match(r"--?(?:no)?config\.([^=]*)", word)
        if found is None:
            continue
        path = found.group(1)
        try:
            config_path.get_value(path, config)
        except (*WRONG_PATH, ValueError):
            if path in known and isinstance(error, IndexError):
                return (
                    f"--config.{path}: {path.rpartition('[')[0]} is empty; put an "
                    "element into the recipe."
                )
            if path in known:
                continue
            if isinstance(error, IndexError) and (counted := _too_far(path, known)):
                return counted
            meant = _closest(path, known)
            where = _line_of(recipe, meant) if meant and recipe else ""
            hint = f" Did you mean {meant}{where}?" if meant else ""
            names = ", ".join(f.name for f in serialize.fields(config))
            return (
                f'No config key "{path}".{hint} Overrides go as '
                f"--config.{meant or 'optimizer.weight_decay'}=VALUE. At the top: "
                f"{names}."
            )
    return f"{type(error).__name__}: {error}"


def _too_far(path: str, known: Sequence[str]) -> str | None:
    """Returns a message with the number of elements if an index is too high."""
    for found in re.finditer(r"\[(\d+)\]", path):
        whole = path[: found.start()]
        given = [re.match(rf"{re.escape(whole)}\[(\d+)\]", name) for name in known]
        count = 1 + max((int(match.group(1)) for match in given if match), default=-1)
        if int(found.group(1)) >= count > 0:
            return (
                f'No config key "{path}": {whole} has {count}, counted from 0: '
                f"{whole}[0] to {whole}[{count - 1}]."
            )
    return None


def _closest(path: str, known: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    last = re.split(r"[.\[]", path)[-1]
    ends = {re.split(r"[.\[]", leaf)[-1]: leaf for leaf in reversed(known)}
    close = difflib.get_close_matches(last, list(ends), n=1, cutoff=0.6)
    return ends[close[0]] if close else None


def _line_of(recipe: str, path: str) -> str:
    file = recipe.split(":", 1)[0]
    name = re.split(r"[.\[]", path)[-1]
    for number, line in enumerate(pathlib.Path(file).read_text().splitlines(), 1):
        if re.search(rf"\b{re.escape(name)}\s*=", line):
            return f" ({file}:{number})"
    return ""


def load(recipe: str) -> Any:
    """Returns the configuration of a recipe FILE[:arg], without overrides."""
    return config_flags.ConfigFileFlagParser(name="config").parse(recipe)


def list_leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (path, value, declared type) of every field that a flag can override."""
    for field in serialize.fields(config):
        value = getattr(config, field.name)
        declared = serialize.field_types(type(config))[field.name]
        yield from _leaves(value, declared, f"{prefix}{field.name}")


def _leaves(value: Any, declared: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    kind, _ = serialize.without_none(declared)
    if dataclasses.is_dataclass(value):
        yield from list_leaves(value, f"{path}.")
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, typing.get_args(kind)[1], f"{path}.{key}")
    elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        for index, inner in enumerate(value):
            yield from _leaves(inner, typing.get_args(kind)[0], f"{path}[{index}]")
    else:
        yield path, value, declared
