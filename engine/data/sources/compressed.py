"""Open files that may be compressed: gzip, bzip2, xz, Zstandard."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO, cast

from engine.errors import DataError

GZIP, BZIP2, XZ, ZSTANDARD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"
SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a damaged file raises."""


def open_plain(path: Path) -> BinaryIO:
    """The file's bytes, decompressed as they are read. Raises `READ_ERRORS`."""
    with path.open("rb") as stream:
        head = stream.read(6)
    if head.startswith(ZSTANDARD):
        return _open_zstandard(path)
    if head.startswith(GZIP) or path.name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if head.startswith(BZIP2):
        return cast(BinaryIO, bz2.open(path, "rb"))
    return cast(BinaryIO, lzma.open(path, "rb")) if head.startswith(XZ) else path.open("rb")


def is_compressed(path: Path) -> bool:
    """Whether the file is compressed, by its first bytes."""
    with path.open("rb") as stream:
        return stream.read(6).startswith((GZIP, BZIP2, XZ, ZSTANDARD))


class _Raw(io.RawIOBase):
    """Another library's stream, as Python's buffered readers want one."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self._stream.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _open_zstandard(path: Path) -> BinaryIO:
    try:
        import pyarrow
    except ImportError:
        raise DataError(
            f"{path}: this is a Zstandard file, which is read with pyarrow: pip install "
            f"'engine-trainer[data]'. Or decompress it: zstd -d '{path}'"
        ) from None
    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd")
    return cast(BinaryIO, io.BufferedReader(_Raw(stream), 1 << 20))
