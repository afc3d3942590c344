"""The header of a safetensors file: read, checked and written.

    8 bytes        length N of the header, unsigned, little-endian
    N bytes        JSON: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...,
                          "__metadata__": {"string": "string"}}, padded with spaces
    the rest       the tensors, row-major, little-endian, without gaps

Source: https://github.com/huggingface/safetensors (README, "Format"). Its reader accepts more than
is good for a program that opens files of strangers: duplicate keys, names like "../x", thousands of
dimensions, a hundred megabytes of header. `read_header` refuses those before a tensor is touched,
in time bounded by the size of the header; `lay_out` never makes what `read_header` refuses.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from engine.errors import CheckpointError
from engine.storage.safe_files import MIB, STAND_IN_BYTES, refuse_stand_in
from engine.storage.strict_json import parse_object

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7: powers of two, the scales of some fp8 models
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 16 * MIB
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 8
MAX_DIMENSION = 2**31
_MOST_MARKS = {b"{": 2, b"[": 3, b",": 16}
"""At most so many of each for a tensor that fits, counted before parsing makes objects of them."""

_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,512}")
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `start` and `stop` are offsets in the file, not in its data part."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(
    handle: BinaryIO, size: int, source: str
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read and check the header of a safetensors file of `size` bytes, at its start.

    Returns the entries in the order of the file, and the metadata. Raises `CheckpointError`, which
    names `source`, what was found and what was expected.
    """
    length = int.from_bytes(handle.read(8), "little")
    if size < 10 or not 2 <= length <= min(MAX_HEADER, size - 8):
        handle.seek(0)
        refuse_stand_in(handle.read(STAND_IN_BYTES), source)
        raise CheckpointError(
            f"{source} is not a safetensors file, or is cut short: it holds {size} bytes and its "
            f"header claims {length}; expected at most {min(MAX_HEADER, max(size - 8, 0))}. "
            "Copy or download it again."
        )
    raw = handle.read(length)
    if not raw.lstrip(b" \t\r\n").startswith(b"{"):
        raise CheckpointError(f"{source}: its safetensors header does not start with '{{'.")
    for mark, most in _MOST_MARKS.items():
        if (count := raw.count(mark)) > most * MAX_TENSORS:
            raise CheckpointError(
                f"{source}: its safetensors header holds {count} of {mark.decode()!r}, more than "
                f"the {MAX_TENSORS} tensors that fit in one file can need."
            )
    header = parse_object(raw, f"{source} (its safetensors header)")
    metadata = _metadata(header.pop("__metadata__", None), source)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{source} names {len(header)} tensors; at most {MAX_TENSORS} fit.")
    base = 8 + length
    entries = {name: _entry(name, value, base, source) for name, value in header.items()}
    _refuse_gaps(entries, base, size, source)
    return dict(sorted(entries.items(), key=lambda item: item[1].start)), metadata


def lay_out(
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None,
    least: int = 0,
) -> tuple[bytes, dict[str, TensorEntry]]:
    """The header's bytes, with its length in front, and where each tensor goes in the file.

    The largest element types come first, so that every tensor is aligned to its own. Spaces fill
    the header up to `least` bytes.
    """
    if len(specs) > MAX_TENSORS:
        raise ValueError(f"{len(specs)} tensors are too many for one file; at most {MAX_TENSORS}")
    table: dict[str, Any] = {}
    if metadata:
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError("safetensors metadata maps strings to strings")
        table["__metadata__"] = dict(metadata)
    relative: dict[str, TensorEntry] = {}
    offset = 0
    for name in sorted(specs, key=lambda name: -specs[name][0].itemsize):
        dtype, shape = specs[name]
        if _NAME.fullmatch(name) is None or name == "__metadata__":
            raise ValueError(f"{name!r} cannot name a tensor; use letters, digits and _ . -")
        if dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} has type {dtype}, which no safetensors file holds")
        if len(shape) > MAX_DIMENSIONS or not all(1 <= size <= MAX_DIMENSION for size in shape):
            raise ValueError(f"tensor {name!r} has shape {list(shape)}, which cannot be saved")
        stop = offset + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        relative[name] = TensorEntry(dtype, shape, offset, stop)
        offset = stop
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * max(-len(text) % 8, least - 8 - len(text))
    base = 8 + len(text)
    entries = {
        name: TensorEntry(entry.dtype, entry.shape, entry.start + base, entry.stop + base)
        for name, entry in relative.items()
    }
    return len(text).to_bytes(8, "little") + text, entries


def _metadata(value: Any, source: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{source}: its __metadata__ does not map strings to strings.")
    return value


def _entry(name: str, value: Any, base: int, source: str) -> TensorEntry:
    if _NAME.fullmatch(name) is None:
        raise CheckpointError(
            f"{source}: {name[:80]!r} cannot name a tensor; expected letters, digits and _ . -"
        )
    if not isinstance(value, dict) or not set(value) >= _ENTRY_KEYS:
        raise CheckpointError(
            f"{source}: tensor {name!r} is described by {str(value)[:80]}; expected an object with "
            "dtype, shape and data_offsets."
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{source}: tensor {name!r} has the type {str(dtype)[:40]}; this program reads "
            f"{', '.join(DTYPES)}. Convert the model to BF16 or F16."
        )
    if not _integers(shape, 0, MAX_DIMENSION) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{source}: tensor {name!r} has the shape {str(shape)[:80]}; expected at most "
            f"{MAX_DIMENSIONS} whole numbers from 0 to {MAX_DIMENSION}."
        )
    if not _integers(offsets, 0, 2**62) or len(offsets) != 2:
        raise CheckpointError(
            f"{source}: tensor {name!r} has data_offsets {str(offsets)[:80]}; expected two offsets."
        )
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{source}: tensor {name!r} of type {dtype} and shape {shape} takes {needed} bytes; "
            f"its data_offsets {offsets} span {offsets[1] - offsets[0]}."
        )
    return TensorEntry(DTYPES[dtype], tuple(shape), base + offsets[0], base + offsets[1])


def _integers(value: Any, low: int, high: int) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and low <= item <= high
        for item in value
    )


def _refuse_gaps(entries: dict[str, TensorEntry], base: int, size: int, source: str) -> None:
    """Every byte behind the header belongs to exactly one tensor, or the file is refused."""
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap"
            raise CheckpointError(
                f"{source}: tensor {name!r} {what}: it starts at byte {entry.start}, "
                f"expected {position}."
            )
        position = entry.stop
    if position != size:
        what = "is cut short" if position > size else "has bytes after its last tensor"
        raise CheckpointError(
            f"{source} {what}: its header describes {position} bytes and the file holds {size}. "
            "Copy or download it again."
        )
