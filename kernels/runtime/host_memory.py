"""Tensors that stay in the host's memory while a GPU computes.

They are pinned, so that a copy engine reads and writes them while the GPU works on. Where the
device is the CPU itself there is nothing to move.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.runtime.device import has_streams, upload
from kernels.runtime.simulation import simulation


def host_copy(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x in the host's memory, pinned where there is a GPU; never the memory of x itself."""
    return host_empty(x, dtype).copy_(x)


def host_empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory of the host for a tensor like x, pinned where there is a GPU."""
    active = simulation()
    if active is not None:
        return active.host_tensor(x.shape, dtype or x.dtype)
    pin = torch.cuda.is_available()
    return torch.empty(x.shape, dtype=dtype or x.dtype, device="cpu", pin_memory=pin)


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

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let the computation's stream wait for a copy; the host goes on."""
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)


def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for copies beside the computation; None where there are no streams."""
    return torch.cuda.Stream(device) if has_streams(device) else None
