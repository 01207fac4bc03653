"""Shows what a model consists of and costs; computes nothing.

  python tools/show_model.py ViT:S/16
  python tools/show_model.py ResNet:R50,statistics=frozen --depth 9
  python tools/show_model.py runs/glyphs
  python tools/show_model.py --table

A model is NAME:SIZE with fields after commas, a run folder, or weights of another
library. Parameters are trained
numbers (batch statistics are listed apart). FLOPs are those of the forward pass of one
image: matrix products and convolutions by formula, one multiply-add is 2. Activations
are the values that these products and convolutions put out, timm's definition: norms,
sums and activation functions add none. `--depth` says how many levels of modules have a
row of their own. `--table` prints all published sizes, in Markdown.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import model_spec
import numpy as np

from big_vision_lite import trees
from big_vision_lite.runtime import flops

CLASSES = 1000
# In px, of all published sizes; their heads have 1,000 classes.
SIDE = 224


@dataclasses.dataclass(kw_only=True)
class Part:
    """What one module holds and costs, with all that is inside it."""

    name: str
    parameters: int = 0
    flops: int = 0
    activations: int = 0
    output: str = ""


@dataclasses.dataclass(kw_only=True)
class Shown:
    """A model's parts, its whole first; `outputs` are {name: "float32[1, 1000]"}."""

    parts: list[Part]
    statistics: int
    outputs: dict[str, str]

    @property
    def whole(self) -> Part:
        return self.parts[0]


def describe(
    model: Any, image_size_px: tuple[int, int], channels: int = 3, depth: int = 2
) -> Shown:
    """Counts a model on one image of (height, width), down to `depth` levels."""
    image = jax.ShapeDtypeStruct((1, *image_size_px, channels), jnp.uint8)
    inputs = jax.eval_shape(lambda image: model.inputs({"image": image}), image)
    variables = dict(
        jax.eval_shape(lambda x: model.init(jax.random.key(0), **x), inputs)
    )

    def run(variables: Any, inputs: Any) -> Any:
        return model.apply(
            variables, **inputs, capture_intermediates=True, mutable=["intermediates"]
        )

    traced, (outputs, captured) = jax.make_jaxpr(run, return_shape=True)(
        variables, inputs
    )
    called = {name: output for name, output in _calls(captured["intermediates"])}
    parameters = trees.flatten(variables.pop("params"))
    modules = {*called, *(name.rpartition("/")[0] for name in parameters)}
    parts = {"": Part(name="")}

    def around(module: str) -> Iterator[Part]:
        """Yields the rows that a module counts for: its own, and those around it."""
        yield parts[""]
        path = module.split("/")
        for length in range(1, min(len(path), depth) + 1) if module else ():
            name = "/".join(path[:length])
            yield parts.setdefault(name, Part(name=name))

    # In the order in which they compute.
    for module, equation in _equations(traced.jaxpr, modules, ""):
        cost = flops.count_equation(equation)
        for part in around(module):
            part.flops += cost
            part.activations += equation.outvars[0].aval.size if cost else 0
    for name, leaf in parameters.items():
        for part in around(name.rpartition("/")[0]):
            part.parameters += math.prod(leaf.shape)
    for name, part in parts.items():
        part.output = _shape(called[name]) if name in called else ""
    return Shown(
        parts=[parts[name] for name in _nested(parts)],
        statistics=sum(math.prod(x.shape) for x in jax.tree.leaves(variables)),
        outputs={name: _shape(output) for name, output in outputs.items()},
    )


def _equations(jaxpr: Any, modules: set[str], outer: str) -> Iterator[tuple[str, Any]]:
    """Yields every innermost equation with the innermost module that it lies in."""
    for equation in jaxpr.eqns:
        module = outer
        # Scopes that are no module are those of functions and of the model itself.
        for scope in str(equation.source_info.name_stack).split("/"):
            inside = f"{module}/{scope}" if module else scope
            module = inside if inside in modules or _above(inside, modules) else module
        inner = list(flops.inner_jaxprs(equation.params))
        if not inner:
            yield module, equation
        for function in inner:
            yield from _equations(function, modules, module)


def _above(name: str, modules: set[str]) -> bool:
    return any(module.startswith(f"{name}/") for module in modules)


