"""Paths as users give them: with ~, or with links."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """`path` with the folder that ~ stands for; as it is where there is none.

    A file may be called `~old`, and nobody of that name may have a home; `Path.expanduser` raises
    a `RuntimeError` for it.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111


def real(path: str | Path) -> Path:
    """`path` without links in it; as far as it goes where links lead in a circle.

    `Path.resolve` raises a `RuntimeError` for a circle; what opens the path is told by the system.
    """
    return Path(os.path.realpath(path))


def is_text(path: Path) -> bool:
    """Whether a name is UTF-8, as records and settings hold it."""
    return not any("\ud800" <= sign <= "\udfff" for sign in str(path))


def can_be_named(path: str | Path) -> bool:
    """Whether the system takes this name: no zero byte in it, no half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False
