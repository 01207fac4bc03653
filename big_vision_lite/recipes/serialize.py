"""Converts component trees to JSON and back, as stored in a run's config.json.

A component is a dataclass or a Linen module. It becomes an object with its fields and
its class; reading calls the constructors again, which repeats their checks.
"""

import dataclasses
import enum
import functools
import importlib
import json
import types
import typing
from collections.abc import Iterable
from typing import Any

from big_vision_lite import __version__
from big_vision_lite.messages import did_you_mean

CLASS = "class"
PACKAGE = "big_vision_lite"
# The throw-away module name under which ml_collections runs `--config FILE`.
RECIPE = "config_config"
# Fields that Linen adds to every module; they are no part of a description.
LINEN_FIELDS = ("parent", "name")


def to_json(component: Any, **more: Any) -> str:
    """Returns a component tree as JSON text; equal trees give equal text.

    `more` holds further top-level keys, which `from_json` ignores.
    """
    document = {"version": __version__, "config": _encode(component, "config"), **more}
    return document_text(document)


def document_text(document: dict[str, Any]) -> str:
    """Returns the JSON text of such a document."""
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def from_json(text: str, allowed_modules: Iterable[str] = ()) -> Any:
    """Returns the component tree of JSON text, rebuilt through its constructors.

    Classes come from big_vision_lite or `allowed_modules` only: a checkpoint from a
    stranger must not choose what gets imported.

    Raises:
        ValueError: a class or field is unknown, a value has the wrong type, or a
            constructor raised; the message says where.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or not {"version", "config"} <= document.keys():
        raise ValueError(f"This is no configuration of {PACKAGE}: {text[:60]!r}.")
    version = document["version"]
    try:
        return _build(document["config"], "config", (PACKAGE, *allowed_modules))
    except ValueError as error:
        if hint := newer_version(version):
            raise ValueError(f"{error}\n{hint}") from error
        raise


def newer_version(version: str) -> str:
    """Returns advice to upgrade if `version` is newer than this one, else ""."""
    if _numbers(version) <= _numbers(__version__):
        return ""
    return (
        f"It was written by big_vision_lite {version}, this is {__version__}: pip "
        f"install 'big_vision_lite>={version}'."
    )


def rebuild(component: Any, allowed_modules: Iterable[str] = ()) -> Any:
    """Returns `from_json(to_json(component))`: a validated, independent copy."""
    return from_json(to_json(component), allowed_modules)


def modules(component: Any) -> list[str]:
    """Returns the modules outside this package that `from_json` would import."""
    found: set[str] = set()

    def collect(encoded: Any) -> None:
        if isinstance(encoded, dict) and isinstance(encoded.get(CLASS), str):
            found.add(encoded[CLASS].rpartition(".")[0])
        if isinstance(encoded, dict | list):
            inside = encoded.values() if isinstance(encoded, dict) else encoded
            for value in inside:
                collect(value)

    collect(_encode(component, "config"))
    return sorted(name for name in found if name.partition(".")[0] != PACKAGE)


def fields(component: Any) -> list[dataclasses.Field]:
    """Returns the fields that describe a component."""
    found = dataclasses.fields(component)
    is_module = any(field.name == "parent" for field in found)
    return [f for f in found if not (is_module and f.name in LINEN_FIELDS)]


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """Returns the declared type of every field of a component class."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def without_none(declared: Any) -> tuple[Any, bool]:
    """Returns (X, True) for `X | None`, (X, False) for X."""
    if isinstance(declared, types.UnionType) or (
        typing.get_origin(declared) is typing.Union
    ):
        kinds = [k for k in typing.get_args(declared) if k is not type(None)]
        return kinds[0], len(kinds) < len(typing.get_args(declared))
    return declared, False


