"""Paths that begin with ~, the user's home folder."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """`path` with the folder that ~ stands for; as it is where there is none.

    A file may be called `~old`, and nobody of that name may have a home; `Path.expanduser` raises
    a `RuntimeError` for it.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111
