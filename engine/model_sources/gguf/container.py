"""Parse a GGUF file: metadata and tensor table, every number checked.

    4 bytes   "GGUF"
    u32       version, 2 or 3
    u64 u64   number of tensors, number of metadata entries
    entries   key (string), u32 value type, value
    tensors   name (string), u32 dimensions, u64 sizes (fastest first), u32 type, u64 offset
    padding   to a multiple of `general.alignment` (32 unless it is given)
    data      each tensor at its offset from here

A string is a u64 length and its bytes; an array is a u32 element type, a u64 count and its
elements. Everything is little-endian. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Readers of this format have been broken by counts, lengths and offsets that reach outside the file
(CVE-2025-53630, CVE-2026-7482). Here a count is compared with the bytes that are left before
anything is done `count` times, and a tensor's extent with the size of the file before it is used.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from engine.model_sources.gguf.metadata import check_kinds
from engine.storage.safe_files import MIB, open_regular

# ggml type -> (name, elements per block, bytes per block), from ggml.h.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
# Metadata value type -> numpy type; 8 is a string and 9 an array.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 65_536
_MAX_STRING = 16 * MIB
_MAX_ELEMENTS = 2**22
_MAX_TEXTS = 2**21
"""Of all arrays together; the largest vocabularies have a million tokens and merges."""
_MAX_DIMENSIONS = 4
_KEY = re.compile(r"[\x21-\x7e]{1,256}")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file: `shape` slowest dimension first, `start` an offset in the file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class GGUFFile:
    """The parsed file `path`: `metadata` (key -> value) and `tensors` (name -> `TensorInfo`).

    Numbers in the metadata are Python's, arrays of numbers numpy's, arrays of strings lists.
    Raises `CheckpointError` for a file that is damaged, cut short or built to mislead.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        descriptor = open_regular(self.path)
        with os.fdopen(descriptor, "rb") as handle:
            self.size = os.fstat(handle.fileno()).st_size
            if self.size < 24 or handle.read(4) != b"GGUF":
                raise CheckpointError(f"{self.path} is not a GGUF file, or is cut short.")
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        self._position = 4
        self._texts = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._parse()
        except struct.error as error:
            raise self._damaged("the file ends inside its header") from error

    def raw(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The stored bytes of tensor `name`, as a read-only view of the mapped file."""
        info = self.tensors[name]
        return np.frombuffer(self._map, dtype=np.uint8, count=info.size, offset=info.start)

    def release(self, name: str) -> None:
        """Let the system drop the pages of tensor `name`; they are read again when needed."""
        info = self.tensors[name]
        if hasattr(mmap, "MADV_DONTNEED"):
            start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, info.start + info.size - start)

    def _parse(self) -> None:
        version = self._unpack("<I")
        if version not in (2, 3):
            raise self._damaged(
                f"its version is {version}; versions 2 and 3, little-endian, are read"
            )
        tensors, entries = self._unpack("<Q"), self._unpack("<Q")
        if tensors > _MAX_ENTRIES or entries > _MAX_ENTRIES:
            raise self._damaged(f"it claims {tensors} tensors and {entries} metadata entries")
        for _ in range(entries):
            key = self._key()
            if key in self.metadata:
                raise self._damaged(f"the metadata key {key!r} stands there twice")
            self.metadata[key] = self._value(self._unpack("<I"), key)
        misfit = check_kinds(self.metadata)
        if misfit is not None:
            raise self._damaged(misfit)
        table = [self._tensor_info() for _ in range(tensors)]
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or not 1 <= align <= 4096 or align & (align - 1):
            raise self._damaged(
                f"general.alignment is {align!r}; expected a power of two up to 4096"
            )
        self._set_offsets(table, -(-self._position // align) * align, align)

    def _set_offsets(self, table: list[tuple[str, TensorInfo]], base: int, align: int) -> None:
        """Turn offsets into positions in the file; refuse overlaps and what lies outside it."""
        stop, last = base, ""
        for name, info in sorted(table, key=lambda item: item[1].start):
            if name in self.tensors:
                raise self._damaged(f"tensor {name!r} stands there twice")
            start = base + info.start
            if info.start % align or start + info.size > self.size:
                raise self._damaged(
                    f"tensor {name!r} is said to lie at bytes {start} to {start + info.size}, in a "
                    f"file of {self.size} bytes and steps of {align}"
                )
            if start < stop:
                raise self._damaged(f"tensors {last!r} and {name!r} overlap")
            stop, last = start + info.size, name
            self.tensors[name] = TensorInfo(info.kind, info.shape, start, info.size)
        self.tensors = {name: self.tensors[name] for name, _ in table}

    def _tensor_info(self) -> tuple[str, TensorInfo]:
        name = self._key()
        dimensions = self._unpack("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._unpack("<Q") for _ in range(dimensions))[::-1]
        kind, offset = self._unpack("<I"), self._unpack("<Q")
        if not all(1 <= size <= 2**31 for size in shape):
            raise self._damaged(f"tensor {name!r} has the shape {list(shape)}")
        if kind not in GGML_TYPES:
            raise self._damaged(f"tensor {name!r} has the unknown type number {kind}")
        title, block, width = GGML_TYPES[kind]
        if shape[-1] % block:
            raise self._damaged(
                f"tensor {name!r} of type {title} has rows of {shape[-1]}, no multiple of {block}"
            )
        return name, TensorInfo(title, shape, offset, math.prod(shape) // block * width)

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            # Descriptions in the wild are cut in the middle of a character; nothing hangs on them.
            return self._bytes(key).decode("utf-8", errors="replace")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._damaged(f"{key} has the unknown value type {kind}")
        return self._numbers(_SCALARS[kind], 1, key)[0].item()

    def _array(self, key: str) -> list[str] | np.ndarray[Any, Any]:
        kind, count = self._unpack("<I"), self._unpack("<Q")
        if kind in _SCALARS:
            return self._numbers(_SCALARS[kind], count, key)
        if kind != _STRING:
            raise self._damaged(f"{key} is an array of the value type {kind}")
        self._check_count(count, 8, key)
        self._texts += count
        if self._texts > _MAX_TEXTS:
            raise self._damaged(
                f"its arrays hold over {_MAX_TEXTS} texts, more than any vocabulary"
            )
        try:
            return [self._bytes(key).decode("utf-8") for _ in range(count)]
        except UnicodeDecodeError as error:
            raise self._damaged(f"{key} holds a text that is not UTF-8") from error

    def _numbers(self, dtype: str, count: int, key: str) -> np.ndarray[Any, Any]:
        width = np.dtype(dtype).itemsize
        self._check_count(count, width, key)
        values = np.frombuffer(self._map, dtype=dtype, count=count, offset=self._position).copy()
        self._position += count * width
        return values

    def _check_count(self, count: int, width: int, key: str) -> None:
        left = self.size - self._position
        if count > _MAX_ELEMENTS or count * width > left:
            raise self._damaged(f"{key} claims {count} elements with {left} bytes left in the file")

    def _key(self) -> str:
        key = self._bytes("a name").decode("latin-1")
        if _KEY.fullmatch(key) is None:
            raise self._damaged(f"{key[:60]!r} cannot name a tensor or a metadata entry")
        return key

    def _bytes(self, what: str) -> bytes:
        length = self._unpack("<Q")
        stop = self._position + length
        if length > _MAX_STRING or stop > self.size:
            raise self._damaged(f"{what} claims {length} bytes of text")
        text = self._map[self._position : stop]
        self._position = stop
        return text

    def _unpack(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._map, self._position)
        self._position += struct.calcsize(form)
        return int(value)

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a sound GGUF file: {what} (near byte {self._position}). "
            "Download it again."
        )
