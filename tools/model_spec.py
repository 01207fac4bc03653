"""Models by their names on a command line: "ViT:S/16,remat=dots"."""

import ast
import dataclasses
import enum
import functools
import importlib
import pkgutil
import typing
from typing import Any

EXAMPLE = '"ViT:S/16,attention=cudnn"'


@functools.cache
def families() -> dict[str, Any]:
    """Returns {name: class} of every model of big_vision_lite/models with sizes."""
    from big_vision_lite import models
    from big_vision_lite.types import Family

    found = {}
    for file in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        for name, kind in vars(importlib.import_module(file.name)).items():
            own = isinstance(kind, type) and kind.__module__ == file.name
            if own and Family in kind.__mro__ and kind.published:
                found[name] = kind
    return found


def published() -> list[str]:
    """Returns all published sizes, as "NAME:SIZE"."""
    return [
        f"{name}:{size}" for name, kind in families().items() for size in kind.published
    ]


def build(spec: str, *, num_classes: int | None, dtype: str = "float32") -> Any:
    """Builds "NAME:SIZE,field=value,..." with a head of `num_classes`, or without one.

    Raises:
        ValueError: no such model, size or field, or a value that the field does not
            take; names those there are.
    """
    name, *changes = spec.split(",")
    family, _, size = name.partition(":")
    if family not in families() or not size:
        raise ValueError(
            f'--model "{spec}" is not NAME:SIZE[,field=value...] with a NAME of '
            f"{', '.join(families())}, like {EXAMPLE}."
        )
    kind = families()[family]
    declared = _fields(kind)
    texts = {"dtype": dtype}
    for change in changes:
        field, _, value = change.partition("=")
        if field not in declared:
            raise ValueError(f"{family} has no {field}; it has {', '.join(declared)}.")
        texts[field] = value
    fields = {name: read(name, declared[name], text) for name, text in texts.items()}
    return kind.of(size, head=_head(num_classes), **fields)


def read(field: str, kind: Any, text: str) -> Any:
    """Turns the text of a flag into a value of the field's type."""
    if isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        if text not in list(kind):
            raise ValueError(f"{field}={text} is none of {', '.join(kind)}.")
        return kind(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{field}={text} is no value: {error}.") from error


def without_remat(model: Any) -> Any:
    """Returns the model as it computes without repeating anything."""
    if not hasattr(model, "remat"):
        return model
    return model.clone(remat=type(model.remat)("none"))


def _fields(kind: Any) -> dict[str, Any]:
    """Returns {name: type} of the fields that `of` takes; a trunk's are its own."""
    hints = typing.get_type_hints(kind)
    found = {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.name in hints}
    trunk = found.pop("trunk", None)
    return found if trunk is None else {**_fields(trunk), **found}


def _head(num_classes: int | None) -> Any:
    from big_vision_lite.models.blocks.heads import Classifier

    return None if num_classes is None else Classifier(num_classes=num_classes)
