"""Models of other libraries and ours, and what both sides put out.

For the cases of conversion_cases; needs torch, timm, torchvision and transformers.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch_libraries
from conversion_cases import THEIRS
from conversion_cases.case import EVEN, Ours, Size
from foreign_models import randomise, relative_difference

from big_vision_lite.conversion import export, files, foreign, formats, preprocessing
from big_vision_lite.conversion.formats import Architecture, Format, Library
from big_vision_lite.conversion.weights import Weights
from big_vision_lite.training import state as state_lib

torch_libraries.import_torchvision()
import parity  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

BOUND = 1e-5  # max |difference| / max |value|, float32 on the CPU


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model of theirs in our terms, and itself."""

    form: Format
    architecture: Architecture
    variables: dict[str, np.ndarray]
    theirs: Any

    @property
    def model(self) -> Any:
        return self.architecture.model


def weights_of(theirs: Any, config: Any = None, path: str = "file") -> Weights:
    """Returns what a module holds, under the names it has in memory."""
    if config is None and isinstance(theirs, transformers.PreTrainedModel):
        config = json.loads(theirs.config.to_json_string())
    arrays = {n: t.detach().numpy().copy() for n, t in theirs.state_dict().items()}
    return Weights(arrays=arrays, path=path, config=config or {})


def read(weights: Weights, size: Size | None = None, theirs: Any = None) -> Imported:
    """Reads weights by what they hold, at a size or that which they fix."""
    form = foreign.recognise(weights)
    architecture = form.architecture(weights)
    size = size or architecture.image_size_px
    assert size is not None
    variables = formats.load(weights, form, architecture, size)
    return Imported(form, architecture, variables, theirs)


def imported(case: str, folder: pathlib.Path, size: Size | None = None) -> Imported:
    """Builds one of THEIRS with random weights, and reads it."""
    made = THEIRS[case]
    torch.manual_seed(0)
    theirs = randomise(made.build(), seed=len(case))
    if made.config is None:
        # Files have other names than modules in memory.
        theirs.save_pretrained(folder)
        return read(files.read(str(folder)), size or made.sizes[0], theirs)
    return read(weights_of(theirs, made.config), size or made.sizes[0], theirs)


def pixels(size: Size, channels: int = 3, seed: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (2, *size, channels), np.uint8)


@functools.cache
def _compiled(model: Any) -> Any:
    return jax.jit(model.apply)


def our_outputs(model: Any, variables: Any, image: np.ndarray) -> dict[str, Any]:
    """Returns our outputs; what `theirs` have as "tokens" is the grid."""
    params, collections = state_lib.split_variables(variables)
    found = _compiled(model)({"params": params, **collections}, image)
    outputs = {name: np.asarray(value) for name, value in found.items()}
    if "grid" in outputs:
        grid = outputs["grid"]
        outputs["tokens"] = grid.reshape(len(grid), -1, grid.shape[-1])
    return outputs


def their_outputs(model: Any, scaled: np.ndarray) -> dict[str, np.ndarray]:
    """Returns "pooled" and, if there is a head, "logits"; "tokens" where they have it.

    `scaled` is [B, H, W, C], as our "image".
    """
    x = torch.from_numpy(np.moveaxis(scaled, -1, 1).astype(np.float32).copy())
    x = x.to(next(model.parameters()).dtype)
    with torch.no_grad():
        if isinstance(model, transformers.PreTrainedModel):
            found = _of_huggingface(model, x)
        elif type(model).__module__.startswith("torchvision"):
            found = _of_torchvision(model, x)
        else:
            found = _of_timm(model, x)
    return {name: value.numpy() for name, value in found.items()}


def _of_timm(model: Any, x: Any) -> dict[str, Any]:
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True).flatten(1)
    found = {"pooled": pooled, "logits": model.forward_head(features)}
    is_mixer = type(model).__name__ == "MlpMixer"
    return found | ({"tokens": features} if is_mixer else {})


def _of_torchvision(model: Any, x: Any) -> dict[str, Any]:
    """Catches what goes into the head: the mean of a map, the first of tokens."""
    is_vit = hasattr(model, "encoder")
    kept: list[Any] = []
    module = model.encoder if is_vit else model.avgpool
    handle = module.register_forward_hook(lambda *given: kept.append(given[2]))
    logits = model(x)
    handle.remove()
    pooled = kept[0][:, 0] if is_vit else kept[0][:, :, 0, 0]
    return {"logits": logits, "pooled": pooled}


def _of_huggingface(model: Any, x: Any) -> dict[str, Any]:
    for name in ("resnet", "bit"):
        if name == model.config.model_type:
            body = getattr(model, name, model)
            found = {"pooled": body(x).pooler_output[:, :, 0, 0]}
            return found if body is model else found | {"logits": model(x).logits}
    tower = model.vision_model if isinstance(model, transformers.SiglipModel) else model
    found = tower(x, output_hidden_states=True)
    if "logits" in found:
        return {"logits": found.logits}
    tokens = found.last_hidden_state
    match type(model).__name__:
        case "SiglipVisionModel" | "SiglipModel":
            pooled = found.pooler_output
            return {
                "pooled": tokens.mean(1) if pooled is None else pooled,
                "tokens": tokens,
            }
        case "DeiTModel":
            return {"pooled": tokens[:, :2].mean(1), "tokens": tokens[:, 2:]}
        case _:
            before = 1 + getattr(model.config, "num_register_tokens", 0)
            return {"pooled": tokens[:, 0], "tokens": tokens[:, before:]}


def worst(
    model: Any, variables: Any, theirs: Any, size: Size = EVEN, channels: int = 3
) -> float:
    """Returns the largest difference of all outputs that both sides have."""
    ours = our_outputs(model, variables, pixels(size, channels))
    expected = their_outputs(theirs, ours["image"])
    names = [name for name in expected if name in ours]
    assert names
    return max(relative_difference(ours[name], expected[name]) for name in names)


def load_strictly(module: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Puts arrays into a torch module: none missing, left over or of another shape."""
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    module.load_state_dict(state, strict=True)
    return module.eval()


def put(ours: Ours, variables: Any, folder: pathlib.Path) -> tuple[Any, Any]:
    """Writes a model as users do; returns what was exported, and theirs of the folder.

    Theirs are loaded strictly.
    """
    if ours.library == Library.TORCHVISION:
        steps = preprocessing.from_torchvision(ours.size)
    else:
        steps = preprocessing.from_big_vision(ours.size)
    exported = export.export(
        *(
            ours.model,
            variables,
            steps,
            ours.channels,
            (),
            None,
            ours.library,
            str(folder),
        )
    )
    export.write(exported, folder)
    if ours.library != Library.HUGGINGFACE:
        return exported, parity.load(exported, folder)
    kind = exported.described["architectures"][0]
    more = {"add_pooling_layer": False} if kind in ("ViTModel", "DeiTModel") else {}
    theirs, report = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, **more
    )
    for trouble in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[trouble], report[trouble]
    return exported, theirs.eval()
