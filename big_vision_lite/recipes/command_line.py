"""Parses command lines with recipes and overrides, and reports mistakes."""

import contextlib
import dataclasses
import datetime
import enum
import errno
import importlib
import io
import os
import pathlib
import re
import sys
import tempfile
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections.config_flags import config_flags, config_path

from big_vision_lite.messages import did_you_mean
from big_vision_lite.recipes import mistakes, serialize
from big_vision_lite.runtime import files, startup
from big_vision_lite.runtime.processes import Stopped

# Errors the user can fix: shown as one message, with the trace in a file.
# In the run's folder: the traces of errors, removed when a run ends well.
TRACE_FILE = "error.txt"
USER_ERRORS = (ValueError, OSError, FloatingPointError, ImportError, flags.Error)


@dataclasses.dataclass(kw_only=True)
class Command:
    """A parsed command line: the rebuilt configuration (or None) and other flags."""

    config: Any
    recipe: str | None
    flags: flags.FlagValues


def parse(
    argv: Sequence[str],
    define: Callable[[flags.FlagValues], None],
    *,
    about: str = "",
    recorded: Callable[[str, Sequence[str]], Any] | None = None,
) -> Command:
    """Parses `--config FILE[:arg] --config.a.b=value` and the flags `define` adds.

    The configuration is rebuilt once through its constructors, so the run matches
    config.json exactly. `about` is shown above the flags by --help. Without --config,
    `recorded(workdir, allowed_modules)` may return the configuration recorded in
    --workdir.

    Raises:
        ValueError: a name is unknown (the message suggests the closest) or a value
            invalid.
        SystemExit: --help was asked for, and is printed.
    """
    # ml_collections runs every recipe in one module, which keeps the last one's names.
    sys.modules.pop(serialize.RECIPE, None)
    values = flags.FlagValues()
    define(values)
    flags.DEFINE_multi_string(
        "allow_module",
        [],
        "A module of your own whose components a recipe may use.",
        flag_values=values,
    )
    if any(word in ("--help", "-help", "-h") for word in argv[1:]):
        print(_help(about, values))
        raise SystemExit(0)
    argv, emptied, cleared = _take_none(argv)
    recipe = _recipe(argv)
    modules = _flag_values(argv, "allow_module")
    for module in modules:
        _import(module)
    workdir = _flag_values(argv, "workdir")
    known = None
    if recorded is not None and recipe is None and workdir:
        known = recorded(workdir[-1], modules)
    try:
        if recipe is not None:
            known, argv = _load(recipe, modules), _without(argv, "config")
        if known is not None:
            for path in emptied:
                _clear(known, path, recipe)
            argv = _make_elements(_build_missing(argv, known), known)
            mistakes.check_tuples(argv, known)
            config_flags.DEFINE_config_dataclass(
                "config", known, flag_values=values, sys_argv=list(argv)
            )
        else:
            config_flags.DEFINE_config_file(
                "config", help_string="Recipe.", flag_values=values, sys_argv=list(argv)
            )
        rest = values(list(argv))
    except Exception as error:
        recorded_only = known if recipe is None else None
        message = mistakes.explain(error, recipe, argv, values, recorded_only)
        raise ValueError(message) from error
    if len(rest) > 1:
        raise ValueError(
            f'What is "{rest[1]}"? Flags go as --name=value; overrides as '
            "--config.optimizer.weight_decay=0.1."
        )
    config = values["config"].value
    if config is None:
        return Command(config=None, recipe=None, flags=values)
    for path in cleared:
        _clear(config, path, recipe)
    return Command(
        config=serialize.rebuild(config, modules),
        recipe=recipe,
        flags=values,
    )


def run(
    main: Callable[[Sequence[str]], None],
    argv: Sequence[str],
    *,
    trace_flag: str | None = None,
) -> int:
    """Calls `main(argv)`, prints a user's mistake as one message; returns exit code.

    The trace goes into the folder given by `trace_flag`, if this program writes there,
    else into a temporary file.
    """
    startup.quiet()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name of a file that is not UTF-8 ends no program that prints it.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(argv)
        return 0
    except Stopped as stopped:
        print(stopped)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        where = _write_trace(argv, trace_flag)
        print(f"\nerror: {_said(error)}\n(the trace is in {where})", file=sys.stderr)
        return 1


