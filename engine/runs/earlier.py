"""Set an earlier run aside until the new one has begun.

`--overwrite` moves the earlier run's files into a folder in the run directory, and they stay there
until the new run has a checkpoint: if it fails before, they move back. The states, each reached by
a rename, so that a killed process leaves one of them:

    .moving-run    files are being moved, in either direction
    .waiting-run   all are in it; the new run has no checkpoint yet
    replaced/      the new run has begun; the next --overwrite deletes it
"""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from engine.runs.output import CHECKPOINT, MOVING, RESULTS, WAITING, run_files
from engine.storage import durable, names

log = logging.getLogger(__name__)

REPLACED = "replaced"


class EarlierRun:
    """The earlier run in the run directory `root`, whose lock the caller holds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._recover()

    @property
    def waits(self) -> bool:
        """Whether a run is set aside whose successor has no checkpoint yet."""
        return (self.root / WAITING).is_dir()

    def set_aside(self) -> None:
        """Move every file of the run into the waiting folder."""
        moving = self.root / MOVING
        names.mkdir(moving)
        for path in run_files(self.root):
            names.rename(path, moving / path.name)
        names.rename(moving, self.root / WAITING)
        durable.fsync_dir(self.root)

    def restore(self) -> None:
        """Move the waiting run back to where it stood; what the new one wrote is deleted."""
        if not self.waits:
            return
        for path in run_files(self.root):
            _delete(path)
        names.rename(self.root / WAITING, self.root / MOVING)
        self._move_back()

    def settle(self) -> None:
        """The new run has a checkpoint: the waiting one becomes `replaced/`."""
        if not self.waits:
            return
        target = self.root / REPLACED
        if target.exists():
            _delete(target)
        names.rename(self.root / WAITING, target)
        durable.fsync_dir(self.root)
        log.info("The run that stood here is in %s; the next --overwrite deletes it", target)

    def _recover(self) -> None:
        """Undo, or complete, what a killed process was about to do."""
        if (self.root / MOVING).is_dir():
            self._move_back()
        if self.waits:
            names = [path.name for path in run_files(self.root)]
            if any(name in RESULTS or CHECKPOINT.fullmatch(name) for name in names):
                self.settle()
            else:
                self.restore()

    def _move_back(self) -> None:
        moving = self.root / MOVING
        for path in sorted(moving.iterdir()):
            target = self.root / path.name
            if target.exists():
                _delete(target)
            names.rename(path, target)
        names.rmdir(moving)
        durable.fsync_dir(self.root)


def _delete(path: Path) -> None:
    """Delete by way of a name that the next start sweeps, so that no half of it looks whole."""
    doomed = path.with_name(f".del-{path.name}-{secrets.token_hex(4)}")
    names.rename(path, doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        names.rmtree(doomed)
    else:
        names.unlink(doomed)
