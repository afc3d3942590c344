"""Training checkpoints that survive a kill, a full disk, a flipped bit.

A checkpoint is a folder `checkpoint-<step>` of safetensors files, `state.json` and `MANIFEST.json`.
The manifest is written last and holds the size and SHA-256 of every other file and of itself: a
folder without a manifest that verifies is no checkpoint. No pickle is written or read.

Saving goes in this order, and each line is durable before the next begins:

1. refuse a tensor with a value that is not finite, and a disk without space for all of it;
2. write the files, then the manifest, into a temporary folder next to it, fsync all of them;
3. rename the folder to its final name, fsync the folder above;
4. read the manifest and the headers back; only now is the step acknowledged;
5. retire the oldest checkpoints: rename to `.del-*`, fsync the folder above, delete.

Opening a store deletes what a killed process left half-written or half-deleted. A checkpoint that
does not verify is renamed to `.bad-*`, never deleted, and the one before it is used. One process at
a time writes to a store; `DirectoryLock` sees to it. Nothing is promised on network file systems.
"""

import errno
import logging
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.model_sources.safetensors.file import SafetensorsFile, save_file
from engine.runs.output import CHECKPOINT, require_space
from engine.storage import durable, names
from engine.storage.lock import DirectoryLock
from engine.storage.manifest import read_manifest, verify_files, write_manifest
from engine.storage.safe_files import MIB, read_json_object

log = logging.getLogger(__name__)

STATE_NAME = "state.json"
_LEFTOVER = re.compile(r"\.tmp-.+-\d+-[0-9a-f]{8}(?:\.files)?|\.del-.+-[0-9a-f]{8}")
_STEM = re.compile(r"[\w-]+(?:/[\w-]+)*")
_ATTEMPTS = 3


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint whose every file has been verified against its manifest."""

    path: Path
    step: int
    state: dict[str, Any]
    files: tuple[str, ...]

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors saved under `stem`, as copies on the CPU.

        Raises `CheckpointError` where it holds no such file, or values that are not finite.
        """
        name = f"{stem}.safetensors"
        if name not in self.files:
            raise CheckpointError(
                f"The checkpoint {self.path} holds no {name}; it holds {', '.join(self.files)}. "
                "Go on with the version and the --method that wrote it."
            )
        source = SafetensorsFile(self.path / name)
        tensors = {key: source.tensor(key).clone() for key in source.keys()}  # noqa: SIM118
        if bad := [*_nonfinite(tensors)]:
            raise CheckpointError(
                f"{self.path / name} holds values that are not finite in {', '.join(bad[:3])}. "
                "This program never saves such values; go on from an earlier checkpoint."
            )
        return tensors