def _calls(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yields (module, what its first call returned) from captured intermediates."""
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from _calls(node, (*path, name))
        elif name == "__call__":
            yield "/".join(path), node[0]


def _nested(names: Any) -> list[str]:
    """Sorts modules so that what is inside one follows it, else as they come."""
    first = {name: index for index, name in enumerate(names)}

    def place(name: str) -> list[int]:
        path = name.split("/")
        return [first["/".join(path[: end + 1])] for end in range(len(path))]

    return ["", *sorted((name for name in first if name), key=place)]


def _shape(output: Any) -> str:
    if isinstance(output, dict):
        wanted = ("grid", "tokens", "logits")
        output = next(output[name] for name in (*wanted, *output) if name in output)
    if isinstance(output, tuple | list):
        output = output[0]
    return f"{output.dtype}[{', '.join(map(str, output.shape))}]"


def of_path(
    path: str, allowed_modules: Sequence[str], part: str = ""
) -> tuple[Any, tuple[int, int, int]]:
    """Returns the model of a run folder or weight file and its image [H, W, C].

    H and W are 0 where the run's preprocessing keeps images at their size. `part` is
    one of several models in a file.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the weights are in no known format.
    """
    from etils import epath

    from big_vision_lite.conversion import files as weights
    from big_vision_lite.conversion import foreign
    from big_vision_lite.runs.folder import read_config

    if weights.is_foreign(path):
        found = foreign.load(path, part)
        return found.model, (*found.image_size_px, found.channels)
    config = read_config(epath.Path(path), allowed_modules)
    shapes = set()
    for size in (300, 400):
        example = {"image": np.zeros((size, size + 50, 3), np.uint8), "label": 0}
        for op in config.preprocess:
            example = op(example, np.random.default_rng(0))
        shapes.add(example["image"].shape)
    height, width, channels = shapes.pop()
    return config.model, (0, 0, channels) if shapes else (height, width, channels)


def show(title: str, shown: Shown) -> None:
    whole = shown.whole
    print(f"{title}\n" + "-" * len(title))
    print(f"parameters        {whole.parameters:,}")
    if shown.statistics:
        print(f"batch statistics  {shown.statistics:,}")
    print(f"FLOPs             {whole.flops / 1e9:,.4g} G")
    print(f"activations       {whole.activations / 1e6:,.4g} M")
    for name, shape in shown.outputs.items():
        print(f"{name:17} {shape}")
    width = max(len(_indented(part)) for part in shown.parts)
    print(
        f"\n{'module':{width}} {'parameters':>12} {'MFLOPs':>10} "
        f"{'activations':>12}  output"
    )
    for part in shown.parts[1:]:
        print(
            f"{_indented(part):{width}} {part.parameters:12,} "
            f"{part.flops / 1e6:10,.1f} {part.activations:12,}  {part.output}"
        )


def _indented(part: Part) -> str:
    *above, name = part.name.split("/")
    return "  " * len(above) + name


def table() -> str:
    """Returns all published sizes as a Markdown table."""
    lines = [
        "| model | image | parameters, M | FLOPs, G | activations, M |",
        "| --- | --- | --- | --- | --- |",
    ]
    for spec in model_spec.published():
        model = model_spec.build(spec, num_classes=CLASSES)
        whole = describe(model, (SIDE, SIDE), depth=0).whole
        lines += [
            f"| {spec} | {SIDE} | {whole.parameters / 1e6:.2f} | "
            f"{whole.flops / 1e9:.2f} | {whole.activations / 1e6:.2f} |"
        ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", help="ViT:S/16,field=value,..., a run, weights")
    add("--image_size", type=int, nargs="+", help="side, or height and width, in px")
    add("--channels", type=int, help="of the image (default 3, or the run's)")
    add("--classes", type=int, default=CLASSES, help="of the head; 0 for none")
    add("--depth", type=int, default=2, help="levels of modules with a row")
    add("--part", default="", help="of a file with several models one: teacher")
    add("--allow_module", action="append", default=[], help="that a run may import")
    add("--table", action="store_true", help="all published sizes in Markdown")
    options = parser.parse_args(argv)
    if options.table:
        print(table())
        return
    if options.model is None:
        parser.error(f"which model? NAME:SIZE like {model_spec.EXAMPLE}, or a run")
    from big_vision_lite.conversion import files as weights

    if weights.is_foreign(options.model) or pathlib.Path(options.model).exists():
        model, image = of_path(options.model, options.allow_module, options.part)
    else:
        model = model_spec.build(options.model, num_classes=options.classes or None)
        image = (SIDE, SIDE, 3)
    *size, channels = image
    if options.image_size:
        size = (options.image_size[0], options.image_size[-1])
    if not min(size):
        parser.error("the run's preprocessing keeps any size; add --image_size 224")
    channels = options.channels or channels
    title = f"{options.model}, one image of {size[0]}x{size[1]}x{channels}"
    show(title, describe(model, (size[0], size[1]), channels, options.depth))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as mistake:
        sys.exit(f"error: {mistake}")
