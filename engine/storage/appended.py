"""A file of lines that grows, and is synced before each checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from engine.storage import durable
from engine.storage.safe_files import append_regular


class AppendedLines:
    """Writes `path` anew with `earlier` lines, and appends to it from then on.

    Raises `OSError` if the file cannot be written.
    """

    def __init__(self, path: Path, earlier: bytes = b"") -> None:
        self.path = path
        durable.write_bytes(path, earlier)
        self._file = append_regular(path)

    def append(self, text: str) -> None:
        """Append whole lines; a reader sees them from then on."""
        self._file.write(text)
        self._file.flush()

    def sync(self) -> None:
        """Bring every line to the disk; before a checkpoint, which must not know more of them.

        Raises `CheckpointError` where the disk refuses.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise durable.write_error(self.path, error) from error

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()