def _encode(value: Any, where: str, modules: dict[int, str] | None = None) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        if "<locals>" in kind.__qualname__ or kind.__module__ == RECIPE:
            raise ValueError(
                f"{where} is a {kind.__qualname__}, defined in the recipe itself, so "
                "that no other program could read config.json. Move the class into a "
                "module and pass --allow_module=<module>."
            )
        # One Linen module in two places of one model would tie its parameters.
        modules = {} if modules is None or not hasattr(value, "init") else modules
        if hasattr(value, "init"):
            if id(value) in modules:
                raise ValueError(
                    f"{where} and {modules[id(value)]} are the same module object, "
                    "which would tie their parameters; construct it twice."
                )
            modules[id(value)] = where
        encoded = {CLASS: f"{kind.__module__}.{kind.__qualname__}"}
        for field in fields(value):
            inner = getattr(value, field.name)
            encoded[field.name] = _encode(inner, f"{where}.{field.name}", modules)
        return encoded
    if isinstance(value, dict):
        return {k: _encode(v, f"{where}.{k}", modules) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(v, f"{where}[{i}]", modules) for i, v in enumerate(value)]
    if isinstance(value, enum.StrEnum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{where} is a {type(value).__name__}; a recipe may hold numbers, strings, "
        "booleans, None, tuples and components (dataclasses or Linen modules)."
    )


def _build(encoded: Any, where: str, allowed: tuple[str, ...]) -> Any:
    if not isinstance(encoded, dict) or not isinstance(encoded.get(CLASS), str):
        raise ValueError(f'{where}={_short(encoded)} is no component with a "{CLASS}".')
    kind = _find_class(encoded[CLASS], where, allowed)
    declared = field_types(kind)
    arguments = {}
    for name, value in encoded.items():
        if name == CLASS:
            continue
        if name not in declared:
            raise ValueError(
                f'{where}: {kind.__name__} has no field "{name}".'
                f"{did_you_mean(name, declared)}"
            )
        arguments[name] = _decode(value, declared[name], f"{where}.{name}", allowed)
    try:
        return kind(**arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _find_class(path: str, where: str, allowed: tuple[str, ...]) -> type:
    module, _, name = path.rpartition(".")
    if not any(module == a or module.startswith(f"{a}.") for a in allowed):
        raise ValueError(
            f'{where} needs the class "{path}" from outside {PACKAGE}. If you trust '
            f"it: --allow_module={module}"
        )
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise ValueError(f'{where}: there is no class "{path}".') from None
    if not dataclasses.is_dataclass(kind):
        raise ValueError(f'{where}: "{path}" is no component.')
    return typing.cast(type, kind)


def _decode(value: Any, declared: Any, where: str, allowed: tuple[str, ...]) -> Any:
    kind, optional = without_none(declared)
    if value is None:
        if optional:
            return None
        raise ValueError(f"{where} may not be none; it is a {_word(kind)}.")
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, list):
        item = typing.get_args(kind)[0]
        return tuple(
            _decode(v, item, f"{where}[{i}]", allowed) for i, v in enumerate(value)
        )
    if origin is dict and isinstance(value, dict):
        item = typing.get_args(kind)[1]
        return {k: _decode(v, item, f"{where}.{k}", allowed) for k, v in value.items()}
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        if value in list(kind):
            return kind(value)
        raise ValueError(f"{where}={value!r}; allowed: {', '.join(kind)}.")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (bool, int, float, str):
        if type(value) is kind:
            return value
    elif isinstance(value, dict) and CLASS in value:
        built = _build(value, where, allowed)
        if isinstance(built, kind):
            return built
    raise ValueError(
        f"{where}={_short(value)} is not {_word(kind)}. Overrides go as --{where}=VALUE"
    )


def _short(value: Any) -> str:
    if isinstance(value, dict) and CLASS in value:
        return value[CLASS].rpartition(".")[2]
    return repr(value)


def _word(kind: Any) -> str:
    name = getattr(kind, "__name__", None) or str(kind)
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
