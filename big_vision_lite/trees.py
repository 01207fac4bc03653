"""Names the leaves of trees, matches rules to the names and lists differences."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from big_vision_lite.messages import did_you_mean

# The name of the variables that hold the running statistics of batch norm.
STATISTICS = "batch_stats/"

T = TypeVar("T")


def names(tree: Any) -> list[str]:
    """Returns the leaves' names in order, such as "encoder/block_03/mlp/out/kernel"."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [_join(path) for path, _ in paths]


def flatten(tree: Any) -> dict[str, Any]:
    """Returns {name: leaf} in the tree's order."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_join(path): leaf for path, leaf in paths}


def unflatten(leaves: Mapping[str, T]) -> dict[str, Any]:
    """Builds nested dicts from {"a/b/c": leaf}."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def part(tree: Any, path: str) -> Any:
    """Returns the subtree at a path like "image/encoder"; all for "", {} if missing."""
    for key in path.split("/") if path else ():
        tree = tree.get(key, {})
    return tree


def inside(named: Mapping[str, T], path: str) -> dict[str, T]:
    """Returns the leaves of the module at `path`, named relative to that module.

    Names of statistics keep their prefix "batch_stats/".
    """
    found = {}
    for name, leaf in named.items():
        kind = STATISTICS if name.startswith(STATISTICS) else ""
        name = name.removeprefix(kind)
        if not path or name.startswith(f"{path}/"):
            found[kind + (name[len(path) + 1 :] if path else name)] = leaf
    return found


def outside(named: Mapping[str, T], path: str) -> dict[str, T]:
    """Undoes `inside`: prefixes names with the module's `path`."""
    if not path:
        return dict(named)
    found = {}
    for name, leaf in named.items():
        kind = STATISTICS if name.startswith(STATISTICS) else ""
        found[f"{kind}{path}/{name.removeprefix(kind)}"] = leaf
    return found


def map_named(function: Any, tree: Any) -> Any:
    """Returns the tree with `function(name, leaf)` in place of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(_join(path), leaf), tree
    )


def match(
    rules: Sequence[tuple[str, T]],
    names: Iterable[str],
    *,
    default: T | None = None,
    every_name: bool = False,
    what: str = "rule",
) -> dict[str, T | None]:
    """Returns for every name the value of the first rule that matches the whole name.

    `rules` are (regular expression, value) pairs; `default` goes to unmatched names.

    Raises:
        ValueError: a rule matches no name (a typo, or shadowed by earlier rules), or
            `every_name` is set and a name matches no rule.
    """
    names = list(names)
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise ValueError(
                f'{what} "{pattern}" is not a regular expression: {error}. '
                'Names look like "encoder/block_03/attention/query/kernel"; '
                'match a part with ".*part.*".'
            ) from None
    used: set[int] = set()
    matched: dict[str, T | None] = {}
    for name in names:
        matched[name] = default
        for index, (pattern, value) in enumerate(compiled):
            if pattern.fullmatch(name):
                used.add(index)
                matched[name] = value
                break
        else:
            if every_name:
                raise ValueError(
                    f'No {what} matches "{name}". Add one, or end the list with ".*".'
                )
    for index, (pattern, _) in enumerate(rules):
        if index not in used and names:
            raise ValueError(
                f'{what} "{pattern}" matches no name that an earlier one has not '
                f"taken.{did_you_mean(pattern, names)} The names are, for example: "
                f"{', '.join(names[:3])}. A pattern must match the whole name."
            )
    return matched


def layers_above(names: Sequence[str], layers: Sequence[str]) -> dict[str, int]:
    """Returns the number of layers above each parameter, for layer-wise decay.

    `layers` are patterns of whole names from the pixels upwards (types.Model); the
    numbers in a pattern's groups order its blocks. Of L blocks the last gets 1 and the
    first L; names that match an earlier pattern get L + 1, and names that match no
    pattern, above all blocks, get 0.

    Raises:
        ValueError: no name belongs to a block.
    """
    patterns = [re.compile(pattern) for pattern in layers]
    keys: dict[str, tuple[int, ...]] = {}
    for name in names:
        for index, pattern in enumerate(patterns):
            found = pattern.fullmatch(name)
            if found:
                keys[name] = (index, *(int(number) for number in found.groups()))
                break
    if not any(len(key) > 1 for key in keys.values()):
        raise ValueError(
            f"layer_decay counts the blocks of the model, but of its layers="
            f"{tuple(layers)} none with a number is the name of a parameter. Name them "
            'in the class of the model, layers = (r"encoder/block_(\\d+)/.*",), or '
            "clear it with --config.optimizer.layer_decay=none and write "
            f"optimizer.rules instead. The names are, for example: "
            f"{', '.join(names[:3])}."
        )
    from_top = sorted(set(keys.values()), reverse=True)
    return {
        name: from_top.index(keys[name]) + 1 if name in keys else 0 for name in names
    }


def describe(leaf: Any) -> str:
    """Returns a leaf's shape and dtype: "(384, 1000) float32"."""
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None:
        return type(leaf).__name__
    return f"{tuple(shape)} {dtype}"


def difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], ours_is: str, theirs_is: str
) -> list[str]:
    """Returns a line per differing name or shape: "+" for ours, "-" for theirs.

    Both arguments are {name: array-like}. An empty list means no difference.
    """
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            lines.append(f"  + {name} {describe(ours[name])}  only in {ours_is}")
        elif name not in ours:
            lines.append(f"  - {name} {describe(theirs[name])}  only in {theirs_is}")
        elif tuple(ours[name].shape) != tuple(theirs[name].shape):
            lines.append(f"  + {name} {describe(ours[name])}  in {ours_is}")
            lines.append(f"  - {name} {describe(theirs[name])}  in {theirs_is}")
    return lines


def owner(name: str, parameters: Collection[str]) -> str | None:
    """Returns the parameter whose name is the longest suffix of `name`, or None."""
    parts = name.split("/")
    endings = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((ending for ending in endings if ending in parameters), None)


def _join(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