class CheckpointStore:
    """The checkpoints of one run, in folder `root`, of which the newest `keep` (at least 2) stay.

    Beside them stay those that one of them names as the best so far.

    Raises `ConfigError` where another process writes to `root`. `lock` is the lock on `root` that
    the caller holds already; without one the store takes its own.
    """

    def __init__(self, root: Path, keep: int = 2, lock: DirectoryLock | None = None) -> None:
        if keep < 2:
            raise ValueError(f"keep is {keep}; at least 2, so that a damaged one has a successor")
        self.root = root
        self.keep = keep
        self._own_lock = DirectoryLock(root) if lock is None else None
        self._saved: set[int] = set()
        sweep(root)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        extra: Callable[[Path], None] | None = None,
        best: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write `checkpoint-<step>`; when this returns, it is on the disk.

        `tensors` maps a file's stem (it may name a folder: `adapter/adapter_model`) to its tensors,
        `state` is what JSON can hold, `extra` may write more files into the folder it is given.
        `best` says for the manifest which step's checkpoint is the best so far, by which metric and
        value; that checkpoint stays as long as one that names it.
        Saving a step that this store has saved already does nothing. Raises `CheckpointError`;
        every earlier checkpoint is then as it was.
        """
        target = self.path_of(step)
        if step in self._saved and target.is_dir():
            return target
        if target.exists():
            raise CheckpointError(
                f"{target} exists already and this run did not write it. Go on from it with "
                "--resume auto, or start over with --overwrite."
            )
        refuse_nonfinite(step, tensors)
        self._require_space(tensors)
        try:
            self._publish(step, tensors, state, extra, {"best": dict(best)} if best else {})
        except CheckpointError as error:
            raise type(error)(f"{error}{self._safe(step)}") from error.__cause__
        read_manifest(target, step)
        self._saved.add(step)
        log.info("Checkpoint of step %d saved: %s", step, target)
        self._retire()
        return target

    def latest(self) -> LoadedCheckpoint | None:
        """The newest checkpoint that verifies; those that do not are set aside as `.bad-*`.

        None where the run has none at all. Raises `CheckpointError` where there are some (or were,
        and have been set aside) and none verifies: starting over has to be asked for.
        """
        for step in reversed(self.steps()):
            path = self.path_of(step)
            try:
                return self.load(path)
            except CheckpointError as error:
                aside = self._rename(path, "bad")
                log.error("Set aside as %s, trying the one before it: %s", aside.name, error)
        bad = sorted(entry.name for entry in self.root.glob(".bad-checkpoint-*"))
        if bad:
            raise CheckpointError(
                f"No checkpoint in {self.root} verifies; set aside: {', '.join(bad)}. Restore one "
                "from a copy, or start over with --overwrite."
            )
        return None

    def load(self, path: Path) -> LoadedCheckpoint:
        """The checkpoint in folder `path`, every file verified. Raises `CheckpointError`."""
        named = CHECKPOINT.fullmatch(path.name)
        manifest = read_manifest(path, int(named[1]) if named else None)
        verify_files(path, manifest)
        files = tuple(sorted(manifest["files"]))
        if STATE_NAME not in files:
            raise CheckpointError(f"{path} is no training checkpoint: it has no {STATE_NAME}.")
        state = read_json_object(path / STATE_NAME, limit=64 * MIB)
        if path.resolve().parent == self.root.resolve():
            self._saved.add(manifest["step"])
        return LoadedCheckpoint(path, manifest["step"], state, files)

    def resume(self, choice: str | None) -> LoadedCheckpoint | None:
        """What `--resume` asks for: None for a fresh start, `auto` for `latest`, else a folder.

        Going on from a chosen folder sets the run's later checkpoints aside as `.old-*`.
        """
        if choice is None:
            return None
        if choice == "auto":
            newest = self.latest()
            if newest is not None:
                self._retire()  # what a process that was killed was about to
            return newest
        chosen = self.load(Path(choice))
        for step in self.steps():
            path = self.path_of(step)
            if step >= chosen.step and path.resolve() != chosen.path.resolve():
                aside = self._rename(path, "old")
                log.warning("Going on from %s; set aside as %s: %s", choice, aside.name, path.name)
        return chosen

    def steps(self) -> list[int]:
        """The steps that there are folders of, ascending, whether they verify or not."""
        matches = map(CHECKPOINT.fullmatch, _entries(self.root))
        return sorted(int(match[1]) for match in matches if match)

    def path_of(self, step: int) -> Path:
        """The folder of a step, whether or not it exists."""
        return self.root / f"checkpoint-{step}"

    def best_of(self, step: int) -> int | None:
        """The step whose checkpoint was the best when that of `step` was written, if one was."""
        try:
            best = read_manifest(self.path_of(step), step).get("best")
        except CheckpointError:
            return None
        named = best.get("step") if isinstance(best, dict) else None
        return named if isinstance(named, int) else None

    def clear(self) -> None:
        """Retire every checkpoint, also those set aside: the run starts over."""
        for step in self.steps():
            self._delete(self.path_of(step))
        for kind in ("bad", "old"):
            for entry in self.root.glob(f".{kind}-checkpoint-*"):
                names.rmtree(entry)

    def close(self) -> None:
        """Release the store's own lock."""
        if self._own_lock is not None:
            self._own_lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _publish(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        extra: Callable[[Path], None] | None,
        facts: Mapping[str, Any],
    ) -> None:
        """Write everything; after an I/O error anew from memory, as no fsync can be repeated."""
        target = self.path_of(step)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with durable.publish_directory(target) as folder:
                    _write_files(folder, tensors, state)
                    if extra is not None:
                        extra(folder)
                    write_manifest(folder, step, facts)
                return
            except CheckpointError as error:
                cause = error.__cause__
                broken = isinstance(cause, OSError) and cause.errno == errno.EIO
                if not broken or attempt == _ATTEMPTS:
                    raise
                log.error("Attempt %d to save step %d failed: %s", attempt, step, error)
                if isinstance(error, durable.UnconfirmedError):
                    with durable.writing(target):
                        self._delete(target)
            except OSError as error:
                raise durable.write_error(target, error) from error

    def _safe(self, failed: int) -> str:
        """What a run that could not save step `failed` can go on from, as a sentence."""
        try:
            steps = ", ".join(str(step) for step in self.steps() if step != failed)
        except CheckpointError:
            return ""  # the folder cannot be read; what failed before is the one to report
        if not steps:
            return " The run has no checkpoint yet."
        return f" Checkpoints of these steps are safe: {steps}. `engine resume` goes on from there."

    def _require_space(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        size = sum(
            t.numel() * t.element_size() for group in tensors.values() for t in group.values()
        )
        require_space(self.root, size)

    def _retire(self) -> None:
        try:
            steps = self.steps()
        except CheckpointError as error:
            # What was saved stands; old ones go with the next.
            log.warning("Old checkpoints are not deleted this time. %s", error)
            return
        newest = steps[-self.keep :]
        wanted = {*newest, *(best for step in newest if (best := self.best_of(step)) is not None)}
        for step in steps:
            if step in wanted:
                continue
            try:
                self._delete(self.path_of(step))
            except OSError as error:
                log.warning("The old checkpoint of step %d cannot be deleted: %s", step, error)

    def _delete(self, path: Path) -> None:
        """Delete by way of a name that the next start sweeps, so that no half of it looks whole."""
        names.rmtree(self._rename(path, "del"))

    def _rename(self, path: Path, kind: str) -> Path:
        aside = path.with_name(f".{kind}-{path.name}-{secrets.token_hex(4)}")
        names.rename(path, aside)
        durable.fsync_dir(self.root)
        return aside


def _entries(folder: Path) -> list[str]:
    """Names of what a folder holds. Raises `CheckpointError` where it cannot be listed."""
    try:
        return names.listed(folder)
    except OSError as error:
        raise CheckpointError(
            f"Cannot list the folder {folder}: {durable.describe(error)}. Checkpoints in it stay "
            "as they are. Check that disk, then start again."
        ) from error


def sweep(folder: Path) -> None:
    """Delete what a killed process left half-written or half-deleted in `folder`."""
    for name in _entries(folder) if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(name):
            entry = folder / name
            log.info("Removing %s, left by an interrupted run", entry)
            if entry.is_dir() and not entry.is_symlink():
                names.rmtree(entry)
            else:
                names.unlink(entry)


def _write_files(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    for stem, group in tensors.items():
        if not _STEM.fullmatch(stem):
            raise ValueError(f"{stem!r} is no file stem of letters, digits, - and _ between /")
        path = folder / f"{stem}.safetensors"
        names.mkdir(path.parent, parents=True, exist_ok=True)
        save_file(group, path)
    durable.write_json(folder / STATE_NAME, dict(state))


def refuse_nonfinite(step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise `CheckpointError` for a value that is not finite."""
    bad = [f"{stem}: {name}" for stem, group in tensors.items() for name in _nonfinite(group)]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise CheckpointError(
            f"Step {step} is not saved: {', '.join(bad[:3])}{more} hold values that are not "
            "finite. The last checkpoint is intact; go on from it with a lower --learning-rate."
        )


def _nonfinite(group: Mapping[str, Tensor]) -> Iterable[str]:
    for name, tensor in group.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            yield name
