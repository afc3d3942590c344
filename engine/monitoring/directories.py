"""Run directories below the named folders, each with an id.

The page asks by id, and an id is only ever looked up in this table: no path comes from a request.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from engine.errors import ConfigError
from engine.monitoring.state import MARKS, is_made_here

_DEEPEST = 4
_MOST = 2000
_SKIPPED = re.compile(r"\..*|checkpoint-\d+|adapter|stages|data|replaced")


class RunDirectories:
    """Every run below some folders; `scan` looks again, so that new runs appear.

    Folders are not entered through symbolic links, so that all of them lie below those named.
    Raises `ConfigError` where a folder is missing or a file.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        for folder in folders:
            if not folder.is_dir():
                what = "is a file" if folder.exists() else "does not exist"
                raise ConfigError(
                    f"{folder} {what}: engine board takes run directories, or folders of them such "
                    "as runs/."
                )
        self.folders = list(folders)
        self._by_id: dict[str, Path] = {}
        self._lock = Lock()

    def scan(self) -> dict[str, Path]:
        """Id -> path of every run there is now, in the order of their paths."""
        runs: dict[str, Path] = {}
        for folder in self.folders:
            for path in _below(folder):
                if len(runs) < _MOST:
                    runs.setdefault(_id_of(path), path)
        with self._lock:
            self._by_id |= runs
        return runs

    def path(self, run: str) -> Path | None:
        """The directory with this id, if there is one."""
        with self._lock:
            known = self._by_id.get(run)
        return known if known is not None else self.scan().get(run)

    def name(self, path: Path) -> str:
        """The shortest name that tells a run from the others: its path below the named folder."""
        for folder in self.folders:
            if path.is_relative_to(folder):
                below = path.relative_to(folder)
                alone = len(self.folders) == 1
                return str(below) if below.parts and alone else str(Path(folder.name, below))
        return str(path)


def _id_of(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]


def _below(folder: Path) -> list[Path]:
    """The directories at or below `folder` that a verb made."""
    made: list[Path] = []
    for current, names, files in os.walk(folder):
        path = Path(current)
        names[:] = sorted(name for name in names if not _SKIPPED.fullmatch(name))
        if len(path.relative_to(folder).parts) >= _DEEPEST:
            names.clear()
        if set(files) & set(MARKS) and is_made_here(path):
            made.append(path)
    return made
