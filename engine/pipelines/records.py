"""What a pipeline remembers of its stages."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.pipelines.recipe import Stage
from engine.runs.summary import SUMMARY
from engine.storage import durable, names
from engine.storage.safe_files import read_json_object

_BEGUN = "begun.json"
_MOVING, _REPLACED = "moving", "replaced"
_RESUMED = ("train",)
"""Verbs that go on with what they began; what others began is made anew."""


class StageRecord:
    """The directory of one stage: its settings, its log, and how it ended."""

    def __init__(self, directory: Path, stage: Stage) -> None:
        self.folder = directory / "stages" / stage.name
        self.stage = stage

    @property
    def summary(self) -> Path:
        """The file that says how the stage ended."""
        return self.folder / SUMMARY

    def is_done(self) -> bool:
        """Whether the stage ended well, with these settings, and what it wrote is there."""
        facts, outputs = self._facts(), self.stage.outputs()
        same = facts.get("identity") == self.stage.identity
        there = [self._from_here(path) for path in outputs]
        same = same and facts.get("outputs", there) == there
        return self._ended_well() and same and all(path.exists() for path in outputs)

    def changed(self) -> list[Path]:
        """Files that this stage read or wrote and that are not now as they were when it ended."""
        before = self._facts().get("digests")
        before = before if isinstance(before, dict) else {}
        return [
            path
            for path in self.stage.files()
            if before.get(self._from_here(path)) not in (None, durable.sha256_file(path))
        ]

    def _from_here(self, path: Path) -> str:
        """A path as it is seen from the record: started from elsewhere, a name is another file's.

        All of it may be moved together.
        """
        return os.path.relpath(path.absolute(), self.folder.absolute())

    def _facts(self) -> dict[str, Any]:
        try:
            return read_json_object(self.summary) if self.summary.exists() else {}
        except CheckpointError:
            return {}  # A damaged record is none: the stage is done again.

    def _ended_well(self) -> bool:
        return self._facts().get("status") == "Success"

    def _set_aside(self, paths: list[Path]) -> None:
        """Move these outputs of a finished run to `replaced/`, by way of `moving/`.

        Wherever a kill falls, each stands in one of the three, and the next start goes on here.
        """
        moving = self.folder / _MOVING
        for number, path in enumerate(self.stage.outputs()):
            if path in paths:
                _move(path, moving / str(number) / path.name)
        names.unlink(self.summary, missing_ok=True)
        if moving.is_dir():
            durable.remove_tree(self.folder / _REPLACED)
            names.rename(moving, self.folder / _REPLACED)
            durable.fsync_dir(self.folder)

    def settle(self) -> None:
        """Delete what was set aside: the stage has ended well, and its outputs stand."""
        durable.remove_tree(self.folder / _REPLACED)

    def begin(self) -> tuple[str, ...]:
        """Make ready for the stage's run; the options that it is to have beside its settings.

        What an unfinished run of this stage left is removed, where nothing stood before it; a
        training run goes on instead. What a finished one wrote is set aside in `replaced/` until
        the new stands. Raises `CheckpointError`.
        """
        names.mkdir(self.folder, parents=True, exist_ok=True)
        options: tuple[str, ...] = ()
        own = self._own_outputs()
        standing = [path for path in own if path.exists()]
        if self._ended_well() or (self.folder / _MOVING).is_dir():
            with durable.writing(self.folder):
                self._set_aside(standing)
        elif self.stage.verb in _RESUMED:
            if standing and "resume" not in self.stage.settings:
                options = ("--resume", "auto")
        else:
            for path in standing:
                _remove(path)
        self._note_own(own)
        return options

    def _note_own(self, own: list[Path]) -> None:
        durable.write_json(self.folder / _BEGUN, {"absent": [self._from_here(p) for p in own]})

    def _own_outputs(self) -> list[Path]:
        """Outputs that did not exist before this stage was first begun."""
        begun = self.folder / _BEGUN
        earlier = self._absent(begun) if begun.exists() else set()
        return [
            p
            for p in self.stage.outputs()
            if not os.path.lexists(p) or self._from_here(p) in earlier
        ]

    def _absent(self, begun: Path) -> set[str]:
        """Outputs that were not there before. Raises `CheckpointError` where nobody can tell."""
        try:
            absent = read_json_object(begun).get("absent")
            if isinstance(absent, list) and all(isinstance(path, str) for path in absent):
                return set(absent)
            told = f"{begun} does not list paths under `absent`."
        except CheckpointError as error:
            told = str(error)
        raise CheckpointError(
            f"{told} It tells what the stage {self.stage.name} may replace. Move that stage's "
            f"outputs away, delete {begun}, and start again."
        )

    def end(
        self, status: int, seconds: float, message: str | None, files: Iterable[Path] = ()
    ) -> Mapping[str, Any]:
        """Write and return how the stage ended, and the digests of files for `changed`."""
        outputs = self.stage.outputs()
        facts = {
            "stage": self.stage.name,
            "verb": self.stage.verb,
            "parameters": self.stage.settings,
            "identity": self.stage.identity,
            "status": "Success" if status == 0 else "Failure",
            "exit_status": status,
            "output_path": str(outputs[0]) if outputs else None,
            "outputs": [self._from_here(path) for path in outputs],
            "digests": {self._from_here(path): durable.sha256_file(path) for path in files},
            "error_message": message,
            "wall_seconds": round(seconds, 3),
            "ended": round(time.time(), 3),
        }
        durable.write_json(self.summary, facts)
        if status == 0:
            self.settle()
        else:
            # What stands under the other names at the next start is somebody else's.
            self._note_own([path for path in self._own_outputs() if os.path.lexists(path)])
        return facts


def _move(path: Path, target: Path) -> None:
    """Move a file or folder so that one of the two is whole at any moment."""
    names.mkdir(target.parent, parents=True, exist_ok=True)
    if not target.exists():
        try:
            names.rename(path, target)
            return
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        if path.is_dir():
            with durable.publish_directory(target) as folder:
                shutil.copytree(path, folder, symlinks=True, dirs_exist_ok=True)
        else:
            with path.open("rb") as source, durable.replacing(target) as handle:
                shutil.copyfileobj(source, handle)
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        durable.remove_tree(path)
    else:
        names.unlink(path, missing_ok=True)
