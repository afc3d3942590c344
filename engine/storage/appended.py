"""A file of lines that grows, and is synced before each checkpoint."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from engine.errors import CheckpointError
from engine.storage import durable
from engine.storage.safe_files import append_regular


class AppendedLines:
    """Writes `path` anew with `earlier` lines, and appends to it from then on.

    Raises `CheckpointError` if the file cannot be written.
    """

    def __init__(self, path: Path, earlier: bytes = b"") -> None:
        self.path = path
        durable.write_bytes(path, earlier)
        with durable.writing(path):
            self._file = append_regular(path)

    def append(self, text: str) -> None:
        """Append whole lines; a reader sees them from then on."""
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise self._refused(error) from error

    def sync(self) -> None:
        """Bring every line to the disk; before a checkpoint, which must not know more of them.

        Raises `CheckpointError` where the disk refuses.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"Cannot append to {self.path}: {durable.describe(error)}. The lines before are safe, "
            "and so is every checkpoint that stands. Check that disk or make room on it, and go on "
            "with `engine resume`."
        )

    def close(self) -> None:
        """Close the file; a second call does nothing.

        What could not be appended was reported then, and is tried here once more.
        """
        with contextlib.suppress(OSError):
            self._file.close()