def _said(error: BaseException) -> str:
    """Returns the message; of the system's own about a path, with what to do."""
    if not isinstance(error, OSError) or error.errno is None or not error.filename:
        return str(error)
    path = os.fsencode(error.filename).decode("utf-8", "backslashreplace")
    remedies = {
        errno.EACCES: f"Give yourself the right to it, chmod u+rwX {path}, or name",
        errno.ENAMETOOLONG: "A name has at most 255 bytes; name",
        errno.ENOSPC: "Free the disk, or name",
    }
    remedy = remedies.get(error.errno, "Check the path, or name")
    return f"{path}: {error.strerror}. {remedy} another."


def _take_none(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Splits off `--config.a.b=none`: ml_collections would parse "none" as a number.

    Of several values for one name the last one counts, as for all flags. Returns the
    other words, the paths to clear before them (the words fill them again) and after.
    """
    kept: list[str] = []
    first: dict[str, None] = {}
    last: dict[str, None] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        name, given, value = word.partition("=")
        found = re.fullmatch(r"--?config\.(.+)", name)
        if found and not given and words and words[0].lower() == "none":
            value = words.pop(0)
        if found and value.lower() == "none":
            last[found.group(1)] = None
            continue
        if found:
            last.pop(found.group(1), None)
            for path in list(last):
                if found.group(1).startswith((f"{path}.", f"{path}[")):
                    first[path] = last.pop(path)
        kept.append(word)
    return kept, list(first), list(last)


def _build_missing(argv: Sequence[str], config: Any) -> list[str]:
    """Adds `--config.ema=build` before `--config.ema.start=0.9` if ema is none."""
    types = serialize.field_types(type(config))
    words: list[str] = []
    for word in argv:
        found = re.match(r"--?config\.(\w+)\.", word)
        name = found.group(1) if found else ""
        built = f"--config.{name}=build"
        # Before the first part, which it would overwrite.
        if name in types and getattr(config, name) is None and built not in words:
            words.append(built)
        words.append(word)
    return words


def _make_elements(argv: Sequence[str], config: Any) -> list[str]:
    """Adds to `config` the tuple elements whose fields are overridden.

    `--config.init.path=RUN` sets the only element of the tuple `init` and adds it if
    there is none; `--config.init[1].path=RUN` adds a second one.

    Raises:
        ValueError: an override has no index among several, or sets a whole element.
    """
    types = serialize.field_types(type(config))
    parts = {name: _part_of_tuple(declared) for name, declared in types.items()}
    named = [re.match(r"--?config\.(\w+)(?:\[(\d+)\])?(.?)", word) for word in argv]
    words: list[str] = []
    counts = {name: len(getattr(config, name)) for name, part in parts.items() if part}
    for index, (word, found) in enumerate(zip(argv, named, strict=True)):
        name = found.group(1) if found else ""
        if found is None or name not in counts:
            words.append(word)
            continue
        rest, part = word[found.end() :], parts[name]
        if found.group(3) != ".":
            value = rest if found.group(3) else "".join(argv[index + 1 : index + 2])
            field = next(iter(serialize.field_types(part)))
            raise ValueError(
                f"{word}: {name} is a component; give what it holds: "
                f"--config.{name}.{field}={value}"
            )
        wanted = {int(n.group(2) or 0) for n in named if n and n.group(1) == name}
        while len(getattr(config, name)) in wanted:
            setattr(config, name, (*getattr(config, name), part()))
        if found.group(2) is None:
            # Counted before the overrides: those that they add have an index.
            _check_one(max(1, counts[name]), name, word)
            word = f"--config.{name}[0].{rest}"
        words.append(word)
    return words


def _check_one(count: int, name: str, word: str) -> None:
    """Raises an error for an unindexed override of a tuple without exactly one item."""
    if count != 1:
        _, _, rest = word.partition(f"config.{name}.")
        raise ValueError(
            f"{word}: {name} has {count} elements; name one, for example "
            f"--config.{name}[0].{rest}"
        )


def _part_of_tuple(declared: Any) -> Any:
    """Returns the class of a tuple's elements if it needs no arguments, else None."""
    kind, _ = serialize.without_none(declared)
    part = (
        (*typing.get_args(kind), None)[0] if typing.get_origin(kind) is tuple else None
    )
    if not (isinstance(part, type) and dataclasses.is_dataclass(part)):
        return None
    missing = dataclasses.MISSING
    optional = (
        field.default is not missing or field.default_factory is not missing
        for field in dataclasses.fields(part)
    )
    return part if all(optional) else None


def _clear(config: Any, path: str, recipe: str | None) -> None:
    name, dot, rest = path.partition(".")
    declared = serialize.field_types(type(config)).get(name)
    if dot and _part_of_tuple(declared) is not None:
        _check_one(len(getattr(config, name)), name, f"--config.{path}=none")
        path = f"{name}[0].{rest}"
    try:
        declared = config_path.get_type(path, config, normalize=False)
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            mistakes.unknown_key(recipe, [f"--config.{path}=none"], error)
        ) from error
    kind, optional = serialize.without_none(declared)
    if optional:
        config_path.set_value(path, config, None)
    elif _part_of_tuple(declared) is not None:
        config_path.set_value(path, config, ())
    elif (
        isinstance(kind, type)
        and issubclass(kind, enum.StrEnum)
        and "none" in list(kind)
    ):
        config_path.set_value(path, config, kind("none"))
    else:
        raise ValueError(
            f"--config.{path}=none: {path} is a {getattr(kind, '__name__', kind)} and "
            "may not be none."
        )


