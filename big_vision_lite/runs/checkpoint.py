"""Saves and restores checkpoints: asynchronously, verified and atomically."""

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from big_vision_lite import trees
from big_vision_lite.config import Checkpoints
from big_vision_lite.runs import integrity, step_folder
from big_vision_lite.runtime import processes
from big_vision_lite.training.state import TrainState


class Checkpointer:
    """A writer of `workdir/checkpoints/<step>/`: one save at a time, in the background.

    Use as a context: leaving it waits for the last save. `metadata` goes into every
    manifest, `config_text`, the run's config.json, into every step folder: a copy of
    that folder alone is enough to predict.
    """

    def __init__(
        self,
        workdir: epath.Path,
        policy: Checkpoints,
        *,
        config_text: str,
        metadata: Mapping[str, Any],
        log: Callable[[str], None] = print,
    ):
        self._folder = workdir / step_folder.FOLDER
        self._trash = workdir / step_folder.TRASH
        self._policy = policy
        self._config_text = config_text
        self._metadata = dict(metadata)
        self._log = log
        self._preparing: threading.Thread | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.last_saved: int | None = None

    def __enter__(self) -> "Checkpointer":
        processes.on_first(self._discard_unfinished)
        return self

    def __exit__(self, *unused: Any) -> None:
        self.wait()

    def prepare(self, abstract: TrainState) -> None:
        """Compiles the programs of the first save in the background."""
        compiling = functools.partial(integrity.compile_checksums, abstract)
        self._preparing = threading.Thread(target=compiling, name="compile-checksums")
        self._preparing.start()

    def due(self, step: int) -> bool:
        """Returns whether to save at `step`."""
        return step % self._policy.every_steps == 0

    def saving(self) -> bool:
        """Returns whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, state: TrainState) -> None:
        """Starts to save `state`; returns as soon as its buffers may be donated.

        Raises:
            OSError: the *previous* save failed, for example because the disk is full;
                `check` raises it earlier.
        """
        self.wait()
        if self.last_saved == step:
            return
        # Enqueued before the next step donates the state; fetched by the thread.
        sums = integrity.checksums(state)
        leaves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        folder = self._folder / str(step)
        pending = step_folder.save_async(folder, state)
        about = self._metadata | {"step": step, "devices": count_devices(state)}
        finish = functools.partial(self._finish, folder, about, pending, leaves, sums)
        self._thread = threading.Thread(target=finish, name=f"save-{step}")
        self._thread.start()
        self.last_saved = step

    def wait(self) -> None:
        """Blocks until the pending save is complete; raises its error if it failed."""
        if self._preparing is not None:
            self._preparing.join()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def check(self) -> None:
        """Raises the error of a finished save that failed; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def note_origin(self, origin: Mapping[str, Any] | None) -> None:
        """Sets the origin of the initial weights, recorded in all later manifests."""
        self._metadata["origin"] = origin

    def restore_latest(self, abstract: TrainState) -> TrainState | None:
        """Returns the newest complete state in the shardings of `abstract`, or None.

        Raises:
            DamagedCheckpoint: the newest step is damaged; names the file or leaf, and
                the newest step that is intact.
            ValueError: its leaves differ from `abstract`, or the data changed.
        """
        # One process reads every byte, and all restore the step that it chose.
        newest = processes.on_first(self._newest_verified)
        if newest is None:
            return None
        folder = self._folder / str(newest)
        manifest = integrity.read_manifest(folder)
        self._check_data(manifest, folder)
        integrity.check_leaves(trees.flatten(abstract), manifest, folder)
        state = step_folder.restore(folder, abstract, manifest)
        self.last_saved = newest
        self.note_origin(manifest.get("origin"))
        saved_on, now = manifest["devices"], count_devices(state)
        if saved_on != now:
            self._log(f"saved on {saved_on} devices, restoring on {now}")
        return state

    def _newest_verified(self) -> int | None:
        newest = max(step_folder.complete_steps(self._folder), default=None)
        if newest is not None:
            step_folder.verified_manifest(self._folder / str(newest))
        return newest

    def _finish(
        self, folder: epath.Path, about: dict, pending: Any, leaves: Any, sums: Any
    ) -> None:
        try:
            pending.result()
            if jax.process_index() == 0:
                (folder / step_folder.CONFIG).write_text(self._config_text)
                manifest = about | {
                    "leaves": integrity.describe_leaves(leaves, jax.device_get(sums)),
                    "files": integrity.digest_files(folder),
                }
                integrity.write_manifest(folder, manifest)
                self._prune()
        except Exception as error:  # handed to the training thread by wait()
            self._error = OSError(self._failure(about["step"], error))
            self._error.__cause__ = error

    def _check_data(self, manifest: Mapping[str, Any], folder: epath.Path) -> None:
        before, now = manifest.get("source"), self._metadata.get("source")
        if before != now:
            raise ValueError(
                f"{folder} was trained on data with the fingerprint {before}, which is "
                f"now {now}: the batches would be others. Bring the old data back, or "
                f"start a new --workdir with --config.init.path={folder}"
            )

    def _prune(self) -> None:
        # Only after the new step's manifest is there, so that a kill at any moment
        # leaves a complete step behind.
        steps = step_folder.complete_steps(self._folder)
        every = self._policy.keep_every_steps
        for step in steps[: -self._policy.keep_latest]:
            if not every or step % every:
                # The manifest goes first: a half-deleted step must not look complete.
                (self._folder / str(step) / integrity.MANIFEST).unlink()
                (self._folder / str(step)).rmtree()

    def _discard_unfinished(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        complete = step_folder.complete_steps(self._folder)
        for path in sorted(self._folder.iterdir(), key=str):
            if path.name.isdigit() and int(path.name) in complete:
                continue
            self._trash.mkdir(parents=True, exist_ok=True)
            target = self._trash / path.name
            if target.exists():
                target.rmtree() if target.is_dir() else target.unlink()
            path.rename(target)
            newest = f"Newest complete: {complete[-1]}." if complete else "None before."
            self._log(
                f"step {path.name.split('.')[0]} is unfinished (its run was killed, or "
                f"the save failed): moved to {target}. {newest}"
            )

    def _failure(self, step: int, error: Exception) -> str:
        # A full disk comes as ValueError from tensorstore, with a trace in its text.
        reason = str(error).strip().splitlines()[0] if str(error) else repr(error)
        steps = step_folder.complete_steps(self._folder)
        kept = f"Step {steps[-1]} is complete" if steps else "No step is saved yet"
        return (
            f"Could not save step {step} in {self._folder}: {reason}. {kept}. Free "
            "disk space or mend the folder; the same command continues from there."
        )


def count_devices(state: TrainState) -> int:
    """Returns the number of devices that hold a state."""
    return len(state.step.sharding.device_set)
