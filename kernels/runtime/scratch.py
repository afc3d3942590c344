"""Reused working memory for values that live only inside one op.

A dequantised weight is needed for the length of one or two matrix products. Allocating it anew
every time costs page faults on a CPU and fragmentation on a GPU, so each purpose has one buffer
per device and dtype that grows to the largest request and is handed out again and again. A buffer
is valid until the next request for the same purpose; nothing taken from here may be saved for
backward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from kernels.runtime.simulation import Scoped

Pool = dict[tuple[str, torch.device, torch.dtype], torch.Tensor]
"""Buffers by purpose, device and dtype."""


class ScratchObserver:
    """Is told who takes scratch memory; here nothing happens."""

    def allocating(self, purpose: str) -> AbstractContextManager[None]:
        """Entered while a buffer of `purpose` is freed and a larger one allocated."""
        return nullcontext()


_pool: Scoped[Pool] = Scoped("scratch pool", {})
_observer: Scoped[ScratchObserver] = Scoped("scratch observer", ScratchObserver())

pool = _pool.get
use_pool = _pool.use
"""A context in which this thread takes scratch from another pool; the process's stays as it is."""

observe_scratch = _observer.use
"""A context in which an observer is told of this thread's scratch."""


def buffers() -> list[torch.Tensor]:
    """The buffers that there are now. Recorded launches keep those they were recorded with."""
    return list(pool().values())


def scratch(
    purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An uninitialised tensor of `shape` that shares memory with earlier ones of `purpose`."""
    numel = 1
    for size in shape:
        numel *= size
    key = (purpose, device, dtype)
    own = pool()
    buffer = own.get(key)
    if buffer is None or buffer.numel() < numel:
        del buffer  # with the pool's own reference the old one is freed before the new one comes
        with _observer.get().allocating(purpose):
            own.pop(key, None)
            buffer = own[key] = torch.empty(numel, dtype=dtype, device=device)
    return buffer[:numel].view(shape)


def release() -> None:
    """Free every buffer, for a process that goes on to something else."""
    pool().clear()
