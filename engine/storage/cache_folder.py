"""The folder for what can be made again: indices and tokenised rows."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

from engine.storage import names
from engine.storage.home import expanded


def cache_folder(name: str) -> Path:
    """`$ENGINE_CACHE/<name>`, else `$XDG_CACHE_HOME/engine/<name>`, else below `~/.cache`.

    It is made if it is not there.

    Where that cannot be written to, a folder of this process that goes with it.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "engine"
    folder = expanded(os.environ.get("ENGINE_CACHE") or base) / name
    try:
        names.mkdir(folder, parents=True, exist_ok=True)
    except OSError:
        return Path(_own_folder().name)
    return folder if os.access(folder, os.W_OK) else Path(_own_folder().name)


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="engine-cache-")
