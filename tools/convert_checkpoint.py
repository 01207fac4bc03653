"""Converts models from and to other libraries, and proves that nothing changed.

  python tools/convert_checkpoint.py RUN --to timm --out FOLDER
  ... --to torchvision | huggingface | npz | safetensors
  ... --to huggingface --whole
  python tools/convert_checkpoint.py FILE --to orbax --out RUN

RUN is a run folder, a checkpoints folder or one step folder; FILE a safetensors, npz or
.pth file, a folder with config.json, or hub:organisation/name. Either can be the source
of every conversion. What goes out is the backbone; with --whole all of the model, where
the library has its like (both towers of SigLIP). FOLDER gets the weights, a config.json
that the other side loads unchanged, use.py with the lines that use it, and parity.txt:
both sides on random pixels and on eight photographs, layer by layer, when torch is
installed, and what was assumed of the weights. The exit code is not zero when the bound
is missed.
"""

import argparse
import importlib.util
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parent))

from big_vision_lite import trees
from big_vision_lite.config import Checkpoints
from big_vision_lite.conversion import assumption, export, foreign
from big_vision_lite.conversion.formats import Library
from big_vision_lite.conversion.preprocessing import Preprocessing
from big_vision_lite.models.two_tower import TwoTower
from big_vision_lite.objectives.regression import Regression
from big_vision_lite.recipes import command_line, serialize
from big_vision_lite.runs import hyperrule, inference, load, suggestions
from big_vision_lite.runs.checkpoint import Checkpointer
from big_vision_lite.runs.saved_run import SavedRun
from big_vision_lite.runtime import files, startup
from big_vision_lite.training import state as state_lib
from big_vision_lite.types import backbone_of

ORBAX = "orbax"
# What has to be installed to compare.
LIBRARIES = {
    Library.TIMM: "timm",
    Library.TORCHVISION: "torchvision",
    Library.HUGGINGFACE: "transformers",
}


def to_library(
    run: SavedRun, library: Library, out: pathlib.Path, whole: bool = False
) -> bool:
    """Writes `run` for another library; returns whether parity holds or is untested.

    Of its model the backbone, or with `whole` all.
    """
    part, model = ("", run.config.model) if whole else backbone_of(run.config.model)
    if part and library == Library.HUGGINGFACE and _goes_whole(run):
        print(f"note: of the model its {part} alone; --whole writes all of it.")
    found = state_lib.variables(run.state, averaged=True)
    variables = {
        name: np.asarray(jax.device_get(leaf))
        for name, leaf in trees.inside(found, part).items()
    }
    if library != Library.SAFETENSORS and "mask_token" in variables:
        # It stands for patches in pretraining only.
        del variables["mask_token"]
        model = model.clone(mask_token=False)
    preprocessing, channels = preprocessing_of(run)
    assumed = list(map(str, assumption.from_origin(run.manifest.get("origin"))))
    logits = None
    if isinstance(run.config.objective, Regression):
        # What is written gives numbers in their own units, as predict does.
        variables = run.config.objective.in_head(variables, model.head_modules)
    if "head/kernel" in variables:
        logits = inference.meaning_of_logits(run, assumed.append)
    exported = export.export(
        model,
        variables,
        preprocessing,
        channels,
        run.class_names,
        logits,
        library,
        str(out),
    )
    export.write(exported, out)
    print(f"{len(exported.arrays)} arrays of {run.folder} -> {out} ({library})")
    for note in exported.notes:
        print(f"note: {note}")
    print("\n".join(["To use it:", *(f"  {line}" for line in exported.code)]))
    proof = _proof(model, variables, preprocessing, channels, exported, out)
    text = proof.text + "".join(f"assumed: {line}\n" for line in assumed)
    (out / "parity.txt").write_text(text)
    print(text, end="")
    return proof.holds


def _goes_whole(run: SavedRun) -> bool:
    height, width, channels = input_shape(run)
    try:
        export.find(run.config.model, Library.HUGGINGFACE, (height, width), channels)
    except ValueError:
        return False
    return True


class Proof(NamedTuple):
    """What parity.txt says, and whether both sides agree as far as was compared."""

    text: str
    holds: bool


def _proof(
    model: Any,
    variables: dict[str, np.ndarray],
    preprocessing: Preprocessing,
    channels: int,
    exported: export.Exported,
    out: pathlib.Path,
) -> Proof:
    library = exported.library
    if library in (Library.NPZ, Library.SAFETENSORS):
        return _read_back(variables, out)
    needed = ("torch", LIBRARIES[library])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        line = (
            f"Parity was not compared: {' and '.join(missing)} not installed "
            "(pip install '.[torch]')\n"
        )
        return Proof(line, True)
    import parity

    shape = (*preprocessing.image_size_px, channels)
    params, collections = state_lib.split_variables(variables)
    nested = {"params": params, **collections}
    if isinstance(model, TwoTower):
        image = jax.random.randint(jax.random.key(0), (4, *shape), 0, 256)
        theirs = parity.load(exported, out)
        return _proof_of_towers(model, nested, np.asarray(image, np.uint8), theirs)
    report = parity.compare(model, nested, preprocessing, channels, exported, out)
    return Proof(report.text(), report.passed)


