"""Reads the arrays of weight files of other libraries, told apart by their bytes.

No code in a file is ever executed: safetensors and numpy arrays hold none, and torch
itself opens its archives, restricted to tensors and the arguments of training scripts
(argparse.Namespace, attributes without code).
"""

import argparse
import json
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from big_vision_lite.conversion import checkpoint_parts, dtypes
from big_vision_lite.conversion.weights import Weights

HUB = "hub:"
# In the order of the search.
FOLDER_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    "model.npz",
)
# Parts of large models; an index says which array is in which part.
PARTS = ("model-*.safetensors", "pytorch_model-*.bin")
READ = "Read are: Orbax run folders, .safetensors, .npz, torch's .pth and .bin"


def read(path: str, part: str = "") -> Weights:
    """Reads a weight file, a folder that holds one, or `hub:organisation/name`.

    config.json and preprocessor_config.json are read where they lie beside it.

    Of a checkpoint the model is taken, of several the `part` that names begin with.

    Raises:
        FileNotFoundError: there is nothing of that name, or no weights in the folder.
        ValueError: it is no weight file, is damaged, holds other things than arrays,
            could not be downloaded, or holds several models of which `part` chooses
            none.
    """
    given = _download(path) if path.startswith(HUB) else pathlib.Path(path).expanduser()
    if given.is_dir():
        given = _file_in(given, path)
    if not given.exists():
        raise FileNotFoundError(f"{path} does not exist. {READ}.")
    config, preprocessor = (_json(given.parent / name) for name in _SIDE_FILES)
    taken = checkpoint_parts.take(arrays_of(given), path, config, part)
    return Weights(
        arrays=taken.arrays,
        path=path,
        config=config,
        preprocessor=preprocessor,
        part=taken.part,
        assumptions=taken.assumptions,
    )


def is_foreign(path: str) -> bool:
    """Returns whether a path names a weight file or `hub:...`, not one of our runs."""
    if path.startswith(HUB):
        return True
    given = pathlib.Path(path).expanduser()
    if given.is_dir():
        return any((given / name).exists() for name in FOLDER_FILES)
    return given.is_file()


_SIDE_FILES = ("config.json", "preprocessor_config.json")
_AGAIN = "Fetch or copy it again."


def arrays_of(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns {name: array} of one file as it lies there, floats as float32.

    Raises:
        ValueError: see `read`.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty. Fetch it again.")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            is_torch = any(name.endswith("data.pkl") for name in archive.namelist())
        found = _torch(path) if is_torch else _npz(path)
    elif head[:4] == b"PK\x03\x04":
        raise ValueError(f"{path} is a truncated archive (.npz or .pth). {_AGAIN}")
    elif head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        found = _torch(path)
    elif head[8:9] == b"{":
        found = _safetensors(path)
    elif head.lstrip()[:1] == b"{":
        found = _parts(path)
    else:
        raise ValueError(_unknown(path, head))
    return {n: dtypes.as_floats(a, f"{path}: {n}") for n, a in found.items()}


def _file_in(folder: pathlib.Path, path: str) -> pathlib.Path:
    for name in FOLDER_FILES:
        if (folder / name).exists():
            return folder / name
    seen = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
    raise FileNotFoundError(
        f"{path} holds no weights ({', '.join(FOLDER_FILES)}), but {seen}. {READ}."
    )


def _download(path: str) -> pathlib.Path:
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{path}: downloading needs the hub's client; pip install -e '.[hub]', or "
            "give a folder that has been downloaded."
        ) from None
    try:
        wanted = [*FOLDER_FILES, *PARTS, *_SIDE_FILES]
        name = path.removeprefix(HUB)
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, allow_patterns=wanted)
        )
    except Exception as error:  # The client raises a dozen kinds.
        reason = str(error).strip().splitlines()[0] if str(error) else repr(error)
        raise ValueError(
            f"{path} could not be downloaded: {reason} Write hub:organisation/name, "
            "and see whether this machine reaches the network."
        ) from error


