"""Outputs replace nothing but what the same verb wrote."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, ConfigError
from engine.storage import strict_json
from engine.storage.durable import writing
from engine.storage.safe_files import open_regular

_HEAD = 1 << 22
"""Bytes of a file that are read to tell whose it is."""


def refuse_sources(outputs: Iterable[Path | None], sources: Iterable[Path]) -> None:
    """Raise `ConfigError` where an output is one of the sources, by whatever name or link."""
    read = list(sources)
    for output in outputs:
        if output is not None and any(is_same_file(output, source) for source in read):
            raise ConfigError(f"{output} is one of the sources; name another output.")


def is_same_file(first: Path, second: Path) -> bool:
    """Whether two names are of one file that exists, also through links."""
    return first.exists() and second.exists() and first.samefile(second)


def refuse_unwritable(output: Path) -> None:
    """Raise `CheckpointError` unless a file can be written there; leaves nothing behind."""
    with writing(output):
        try_to_write(output.absolute().parent)


def try_to_write(folder: Path) -> None:
    """Make a file in a folder, or in the nearest above it that exists, and leave nothing there.

    Raises the system's `OSError`.
    """
    with tempfile.TemporaryFile(dir=nearest_folder(folder)):
        pass


def nearest_folder(target: Path) -> Path:
    """`target`, or the nearest folder above it that exists. `NotADirectoryError` for a file."""
    for folder in (target, *target.absolute().parents):
        if folder.is_dir():
            return folder
        if folder.exists() or folder.is_symlink():
            raise NotADirectoryError(20, "Not a directory", str(folder))
    return Path.cwd()


def refuse_foreign(
    output: Path, is_own: Callable[[Path], bool], kind: str, overwrite: bool = False
) -> None:
    """Raise `ConfigError` where a file stands that `is_own` does not know for such an output.

    `kind` says what is written, as in "a report". With `overwrite` any file is replaced.
    """
    if not (output.exists() or output.is_symlink()):
        return
    if (output.exists() and not output.is_file()) or not (overwrite or is_own(output)):
        raise ConfigError(
            f"{output} exists already, and it is not {kind} that engine wrote. Nothing was "
            "written; name another file, or move the old one away."
        )


def has_keys(*keys: str) -> Callable[[Path], bool]:
    """A test of files: whether the text, or its first line, is a JSON object with all of these."""

    def test(path: Path) -> bool:
        data = _head(path)
        return any(set(keys) <= _object(text).keys() for text in (data, data.split(b"\n", 1)[0]))

    return test


def _object(text: bytes) -> Mapping[str, Any]:
    try:
        value = strict_json.loads(text.decode())
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _head(path: Path) -> bytes:
    """The first bytes of a regular file; none of what cannot be read."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            return file.read(_HEAD)
    except (OSError, CheckpointError):
        return b""


def starts_with(path: Path, *parts: bytes) -> bool:
    """Whether a file's first bytes hold all of these, the first one at the front."""
    head = _head(path)[:1024]
    return head.startswith(parts[0]) and all(part in head for part in parts)
