"""Open files that may be compressed: gzip, bzip2, xz, Zstandard."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from engine.errors import DataError

GZIP, BZIP2, XZ, ZSTANDARD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises."""

_MOST_TIMES, _ALWAYS_ALLOWED = 100, 32 * 2**20


def open_plain(path: Path) -> BinaryIO:
    """The file's bytes, decompressed as they are read.

    Raises `READ_ERRORS`, and `DataError` once it unpacks to far more than rows do.
    """
    with path.open("rb") as stream:
        head = stream.read(6)
    unpack = _unpacker(head, path)
    if unpack is None:
        return path.open("rb")
    return cast(BinaryIO, io.BufferedReader(_Unpacked(unpack(path), path), 1 << 20))


def _unpacker(head: bytes, path: Path) -> Callable[[Path], Any] | None:
    """What opens a file with such a head; None for a plain one."""
    if head.startswith(ZSTANDARD):
        return _open_zstandard
    if head.startswith(GZIP) or path.name.lower().endswith(".gz"):
        return gzip.open
    if head.startswith(BZIP2):
        return bz2.open
    return lzma.open if head.startswith(XZ) else None


def is_compressed(path: Path) -> bool:
    """Whether the file is compressed, by its first bytes."""
    with path.open("rb") as stream:
        return stream.read(6).startswith((GZIP, BZIP2, XZ, ZSTANDARD))


class _Unpacked(io.RawIOBase):
    """What a file unpacks to, as Python's buffered readers want it: not without end.

    A file of two megabytes can unpack to two gigabytes of spaces, or to a million gigabytes.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path = stream, path
        self._read, self._most = 0, max(_ALWAYS_ALLOWED, _MOST_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._stream.read(len(view))
        view[: len(data)] = data
        self._read += len(data)
        if self._read > self._most:
            raise DataError(
                f"{self._path}: the file unpacks to more than {self._most / 2**20:.0f} MiB, over "
                f"{_MOST_TIMES} times its size, where rows unpack to 3 to 30 times theirs: it may "
                "be made to fill memory and time. If it is as it should be, unpack it yourself and "
                "name the result."
            )
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _open_zstandard(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: this is a Zstandard file, which is read with pyarrow: pip install "
            f"'engine-trainer[data]'. Or decompress it: zstd -d '{path}'"
        ) from None
    source = pyarrow.OSFile(str(path), "rb")
    return pyarrow.CompressedInputStream(source, "zstd")