def _json(path: pathlib.Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. {_AGAIN}") from error
    return found if isinstance(found, dict) else {}


def _parts(index: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads all files that an index names, which must lie beside it."""
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} is JSON, but no index of weight files. {READ}.")
    found: dict[str, np.ndarray] = {}
    for name in sorted(set(map(str, names.values()))):
        part = index.parent / name
        if part.name != name or not part.is_file():
            raise ValueError(f"{index} names {name}, which is not beside it. {_AGAIN}")
        found |= arrays_of(part)
    if missing := sorted(names.keys() - found.keys()):
        raise ValueError(
            f"{index} names {', '.join(missing[:3])}, which no file holds. {_AGAIN}"
        )
    return found


def _safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return dtypes.read_safetensors(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is a damaged safetensors file: {error}. {_AGAIN}"
        ) from error


def _npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{path} holds pickled Python objects, which could run anything; they "
                "are never loaded. Save plain arrays: numpy.savez(FILE, **arrays)."
            ) from error
        raise ValueError(f"{path} is a damaged archive: {error}. {_AGAIN}") from error
    others = [n for n, array in found.items() if not isinstance(array, np.ndarray)]
    if others or not found:
        raise ValueError(
            f"{path} is a zip file of {', '.join(others[:3]) or 'nothing'}, not of "
            f"arrays. {READ}."
        )
    return found


def _torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"{path} is a torch archive, which only torch opens: pip install -e "
            "'.[torch]', or save it as safetensors."
        ) from None
    try:
        # Training scripts save their arguments, attributes that run no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds.
        raise ValueError(_why_not_torch(path, error)) from error
    arrays: dict[str, np.ndarray] = {}
    try:
        _collect(found, "", arrays, torch.Tensor)
    except _Unreadable as error:
        raise ValueError(
            f"{path} stores {error}, which is not read. {dtypes.SAVE_FLOATS}"
        ) from error
    if not arrays:
        raise ValueError(
            f"{path} holds a {type(found).__name__} without tensors, no state dict."
        )
    return arrays


def _why_not_torch(path: pathlib.Path, error: Exception) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or repr(error)
    if others := re.search(r"GLOBAL (\S+)", text):
        return (
            f"{path} holds more than tensors: {others[1]}. Only tensors are read, as "
            "loading other objects can run code. To take the weights out, which runs "
            "code from the file, so only for files from people you trust: "
            f"{_TAKE_OUT.format(path)} (elsewhere ['state_dict'], or .state_dict() of "
            "a whole model)."
        )
    reasons = re.findall(r"WeightsUnpickler error:\s*(.+)", text) or text.splitlines()
    reason = reasons[0].strip().rstrip(".")
    return f"{path} is no torch file of tensors alone: {reason}. {_AGAIN}"


_TAKE_OUT = (
    'python -c "import argparse, torch; torch.serialization.add_safe_globals('
    "[argparse.Namespace]); torch.save(torch.load('{}', weights_only=False)['model'], "
    "'only_model.pth')\""
)


class _Unreadable(Exception):
    """A tensor that is no plain array: quantised, sparse, packed, without data."""


def _collect(node: Any, name: str, arrays: dict[str, np.ndarray], tensor: type) -> None:
    """Adds the tensors of nested dicts to `arrays`; ignores all other values."""
    if isinstance(node, tensor):
        whole: Any = node
        try:
            number = whole.is_floating_point() and not whole.is_quantized
            arrays[name] = (whole.detach().float() if number else whole).numpy()
        except Exception as error:  # torch raises a kind for every type and layout
            raise _Unreadable(f"{name} as {whole.dtype}, {whole.layout}") from error
    elif isinstance(node, Mapping):
        for key, value in node.items():
            _collect(value, f"{name}.{key}" if name else str(key), arrays, tensor)


def _unknown(path: pathlib.Path, head: bytes) -> str:
    # A MessagePack map and its first key: what flax.serialization writes.
    if head[0] in (*range(0x80, 0x90), 0xDE, 0xDF) and head[1] in range(0xA0, 0xC0):
        return (
            f"{path.name} is a Flax msgpack training checkpoint: this format is not "
            f"read. {READ}."
        )
    return f"{path} is no weight file: it begins with {head[:8]!r}. {READ}."