def _recipe(argv: Sequence[str]) -> str | None:
    given = _flag_values(argv, "config")
    if not given:
        return None
    path = pathlib.Path(given[-1].split(":", 1)[0])
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else pathlib.Path("configs")
        recipes = sorted(str(p) for p in folder.glob("*.py"))
        raise FileNotFoundError(
            f'There is no recipe "{path}".{did_you_mean(str(path), recipes)} '
            f"Recipes there: {', '.join(recipes) or 'none'}."
        )
    if path.suffix != ".py":
        raise ValueError(
            f"{path} is no recipe: that is a Python file, NAME.py, with a function "
            "get_config(arg). For example: --config configs/quickstart.py"
        )
    return given[-1]


def _load(recipe: str, modules: Sequence[str]) -> Any:
    """Returns a recipe's configuration with no object shared between two places.

    A recipe may use one object in two places; an override must change only one.
    """
    config = mistakes.load(recipe)
    # ml_collections mistakes an OSError of the recipe for a missing recipe, and raises
    # it only when the configuration is used.
    if hasattr(type(config), "_ReportError") and (hidden := vars(config).get("_error")):
        raise hidden
    return serialize.rebuild(config, modules)


def _without(argv: Sequence[str], name: str) -> list[str]:
    """Returns `argv` without `--name=value` and `--name value`."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in (f"--{name}", f"-{name}"):
            next(words, None)
        elif not re.match(rf"--?{name}=", word):
            kept.append(word)
    return kept


def _flag_values(argv: Sequence[str], name: str) -> list[str]:
    found = []
    for index, word in enumerate(argv):
        if word in (f"--{name}", f"-{name}") and index + 1 < len(argv):
            found.append(argv[index + 1])
        elif match := re.fullmatch(rf"--?{name}=(.*)", word):
            found.append(match.group(1))
    return found


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise ValueError(
            f'--allow_module={module}: there is no module "{error.name}". It was '
            f"looked for in {pathlib.Path.cwd()}, PYTHONPATH and what is installed in "
            f"{sys.prefix}: write it as in Python's import, and put its folder into "
            "PYTHONPATH or install it."
        ) from error


def _help(about: str, values: flags.FlagValues) -> str:
    known = {name: values[name] for name in values if values[name].help}
    lines = [about.strip(), "", "Flags:"]
    if "workdir" in known:
        lines += [
            f"  {'--config':16}FILE.py or FILE.py:name=value,...: a recipe.",
            f"  {'--config.A.B=x':16}Overrides what the recipe sets.",
        ]
    for name, flag in sorted(known.items()):
        lines.append(f"  {f'--{name}':16}{flag.help}")
    return "\n".join(lines)


def _write_trace(argv: Sequence[str], flag: str | None) -> str:
    """Appends the trace, dated, to error.txt of the flag's folder or to a file."""
    text = f"{datetime.datetime.now().isoformat()} {' '.join(argv)}\n"
    text += traceback.format_exc() + "\n"
    given = _flag_values(argv, flag) if flag else []
    with contextlib.suppress(OSError, ValueError):  # ValueError: a name not UTF-8
        if given and (folder := files.absolute(given[-1])).is_dir():
            name = os.fspath(folder / TRACE_FILE)
            with open(name, "a", errors="backslashreplace") as file:
                file.write(text)
            return file.name
    with contextlib.suppress(OSError):
        descriptor, path = tempfile.mkstemp("_error.txt", "big_vision_lite_")
        with open(descriptor, "w", errors="backslashreplace") as file:
            file.write(text)
        return path
    return "nowhere: no folder could be written"
