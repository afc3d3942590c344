"""base.json: the base that an adapter was trained on, beside the adapter.

It holds the digest of the base's files, how their weights were quantised while the adapter was
trained, and in which type the step was computed. PEFT and other programs pass it over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.storage import durable
from engine.storage.safe_files import read_json_object

BASE_FILE = "base.json"


def write_base(directory: Path, record: dict[str, Any]) -> None:
    """Write `record` beside the adapter in `directory`."""
    durable.write_json(directory / BASE_FILE, record)


def read_base(directory: Path) -> dict[str, Any]:
    """What is known of the base of the adapter in `directory`; empty where nothing is."""
    path = directory / BASE_FILE
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); delete it to go on by the base's name alone."
        ) from error
