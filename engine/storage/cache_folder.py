"""The folder for what can be made again: indices and tokenised rows."""

from __future__ import annotations

import os
import re
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


def keep_newest(folder: Path, ending: str, most: int) -> None:
    """Delete all but the newest of the files that a cache named by their keys, and no other file.

    A folder that the user named may hold files of theirs with the same ending.
    """
    own = re.compile(f"[0-9a-f]{{64}}{re.escape(ending)}")
    files = [folder / name for name in names.listed(folder) if own.fullmatch(name)]
    for file in sorted(files, key=lambda path: path.lstat().st_mtime, reverse=True)[most:]:
        names.unlink(file, missing_ok=True)


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="engine-cache-")
