"""Locks the folder of a run while it trains, and ties it to one configuration."""

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from big_vision_lite.config import TrainConfig
from big_vision_lite.recipes import command_line, serialize
from big_vision_lite.runs import integrity, step_folder
from big_vision_lite.runs.image_folders import PLACES, make_absolute
from big_vision_lite.runtime import files, processes, startup

# Fields that may differ when a run resumes: they change neither the examples nor the
# updates.
FREE = (
    "log_every_steps",
    "checkpoints",
    "evaluators",
    "platform",
    "mesh",
    "sharding",
    "profile_steps",
    "data.threads",
    "data.processes",
    # Of a source in a source, too: images repeated, say, and tagged.
    *(f"data.source{'.source' * n}.{name}" for n in range(3) for name in PLACES),
)
LENGTH = ("num_steps", "num_epochs")


class RunFolder:
    """The folder of a run in training: created, locked, its configuration compared.

    Use as a context. The operating system drops the lock of a killed process. A new
    run that fails before `begin` deletes its config.json, so that the corrected recipe
    can use the folder.

    Raises:
        OSError: the folder cannot be written; nothing was trained.
        ValueError: another process trains here, or the folder belongs to another
            configuration.
    """

    def __init__(
        self,
        workdir: epath.Path,
        config: TrainConfig,
        *,
        log: Callable[[str], None] = print,
    ):
        self.path = workdir
        self._config = config
        self._log = log
        self._lock: Any = None
        self._is_new = False
        self._typed: dict[str, str] = {}

    def __enter__(self) -> "RunFolder":
        try:
            processes.on_first(self._open)
            self._check_shared()
        except BaseException as error:
            self.__exit__(type(error))  # a refused run holds no lock
            raise
        return self

    def __exit__(self, error: type[BaseException] | None, *unused: Any) -> None:
        if error is not None and self._is_new:
            (self.path / step_folder.CONFIG).unlink(missing_ok=True)
        if error is None and jax.process_index() == 0:
            # The traces of tries that failed before this run came to its end.
            (self.path / command_line.TRACE_FILE).unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()

    def begin(self) -> None:
        """Makes config.json permanent; call it when all is ready for the first step."""
        self._is_new = False

    def config_text(self) -> str:
        """Returns the text of config.json: the configuration, versions and machine.

        Paths of data are absolute; "typed_paths" says what was typed.
        """
        document = json.loads(serialize.to_json(self._config))
        typed = self._typed | make_absolute(document["config"])
        document |= {"versions": startup.versions(), "machine": startup.machine()}
        if typed:
            document["typed_paths"] = typed
        return serialize.document_text(document)

    def _check_shared(self) -> None:
        seen = processes.gather((self.path / step_folder.CONFIG).exists())
        if not all(sees for (sees,) in seen):
            blind = ", ".join(str(i) for i, (sees,) in enumerate(seen) if not sees)
            raise OSError(
                f"{self.path}: process 0 has made it, but it is not there for process "
                f"{blind}. All processes need the same folder: a network disk that all "
                "hosts mount, or --workdir=gs://BUCKET/FOLDER."
            )

    def _open(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            known = self.path / step_folder.CONFIG
            self._is_new = not known.exists()
            if not self._is_new:
                self._compare()
            files.replace(known, self.config_text())
        except OSError as error:
            raise OSError(
                f"Cannot write {self.path}: {error.strerror or error}. Checked at the "
                "start, nothing was trained. Use another --workdir or free the disk."
            ) from error

    def _acquire(self) -> None:
        # Cloud paths have no locks; there the launcher must start only one run.
        if "://" in str(self.path):
            return
        file = open(self.path / "lock", "a+")  # noqa: SIM115 (held until __exit__)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ValueError(
                f"{self.path} is in use by {holder}. Wait for it, end it, or use "
                "another --workdir."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        self._lock = file

    def _compare(self) -> None:
        old = read_config_document(self.path)
        # A run that is resumed by its folder alone has absolute paths only.
        self._typed = old.get("typed_paths", {})
        new = json.loads(self.config_text())
        changed = differences(old["config"], new["config"])
        steps = step_folder.complete_steps(self.path / step_folder.FOLDER)
        binding = [line for line in changed if not _is_free(line[0])]
        if steps and binding and all(line[0] in LENGTH for line in binding):
            raise ValueError(self._length_message(old, binding, steps[-1]))
        if steps and binding:
            shown = "; ".join(f"{key} {a} -> {b}" for key, a, b in binding[:6])
            raise ValueError(
                f"{self.path} belongs to another configuration (sha "
                f"{_sha(old['config'])}), you pass (sha {_sha(new['config'])}): "
                f"{shown}. Use a new --workdir, or --config.init.path={self.path} with "
                "a new --workdir to start from its weights. "
                f"{serialize.newer_version(old['version'])}".rstrip()
            )
        if steps:
            self._say_what_moved(old, new)

    def _say_what_moved(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        """Logs changes of machine, mesh and versions since the run began."""
        meshes = [
            {name: document["config"].get(name) for name in ("mesh", "sharding")}
            for document in (old, new)
        ]
        kinds = {
            "on another machine": [old.get("machine"), new["machine"]],
            "on another mesh": meshes,
            "with other versions": [_deciding(old), _deciding(new)],
        }
        for what, (then, now) in kinds.items():
            if not then:
                continue  # written by hand, or by a program of one's own
            moved = differences(then, now)
            if moved:
                shown = "; ".join(f"{name} {a} -> {b}" for name, a, b in moved)
                shown = shown.replace('"', "")
                self._log(
                    f"resuming {what} ({shown}): the same batches, but the last bits "
                    "of the results may differ"
                )

    def _length_message(
        self, old: Mapping[str, Any], binding: Sequence[Any], step: int
    ) -> str:
        shown = "; ".join(f"{key} {a} -> {b}" for key, a, b in binding)
        # Only the length differs; all other fields are equal.
        then = {name: old["config"].get(name) for name in LENGTH}
        before = dataclasses.replace(self._config, **then)
        examples = len(self._config.data.source)
        was, would_be = (
            float(c.optimizer.schedule.build(c.resolve_steps(examples))(step))
            for c in (before, self._config)
        )
        return (
            f"{self.path} was started with another length: {shown}. Learning rate now "
            f"{was:.1e} -> would be {would_be:.1e}. Choose the old length, or start a "
            f"new run with a new --workdir and --config.init.path={self.path}"
        )


def read_config_document(folder: epath.Path) -> dict[str, Any]:
    """Reads config.json of a run folder or step folder as plain JSON.

    Raises:
        FileNotFoundError: config.json is missing.
        DamagedCheckpoint: it is not a configuration.
    """
    path = folder / step_folder.CONFIG
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: {folder} is no run folder and no step folder."
        )
    try:
        document = json.loads(path.read_text())
        _ = document["version"], document["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise integrity.DamagedCheckpoint(f"{path} is damaged: {error}.") from error
    return document


def read_config(folder: epath.Path, allowed_modules: Sequence[str] = ()) -> TrainConfig:
    """Returns the configuration recorded in a run folder or step folder."""
    document = read_config_document(folder)
    return serialize.from_json(json.dumps(document), allowed_modules)


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Returns (path, old, new) of every leaf that differs between two JSON trees."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            inner = f"{path}.{key}" if path else key
            found += differences(old.get(key), new.get(key), inner)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = zip(old, new, strict=True)
        return [
            line
            for i, (a, b) in enumerate(pairs)
            for line in differences(a, b, f"{path}[{i}]")
        ]
    if old == new:
        return []
    return [(path, _short(old), _short(new))]


def _deciding(document: Mapping[str, Any]) -> dict[str, str]:
    """Returns the versions that can change results; most commits do not."""
    found = {"big_vision_lite": document["version"], **document.get("versions", {})}
    return {name: version for name, version in found.items() if name != "commit"}


def _is_free(path: str) -> bool:
    return any(path == f or path.startswith((f"{f}.", f"{f}[")) for f in FREE)


def _short(value: Any) -> str:
    if isinstance(value, dict) and serialize.CLASS in value:
        return value[serialize.CLASS].rpartition(".")[2]
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def _sha(config: Any) -> str:
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()[:8]
