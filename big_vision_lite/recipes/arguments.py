"""Parses a recipe's argument: `--config configs/NAME.py:size=32,init=runs/first`."""

import enum
import re
import types
from typing import Any

from big_vision_lite.messages import did_you_mean

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def parse_arg(arg: str, **defaults: Any) -> types.SimpleNamespace:
    """Returns a namespace of "name=value,name=value", values typed by their defaults.

    A default that is a type (`data=str`) makes the name required. Values may hold
    commas, as long as no ",word=" follows one.

    Raises:
        ValueError: a name is unknown, repeated or missing, or a value has the wrong
            type.
    """
    parts = re.split(r",(?=\s*\w+\s*=)", arg) if arg.strip() else []
    values: dict[str, Any] = {}
    for part in parts:
        name, equals, text = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(
                f'The argument "{arg}" of the recipe is not of the form name=value. '
                f"{_known(defaults)}"
            )
        if name not in defaults:
            raise ValueError(
                f'The recipe has no argument "{name}".'
                f"{did_you_mean(name, defaults)} {_known(defaults)}"
            )
        if name in values:
            raise ValueError(f'The argument "{name}" is given twice in "{arg}".')
        default = defaults[name]
        kind = default if isinstance(default, type) else type(default)
        values[name] = _convert(name, text, kind)
    missing = [
        name
        for name, default in defaults.items()
        if isinstance(default, type) and name not in values
    ]
    if missing:
        example = ",".join(f"{name}=..." for name in missing)
        raise ValueError(
            f"The recipe needs {' and '.join(missing)}: --config FILE.py:{example} "
            f"{_known(defaults)}"
        )
    return types.SimpleNamespace(**{**defaults, **values})


def _convert(name: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return _BOOLEANS[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        allowed = "true or false" if kind is bool else f"of type {kind.__name__}"
        if issubclass(kind, enum.StrEnum):
            allowed = f"one of {', '.join(kind)}"
        raise ValueError(
            f'The argument {name}="{text}" of the recipe is not {allowed}.'
        ) from None


def _known(defaults: dict[str, Any]) -> str:
    if not defaults:
        return "It takes no arguments."
    shown = [
        f"{name} (required)"
        if isinstance(default, type)
        else f"{name}={str(default).lower() if default in (True, False) else default}"
        for name, default in defaults.items()
    ]
    return f"Its arguments: {', '.join(shown)}."
