"""A file of lines that grows, and is synced before each checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

from engine.errors import CheckpointError
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
            raise CheckpointError(
                f"The disk did not confirm the lines of {self.path}: {durable.describe(error)}. "
                "The checkpoint that was to follow was not written; those before it are safe. "
                "Check that disk, and go on with `engine resume`."
            ) from error

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()
