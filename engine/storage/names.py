"""Make calls on names again that a signal interrupted.

Python repeats `open`, `read`, `write` and `fsync` after EINTR (PEP 475), but none of these calls.
Network and FUSE file systems interrupt them, and may have done what was asked all the same: then
the second call finds it done, which is no error.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

_ATTEMPTS = 100
"""Signals that may come during one call before its error is told."""


def rename(source: Path, target: Path) -> None:
    """Give a file or folder another name; a file that has it is replaced."""
    moved = os.lstat(source)
    _repeated(lambda: source.replace(target), lambda: _is(target, moved))


def hardlink(name: Path, file: Path) -> None:
    """Give `file` the name `name` too."""
    named = os.lstat(file)
    _repeated(lambda: name.hardlink_to(file), lambda: _is(name, named))


def mkdir(path: Path, parents: bool = False, exist_ok: bool = False) -> None:
    """Make a folder, as `Path.mkdir` does."""
    _repeated(lambda: path.mkdir(parents=parents, exist_ok=exist_ok), path.is_dir)


def unlink(path: Path, missing_ok: bool = False) -> None:
    """Delete a file or a link."""
    _repeated(lambda: path.unlink(missing_ok=missing_ok), lambda: not os.path.lexists(path))


def rmdir(path: Path) -> None:
    """Delete an empty folder."""
    _repeated(path.rmdir, lambda: not os.path.lexists(path))


def rmtree(path: Path) -> None:
    """Delete a folder and all that is in it; of one that cannot go, all that can."""
    _repeated(lambda: _remove_all(path), lambda: not os.path.lexists(path))


def listed(folder: Path) -> list[str]:
    """The names of what a folder holds, in no order; there may be many."""
    entries: list[str] = []
    _repeated(lambda: entries.extend(os.listdir(folder)), lambda: False)  # noqa: PTH208
    return entries


def _remove_all(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except InterruptedError:
        raise
    except OSError:
        # It ended at the first entry that cannot be deleted; the others take room too.
        shutil.rmtree(path, ignore_errors=True)
        if os.path.lexists(path):
            raise


def _repeated(call: Callable[[], object], is_done: Callable[[], bool]) -> None:
    """Call until no signal interrupts it; after one, what is done already counts as done."""
    for _ in range(_ATTEMPTS):
        try:
            call()
        except InterruptedError:
            if is_done():
                return
        else:
            return
    call()


def _is(path: Path, known: os.stat_result) -> bool:
    """Whether `path` is what `known` was found of."""
    try:
        return os.path.samestat(os.lstat(path), known)
    except OSError:
        return False
