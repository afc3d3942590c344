"""Packed documents in chunks of equal length, for the plain torch reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.delta_net.operands import wide


@dataclass(frozen=True)
class ChunkLayout:
    """Where the tokens of packed documents lie in chunks that restart at every document.

    Documents are ordered by length, longest first, and chunks by their place in the document, so
    that step s of the scan over chunks is the contiguous range `steps[s]` and touches the first
    rows of the state. `slots` (N,) is the chunk row of every token; `order` (D,) is the document
    in each row of the state.
    """

    chunk: int
    chunks: int
    steps: tuple[tuple[int, int], ...]
    slots: Tensor
    order: Tensor


@lru_cache(maxsize=16)
def chunk_layout(bounds: tuple[int, ...], chunk: int, device: torch.device) -> ChunkLayout:
    """The layout for documents between consecutive `bounds`; the same for every layer."""
    lengths = [end - start for start, end in pairwise(bounds)]
    order = sorted(range(len(lengths)), key=lambda document: -lengths[document])
    counts = [-(-lengths[document] // chunk) for document in order]
    steps, first = [], 0
    for step in range(counts[0]):
        active = sum(count > step for count in counts)
        steps.append((first, first + active))
        first += active
    rank = torch.empty(len(order), dtype=torch.int64)
    rank[torch.tensor(order)] = torch.arange(len(order))
    document = torch.repeat_interleave(torch.tensor(lengths), output_size=bounds[-1])
    within = torch.arange(bounds[-1]) - torch.tensor(bounds)[document]
    starts = torch.tensor([start for start, _ in steps])
    slots = (starts[within // chunk] + rank[document]) * chunk + within % chunk
    return ChunkLayout(
        chunk, first, tuple(steps), slots.to(device), torch.tensor(order, device=device)
    )


def to_chunks(x: Tensor, layout: ChunkLayout, heads: int) -> Tensor:
    """x (N, heads * r, D) -> (chunks, heads, r, C, D) fp32 or wider, zero where no token is."""
    values = wide(x)
    padded = values.new_zeros(layout.chunks * layout.chunk, *x.shape[1:])
    padded.index_copy_(0, layout.slots, values)
    split = padded.view(layout.chunks, layout.chunk, heads, -1, x.shape[2])
    return split.permute(0, 2, 3, 1, 4).contiguous()


def from_chunks(y: Tensor, layout: ChunkLayout) -> Tensor:
    """The inverse of `to_chunks`: (chunks, heads, r, C, D) -> (N, heads * r, D)."""
    rows = y.permute(0, 3, 1, 2, 4).reshape(layout.chunks * layout.chunk, -1, y.shape[-1])
    return rows.index_select(0, layout.slots)


class Chunks(NamedTuple):
    """Inputs in chunks. q, k (n, Hk, 1, C, K); v (n, Hk, r, C, V); the rest (n, Hk, r, C, 1).

    `log` is G in fp64, `gamma` e^G and `to_end` e^(G_C - G).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log: Tensor
    gamma: Tensor
    to_end: Tensor

    @property
    def end(self) -> Tensor:
        """Gamma_C (n, Hk, r, 1, 1): the decay of a state over the chunk."""
        return self.gamma[..., -1:, :]


def in_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: ChunkLayout
) -> Chunks:
    heads = q.shape[1]
    log = to_chunks(g.double().unsqueeze(-1), layout, heads).cumsum_(-2)
    values = to_chunks(v, layout, heads)
    return Chunks(
        to_chunks(q, layout, heads),
        to_chunks(k, layout, heads),
        values,
        to_chunks(beta.unsqueeze(-1), layout, heads),
        log,
        log.exp().to(values.dtype),
        (log[..., -1:, :] - log).exp_().to(values.dtype),
    )
