"""Names of parameters, first-match rules over names, and readable differences."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from big_vision_lite.messages import did_you_mean

T = TypeVar("T")


def names(tree: Any) -> list[str]:
    """Lists the leaves' names, "encoder/block_03/attention/query/kernel", in order."""
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


def map_named(function: Any, tree: Any) -> Any:
    """Maps `function(name, leaf)` over the leaves."""
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
    """Gives every name the value of the first rule whose pattern matches all of it.

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


def layers_above(names: Sequence[str]) -> dict[str, int]:
    """Counts the layers above every parameter: L + 1 at embeddings, L - i at block i.

    What follows the last of the L blocks has 0. A block is a numbered part of the name
    ("encoder/block_03/...") or several of them ("stage_1/unit_02/..."), in the order of
    the numbers; embeddings are what is named like patches, positions, tokens, stem or
    root outside of the blocks.

    Raises:
        ValueError: there is no numbered block, or more than one stack of them.
    """
    blocks: dict[str, tuple[int, ...]] = {}
    stacks: set[str] = set()
    for name in names:
        found = list(_BLOCK.finditer(name))
        if found:
            blocks[name] = tuple(int(part["number"]) for part in found)
            stacks.add(name[: found[0].start()] + found[0]["kind"])
    if len(stacks) != 1:
        raise ValueError(
            "layer_decay counts the blocks of one stack, such as "
            f'"encoder/block_03/...", but found {", ".join(sorted(stacks)) or "none"}. '
            "Clear it with --config.optimizer.layer_decay=none and write "
            f"optimizer.rules instead. The names are, for example: "
            f"{', '.join(names[:3])}."
        )
    from_top = sorted(set(blocks.values()), reverse=True)

    def count(name: str) -> int:
        if name in blocks:
            return from_top.index(blocks[name]) + 1
        return len(from_top) + 1 if _EMBEDDING.search(name) else 0

    return {name: count(name) for name in names}


# "block_03", "block1", "stage_2/unit_01"; not "conv2" or "norm1".
_BLOCK = re.compile(r"(?<![^/])(?P<kind>block|stage|unit|layer)_?(?P<number>\d+)(?=/)")
_EMBEDDING = re.compile(
    r"(?<![^/])(\w*embed\w*|patch\w*|position\w*|cls|\w*tokens?|registers?|stem\w*"
    r"|root\w*|\w+_root)(?![^/])"
)


def describe(leaf: Any) -> str:
    """Returns a leaf's shape and dtype: "(384, 1000) float32"."""
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None:
        return type(leaf).__name__
    return f"{tuple(shape)} {dtype}"


def difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], ours_is: str, theirs_is: str
) -> list[str]:
    """Lists what differs in names or shapes, one line a name, "+" ours and "-" theirs.

    Both arguments are {name: array-like}. An empty list means that they agree.
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
    """Returns the parameter whose name is the longest ending of `name`."""
    parts = name.split("/")
    endings = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((ending for ending in endings if ending in parameters), None)


def _join(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