def _proof_of_towers(
    model: TwoTower, variables: Any, image: np.ndarray, theirs: Any
) -> Proof:
    """Compares embeddings of random images and of random texts with SiglipModel's."""
    import parity
    import torch

    tower = model.text_tower
    ids = np.random.default_rng(0).integers(0, tower.vocabulary, (4, tower.length))
    ours = jax.jit(model.apply)(variables, image, ids.astype(np.int32))
    pixels = np.moveaxis(np.asarray(ours["image"]), -1, 1).copy()
    with torch.no_grad():
        found = theirs(
            input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pixels)
        )
    differences = {
        "random pixels": (ours["image_embedding"], found.image_embeds),
        "random texts": (ours["text_embedding"], found.text_embeds),
    }
    lines, holds = [], True
    for kind, (mine, other) in differences.items():
        difference = parity.relative(np.asarray(mine), other.numpy())
        holds &= difference <= parity.BOUND
        lines.append(
            f"embeddings of {kind}: {difference:.1e} of the largest value "
            f"(bound {parity.BOUND:.0e})\n"
        )
    return Proof("".join(lines) + "FAILED\n" * (not holds), bool(holds))


def _read_back(variables: dict[str, np.ndarray], out: pathlib.Path) -> Proof:
    """Says whether what was written gives the same bits when it is read again."""
    found = foreign.load(str(out)).variables
    wrong = [n for n, x in variables.items() if not np.array_equal(found.get(n), x)]
    equal = f"{len(variables) - len(wrong)} of {len(variables)} arrays equal"
    return Proof(f"Read back: {equal}\n", not wrong)


def preprocessing_of(run: SavedRun) -> tuple[Preprocessing, int]:
    """Returns a run's preprocessing, and its channels."""
    ops, model = run.config.preprocess, backbone_of(run.config.model)[1]
    height, width, channels = input_shape(run)
    preprocessing = Preprocessing(
        ops=ops, mean=model.mean, std=model.std, image_size_px=(height, width)
    )
    return preprocessing, channels


def input_shape(run: SavedRun) -> tuple[int, ...]:
    """Returns [H, W, C] of what the preprocessing makes of an image of its kind."""
    import parity

    given = run.manifest["input"]
    # Views [V, H, W, C] may stand in place of an image [H, W, C].
    views = (leaf for leaf in given.values() if len(leaf["shape"]) == 4)
    channels = (given.get("image") or next(views))["shape"][-1]
    image: Any = np.zeros((300, 400, channels), np.uint8)
    if channels in parity.COLOURS:
        image = parity.jpegs()[0]

    class Images:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": image, "label": 0}

        def name(self, index: int) -> str:
            return "an image"

    source: Any = Images()
    return hyperrule.input_shape(source, run.config.preprocess)


def to_run(run: SavedRun, out: pathlib.Path) -> None:
    """Writes weights from elsewhere as a run folder: evaluate, predict, start from."""
    workdir = epath.Path(out)
    text = serialize.to_json(
        run.config,
        versions=startup.versions(),
        machine=startup.machine(),
    )
    metadata = {
        "num_steps": int(run.manifest["num_steps"]),
        "class_names": list(run.class_names),
        "source": run.config.data.source.fingerprint,
        "origin": run.manifest.get("origin"),
        "backbone": backbone_of(run.config.model)[0],
        "input": run.manifest["input"],
        "versions": startup.versions(),
    }
    policy = Checkpoints()
    with Checkpointer(
        workdir, policy, config_text=text, metadata=metadata
    ) as checkpointer:
        checkpointer.save(run.step, run.state)
    files.replace(workdir / "config.json", text)
    count = sum(x.size for x in trees.flatten(run.state.params).values())
    print(f"{count:,} parameters of {run.folder} -> {out}")
    command = f"-m big_vision_lite.predict --workdir {shlex.quote(str(out))}"
    written = "--out preds.csv" if run.class_names else "--embed features.npz"
    print(f"{suggestions.python([])} {command} --images FOLDER {written}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", help="run, step folder, weight file, or hub:organisation/name")
    choices = [ORBAX, *(library.value for library in Library)]
    add("--to", required=True, choices=choices, help="what to write")
    add("--out", required=True, help="a new folder")
    add("--part", default="", help="of a file with several models one: teacher")
    add("--whole", action="store_true", help="all of the model, not its backbone")
    add("--allow_module", action="append", default=[], help="a module of your own")
    return parser.parse_args(list(argv)[1:])


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    options = parse(argv)
    out = pathlib.Path(options.out).expanduser().absolute()
    files.check_new_folder(out)
    run = load.load(
        options.source,
        allowed_modules=options.allow_module,
        devices=jax.devices()[:1],
        part=options.part,
    )
    if options.to == ORBAX:
        to_run(run, out)
    elif not to_library(run, Library(options.to), out, options.whole):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(command_line.run(main, sys.argv))
