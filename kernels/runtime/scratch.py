"""Reused working memory for values that live only inside one op.

A dequantised weight is needed for the length of one or two matrix products. Allocating it anew
every time costs page faults on a CPU and fragmentation on a GPU, so each purpose has one buffer
per device and dtype that grows to the largest request and is handed out again and again. A buffer
is valid until the next request for the same purpose; nothing taken from here may be saved for
backward.
"""

from __future__ import annotations

import torch

_buffers: dict[tuple[str, torch.device, torch.dtype], torch.Tensor] = {}


def buffers() -> list[torch.Tensor]:
    """The buffers that there are now. Recorded launches keep those they were recorded with."""
    return list(_buffers.values())


def scratch(
    purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An uninitialised tensor of `shape` that shares memory with earlier ones of `purpose`."""
    numel = 1
    for size in shape:
        numel *= size
    key = (purpose, device, dtype)
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < numel:
        del buffer  # with the next line the old one is gone before the new one comes
        _buffers.pop(key, None)
        buffer = _buffers[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel].view(shape)


def release() -> None:
    """Free every buffer, for a process that goes on to something else."""
    _buffers.clear()
