"""Words and tensors that one process tells the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from engine.distributed.group import Group
from engine.errors import EngineError
from kernels.runtime.ranks import Ranks, host_maxima

T = TypeVar("T")


def broadcast_text(ranks: Ranks, text: str, source: int = 0) -> str:
    """The `text` of the rank `source`, on every rank."""
    if ranks.size == 1:
        return text
    data = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
    length = torch.tensor([data.numel() if text else 0], dtype=torch.int64)
    ranks.broadcast(length, source).wait()
    if int(length) == 0:
        return ""
    if ranks.rank != source:
        data = torch.empty(int(length), dtype=torch.uint8)
    ranks.broadcast(data, source).wait()
    return bytes(data.tolist()).decode()


def gather_texts(ranks: Ranks, text: str) -> list[str]:
    """What every rank says, in their order, on every rank."""
    return [broadcast_text(ranks, text, rank) for rank in range(ranks.size)]


def all_or_none(group: Group, work: Callable[[], T]) -> T:
    """What `work` returns, if it fails on no rank.

    Otherwise the first rank where it failed raises its error, and the others leave quietly with
    the same status, instead of waiting for it.
    """
    if group.is_alone:
        return work()
    error: EngineError | None = None
    try:
        result = work()
    except EngineError as raised:
        error = raised
    ranks = group.ranks
    (failed,) = host_maxima(ranks, 0.0 if error is None else float(ranks.size - ranks.rank))
    if error is not None and int(failed) == ranks.size - ranks.rank:
        raise error
    if failed:
        raise SystemExit(2)
    return result


@torch.no_grad()
def broadcast_tensors(ranks: Ranks, tensors: Sequence[Tensor], source: int = 0) -> None:
    """Give every rank the values of the rank `source`, in place."""
    for tensor in tensors:
        values = tensor.detach().contiguous()
        ranks.broadcast(values, source).wait()
        if values.data_ptr() != tensor.data_ptr():
            tensor.copy_(values)


def as_bytes(tensors: Mapping[str, Tensor]) -> Tensor:
    """All tensors as one of bytes, in host memory, in their order."""
    flat = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors.values()]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)


def from_bytes(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `as_bytes` for tensors of these names, shapes and types."""
    sizes = [t.numel() * t.element_size() for t in like.values()]
    parts = flat.split(sizes)
    return {
        name: part.clone().view(t.dtype).view(t.shape)
        for (name, t), part in zip(like.items(), parts, strict=True)
    }
