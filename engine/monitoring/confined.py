"""Files that lie in a run, not where a link leads.

What the page reads it shows, and a directory that came from elsewhere may hold a link to a secret.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.storage.safe_files import json_object_or_empty, leads_outside


def is_own_file(path: Path) -> bool:
    """Whether `path` is a file, and no link out of the directory that it stands in."""
    return path.is_file() and not leads_outside(path)


def own_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where there is none, or it lies elsewhere."""
    return json_object_or_empty(path) if is_own_file(path) else {}
