"""Tensors that stay in the host's memory while a GPU computes.

They are pinned, so that a copy engine reads and writes them while the GPU works on. What stays as
long as the model (`host_empty`) is plain memory that is registered with CUDA, exact to a page:
torch's own pinned allocator rounds every request up to a power of two. What comes and goes in every
step (`host_buffer`) is torch's, which uses its blocks again and waits for the copies that read
them; registering would cost more than the copy. Where the device is the CPU itself there is nothing
to move.
"""

from __future__ import annotations

import logging
import math
import mmap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kernels.runtime.device import has_streams, upload
from kernels.runtime.simulation import simulation

_log = logging.getLogger(__name__)
_REGISTERED_FOR_ALL = 1
"""`cudaHostRegisterPortable`: pinned for every GPU of the process."""


def host_copy(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x in the host's memory, pinned where there is a GPU; never the memory of x itself."""
    return host_empty(x, dtype).copy_(x)


def host_empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory of the host for a tensor like x, pinned where there is a GPU.

    It takes its bytes, to a page.
    """
    dtype = dtype or x.dtype
    active = simulation()
    if active is not None:
        return active.host_tensor(x.shape, dtype, paged_bytes(x.numel() * dtype.itemsize))
    if not torch.cuda.is_available():
        return torch.empty(x.shape, dtype=dtype, device="cpu")
    return registered(x.shape, dtype, torch.cuda.cudart())


def host_buffer(x: Tensor) -> Tensor:
    """Uninitialised memory of the host for a tensor like x that goes there and back in one step.

    Pinned where there is a GPU. Its bytes are rounded up to a power of two, and used again.
    """
    active = simulation()
    if active is not None:
        return active.host_tensor(x.shape, x.dtype, cached_bytes(x.numel() * x.dtype.itemsize))
    pin = torch.cuda.is_available()
    return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=pin)


def paged_bytes(nbytes: int) -> int:
    """What `nbytes` of registered memory take: whole pages."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def cached_bytes(nbytes: int) -> int:
    """What `nbytes` take of torch's pinned allocator: a power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


class _Registered(mmap.mmap):
    """Pages that are pinned until they are freed."""

    release: Callable[[], object] | None = None

    def __del__(self) -> None:
        if self.release is not None:
            self.release()


def registered(shape: Sequence[int], dtype: torch.dtype, runtime: Any) -> Tensor:
    """Uninitialised memory of the host, pinned by `runtime`, CUDA's runtime library.

    Where the system refuses to pin it, it is ordinary memory, and a warning says that copies will
    not overlap with computation.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    pages = _Registered(-1, paged_bytes(nbytes))
    tensor = torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(tuple(shape))
    address = tensor.data_ptr()
    status = int(runtime.cudaHostRegister(address, len(pages), _REGISTERED_FOR_ALL))
    if status == 0:
        unregister = runtime.cudaHostUnregister
        pages.release = lambda: unregister(address)
    else:
        _log.warning(
            "CUDA could not pin %d bytes of host memory (error %d): copies from it do not overlap "
            "with computation", nbytes, status,
        )  # fmt: skip
    return tensor


def gather_rows(table: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """Rows `index` (N,) of `table` (V, H) in the host's memory, as (N, H) on `device`."""
    rows = table.index_select(0, index.to(table.device))
    return rows if rows.device == device else upload(rows, device)


class SideCopies:
    """Copies between a GPU and the host beside the computation, on a stream of their own.

    What is copied was allocated on the stream of the computation and is waited for there, so the
    allocator may reuse its memory in that stream's order and needs no further care. Every copy
    starts when the computation that was queued before it is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = copy_stream(device)

    def start(self, pairs: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """Copy each (target, source); returns what `wait` takes. Without streams it is done now."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def following(self) -> AbstractContextManager[object]:
        """What is queued inside the block follows the copies that were started."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the computation's stream wait for a copy; the host goes on."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


class SideUploads:
    """Uploads beside the computation, which they need not follow, on a stream of their own.

    Their memory is of that stream, so no kernel that is queued can be using it still, and a copy
    starts at once. It serves the computation's stream from `wait` on: the allocator is told.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, source: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A tensor on the device that `wait` completes; the host does not wait."""
        with torch.cuda.stream(self._stream):
            target = upload(source, self._device)
        event = torch.cuda.Event()
        event.record(self._stream)
        return target, event

    def wait(self, target: Tensor, event: torch.cuda.Event) -> Tensor:
        """`target`, which the computation's stream waits for and may read; the host goes on."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        target.record_stream(stream)
        return target


def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for copies beside the computation; None where there are no streams."""
    return torch.cuda.Stream(device) if has_streams(device) else None
