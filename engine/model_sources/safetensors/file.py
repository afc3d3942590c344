"""Safetensors files: a reader that maps them, and durable writers.

The format and what is refused of it stand in `engine.model_sources.safetensors.header`.

`SafetensorsFile` maps the file and hands out views of the mapping: opening a model reads only its
header, and pages come from the disk as they are used. The mapping is private (copy on write), so
torch sees writable memory and nothing that is written to a view can reach the file.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch

from engine.errors import CheckpointError
from engine.model_sources.safetensors.header import TensorEntry, lay_out, read_header
from engine.storage.durable import describe, replacing
from engine.storage.safe_files import open_regular, reading


class SafetensorsFile:
    """An open safetensors file. Views that `tensor` returns keep the mapping alive by themselves.

    Raises `CheckpointError` from the constructor for anything that `read_header` refuses, and from
    the other methods for a name that the file does not hold.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        descriptor = open_regular(self.path)
        with reading(self.path), os.fdopen(descriptor, "rb") as handle:
            self.size = os.fstat(handle.fileno()).st_size
            self._entries, self.metadata = read_header(handle, self.size, str(self.path))
            self._map = _map_private(handle.fileno(), str(self.path))

    def keys(self) -> list[str]:
        """Names of all tensors, in the order of the file."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Element type of tensor `name`."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` on the CPU, as a view of the mapped file.

        Writing to it is allowed, changes memory only, and copies the pages that are written.
        """
        entry = self._entry(name)
        width = entry.dtype.itemsize
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.start % width:
            raw = torch.frombuffer(
                self._map, dtype=torch.uint8, offset=entry.start, count=entry.stop - entry.start
            )
            return raw.clone().view(entry.dtype).reshape(entry.shape)
        count = (entry.stop - entry.start) // width
        flat = torch.frombuffer(self._map, dtype=entry.dtype, offset=entry.start, count=count)
        return flat.reshape(entry.shape)

    def release(self, name: str) -> None:
        """Let the system drop the pages of tensor `name` from this process.

        Call it when no view of the tensor is needed any more: what was written to one is lost,
        while a view that was only read stays right (it is read from the disk again).
        """
        entry = self._entry(name)
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = entry.stop // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise CheckpointError(f"{self.path} holds no tensor named {name!r}.")
        return self._entries[name]


class SafetensorsWriter:
    """Write a safetensors file tensor by tensor, in any order, into place on `close`.

    `specs` says name -> (dtype, shape) of every tensor that will come. Those named in `open_length`
    are bytes (n,), of which fewer may come; they wait in memory for the end of the file. Use it
    as a context manager: an exception inside removes the temporary file. No other tensor is held in
    memory.
    Raises `ValueError` for a name, shape or type that the format or `read_header` does not allow,
    and `CheckpointError` if the disk refuses.
    """

    def __init__(
        self,
        path: Path | str,
        specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
        open_length: Collection[str] = (),
    ) -> None:
        # Behind all others, so that theirs stay where they are.
        self._specs = {name: spec for name, spec in specs.items() if name not in open_length}
        self._specs |= {name: specs[name] for name in open_length}
        self._metadata, self._open = metadata, dict.fromkeys(open_length, torch.empty(0))
        header, self._entries = lay_out(self._specs, metadata)
        self._header_size = len(header)
        size = max((entry.stop for entry in self._entries.values()), default=len(header))
        self._missing = set(self._entries)
        self._path = Path(path)
        with ExitStack() as stack:
            self._handle = stack.enter_context(replacing(self._path, size))
            self._handle.write(header)
            self._stack = stack.pop_all()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write tensor `name`, once. Raises `ValueError` if it is not as announced."""
        entry = self._announced(name)
        fits = tuple(tensor.shape) == entry.shape or (
            name in self._open and tensor.dim() == 1 and 0 < len(tensor) <= entry.shape[0]
        )
        if tensor.dtype != entry.dtype or not fits:
            raise self._misfit(name, tensor)
        if name in self._open:
            self._open[name] = tensor.clone()
        else:
            self._handle.seek(entry.start)
            self._handle.write(tensor_bytes(tensor))
        self._missing.remove(name)

    def write_parts(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Write tensor `name` as parts of consecutive rows, once.

        Raises `ValueError` for parts that are not together what was announced.
        """
        entry = self._announced(name)
        self._handle.seek(entry.start)
        rows = 0
        for part in parts:
            rows += part.shape[0] if part.dim() else 1
            fits = tuple(part.shape[1:]) == entry.shape[1:] and part.dim() == len(entry.shape)
            if part.dtype != entry.dtype or not fits or rows > (*entry.shape, 1)[0]:
                raise self._misfit(name, part)
            self._handle.write(tensor_bytes(part))
            del part  # Else it stays in memory while the next is made.
        if rows != (*entry.shape, 1)[0]:
            raise ValueError(
                f"tensor {name!r} has {rows} rows of the {list(entry.shape)} announced"
            )
        self._missing.remove(name)

    def _announced(self, name: str) -> TensorEntry:
        entry = self._entries.get(name)
        if entry is None or name not in self._missing:
            what = "was not announced" if entry is None else "was written before"
            raise ValueError(f"tensor {name!r} {what} for {self._path}")
        return entry

    def _misfit(self, name: str, tensor: torch.Tensor) -> ValueError:
        entry = self._entries[name]
        return ValueError(
            f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}; "
            f"announced was {entry.dtype} {list(entry.shape)}"
        )

    def close(self) -> None:
        """Publish the file. Raises `ValueError`, and leaves no file, if a tensor is missing."""
        if self._missing:
            error = ValueError(f"never written to {self._path}: {', '.join(sorted(self._missing))}")
            self._stack.__exit__(type(error), error, None)
            raise error
        if self._open:
            self._write_open()
        self._stack.close()

    def _write_open(self) -> None:
        """Write the tensors that waited, and the header anew: shorter, padded to its length."""
        lengths = {name: (t.dtype, tuple(t.shape)) for name, t in self._open.items()}
        header, entries = lay_out(self._specs | lengths, self._metadata, self._header_size)
        for name, tensor in self._open.items():
            self._handle.seek(entries[name].start)
            self._handle.write(tensor_bytes(tensor))
        self._handle.truncate(max(entry.stop for entry in entries.values()))
        self._handle.seek(0)
        self._handle.write(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._stack.__exit__(kind, *rest)


def save_file(
    tensors: Mapping[str, torch.Tensor], path: Path | str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` to `path` durably, replacing what stood there.

    Raises `ValueError` for what the format does not allow (see `SafetensorsWriter`), and
    `CheckpointError` if the disk refuses.
    """
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of `tensor`, row-major, as bytes; copies only if it must."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw: Any = flat.view(torch.uint8).numpy()
    return memoryview(raw)


def _map_private(descriptor: int, source: str) -> mmap.mmap:
    """Map the whole file copy-on-write; swap is not reserved for pages nobody writes."""
    if sys.byteorder != "little":
        raise CheckpointError(f"{source} is little-endian, and this machine is not.")
    try:
        if sys.platform == "linux":
            no_reserve = 0x4000  # MAP_NORESERVE, which the mmap module does not name
            return mmap.mmap(
                descriptor,
                0,
                flags=mmap.MAP_PRIVATE | no_reserve,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        told = describe(error) if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"Cannot map {source} into memory: {told}.") from error
