"""Where every line of a file begins, found once and remembered.

The index is a file of little-endian 64-bit offsets behind a header of JSON. It is used again only
for the same path, size and time of change. While the file is scanned its content is hashed: the
digest is the SHA-256 of the CRC-32 of every 8 MiB, which notices any change and costs a tenth of
hashing everything with SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.errors import CheckpointError, DataError
from engine.storage import durable, names, strict_json
from engine.storage.safe_files import open_regular

_HEADER = 4096
_CHUNK = 8 << 20
_VERSION = 1
_OFFSET = 8


@dataclass(frozen=True)
class LineIndex:
    """The lines of a file, each to be read by its number.

    Attributes:
        path: of the file.
        index: of the offsets.
        count: lines in the file; a last line without a line end counts.
        digest: of the file's content.
    """

    path: Path
    index: Path
    count: int
    digest: str

    def size(self, number: int) -> int:
        """Bytes of one line, counted from 0, with what ends it."""
        start, end = self._bounds(number)
        return end - start

    def line(self, number: int) -> bytes:
        """One line, counted from 0, with what ends it. Raises `DataError` if the file changed."""
        start, end = self._bounds(number)
        data = os.pread(self._file, end - start, start)
        if len(data) != end - start:
            raise DataError(f"{self.path}: the file became shorter while it was read.")
        return data

    def _bounds(self, number: int) -> tuple[int, int]:
        """Where a line begins and ends."""
        bounds = os.pread(self._offsets, 2 * _OFFSET, _HEADER + number * _OFFSET)
        start, end = np.frombuffer(bounds, dtype="<u8").tolist()
        return start, end

    @cached_property
    def _file(self) -> int:
        return os.open(self.path, os.O_RDONLY)

    @cached_property
    def _offsets(self) -> int:
        return os.open(self.index, os.O_RDONLY)

    def close(self) -> None:
        """Close both files; a later read opens them again."""
        for name in ("_file", "_offsets"):
            descriptor = self.__dict__.pop(name, None)
            if descriptor is not None:
                os.close(descriptor)


def index_lines(path: Path, folder: Path) -> LineIndex:
    """The lines of a file, from an index in `folder` if there is one of this very file.

    Raises `DataError` where the file cannot be read, `CheckpointError` where the index cannot be
    written.
    """
    try:
        facts = _facts(path)
        key = hashlib.sha256(os.fsencode(facts["path"])).hexdigest()
        target = folder / f"{key[:24]}.lines"
        known = _stored(target, facts)
        if known is None:
            names.mkdir(folder, parents=True, exist_ok=True)
            known = _scan(path, target, facts)
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error}).") from error
    return LineIndex(path, target, known["count"], known["digest"])


def _facts(path: Path) -> dict[str, Any]:
    """What an index must have been made of to be used."""
    status = path.stat()
    return {
        "version": _VERSION,
        "path": str(path.resolve()),
        "size": status.st_size,
        "changed": status.st_mtime_ns,
        "node": status.st_ino,
    }


def _stored(target: Path, facts: dict[str, Any]) -> dict[str, Any] | None:
    try:
        with os.fdopen(open_regular(target), "rb") as file:
            header = strict_json.loads(file.read(_HEADER).decode())
            whole = os.fstat(file.fileno()).st_size
    except (CheckpointError, OSError, ValueError):
        return None
    if not isinstance(header, dict) or any(header.get(key) != facts[key] for key in facts):
        return None
    lines = header.get("count")
    fits = type(lines) is int and whole == _HEADER + _OFFSET * (lines + 1)
    return header if fits and isinstance(header.get("digest"), str) else None


def _scan(path: Path, target: Path, facts: dict[str, Any]) -> dict[str, Any]:
    digest = hashlib.sha256()
    count, last, size = 0, 0, 0
    with path.open("rb") as file, durable.replacing(target) as out:
        out.write(bytes(_HEADER))
        out.write(bytes(_OFFSET))  # the first line begins at 0
        for chunk in _chunks(file):
            digest.update(zlib.crc32(chunk).to_bytes(4, "little"))
            ends = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10) + (size + 1)
            out.write(ends.astype("<u8").tobytes())
            count += len(ends)
            size += len(chunk)
            last = int(ends[-1]) if len(ends) else last
        if last != size:
            out.write(size.to_bytes(_OFFSET, "little"))
            count += 1
        if size != facts["size"]:
            raise CheckpointError(f"{path} changed while it was read; try again.")
        digest.update(size.to_bytes(8, "little"))
        header = facts | {"count": count, "digest": digest.hexdigest()}
        text = json.dumps(header).encode()
        if len(text) > _HEADER:
            raise CheckpointError(f"{path}: the path is too long to be indexed.")
        out.seek(0)
        out.write(text.ljust(_HEADER))
    return header


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk
