"""All-to-all between a slice of the tokens and a share of heads.

A rank holds n of a batch's N tokens. What mixes tokens works on each head by itself, so before it
every rank gives each other rank that one's heads of its tokens, and afterwards the other way round:

    (n, H, D) of this rank's tokens  <->  (N, H / R, D) of all tokens, heads r H / R and following

Several tensors of one dtype go together, as column blocks of one matrix (N, W), which is sent and
received as it lies in memory. Where heads of one tensor are read by several ranks (keys and values
of grouped heads, of which there may be fewer than ranks) each is sent `copies` times, and gradients
of the copies are summed on their way back. Nothing is of size N x H on any rank.

Source: Jacobs et al. 2023 (DeepSpeed-Ulysses, arXiv 2309.14509).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.runtime.ranks import Ranks
from models.parallel.token_slices import TokenSlices


def copies_of(readers: int, heads: int, ranks: int) -> int:
    """How often each of `heads` is sent, so that `ranks` have equal shares of their `readers`.

    `heads` divides `readers`, each being read by consecutive ones. Raises `ValueError` where
    `ranks` does not divide `readers`.
    """
    if readers % ranks:
        raise ValueError(f"{readers} heads cannot be shared equally by {ranks} processes")
    group = readers // heads
    return group // math.gcd(readers // ranks, group)


@dataclass(frozen=True)
class HeadExchange:
    """One rank's side of the exchange, for the tokens of one batch.

    Raises `ValueError` for slices that are not those of the ranks.
    """

    ranks: Ranks
    slices: TokenSlices

    def __post_init__(self) -> None:
        if (self.ranks.rank, self.ranks.size) != (self.slices.rank, self.slices.size):
            raise ValueError(
                f"the batch is slice {self.slices.rank} of {self.slices.size}, and this model "
                f"computes slice {self.ranks.rank} of {self.ranks.size}; split its context over "
                "the ranks that the batch was cut for (`models.over_ranks.split_context`)"
            )

    @property
    def first_token(self) -> int:
        """The first token of this rank."""
        return self.slices.first

    def to_heads(self, parts: Sequence[Tensor], copies: Sequence[int]) -> list[Tensor]:
        """Tensors (n, H_i, D_i) of this rank's tokens as (N, h_i, D_i), its heads of all tokens.

        h_i = H_i copies_i / R. The results are column blocks of one matrix.
        """
        size, own = self.ranks.size, parts[0].shape[0]
        dims = [part.shape[2] for part in parts]
        widths = [
            part.shape[1] * many // size * dim
            for part, many, dim in zip(parts, copies, dims, strict=True)
        ]
        sent = parts[0].new_empty(size, own, sum(widths))
        for target, part, many in zip(sent.split(widths, 2), parts, copies, strict=True):
            heads = part if many == 1 else part.repeat_interleave(many, 1)
            shares = heads.unflatten(1, (size, -1)).transpose(0, 1)
            target.unflatten(2, (-1, part.shape[2])).copy_(shares)
        whole = parts[0].new_empty(self.slices.tokens, sum(widths))
        self._send(whole, sent.flatten(0, 1), back=False)
        return [
            block.unflatten(1, (-1, dim))
            for block, dim in zip(whole.split(widths, 1), dims, strict=True)
        ]

    def to_tokens(self, whole: Tensor, targets: Sequence[Tensor], copies: Sequence[int]) -> None:
        """Write column blocks (N, h_i D_i) of `whole` to targets (n, H_i, D_i); copies are summed.

        `whole` is contiguous, and the targets lie in memory as they like.
        """
        size, own = self.ranks.size, targets[0].shape[0]
        widths = [
            target.shape[1] * many // size * target.shape[2]
            for target, many in zip(targets, copies, strict=True)
        ]
        received = whole.new_empty(size * own, sum(widths))
        self._send(received, whole, back=True)
        blocks = received.view(size, own, sum(widths)).split(widths, 2)
        for target, block, many in zip(targets, blocks, copies, strict=True):
            heads = block.unflatten(2, (-1, target.shape[2])).transpose(0, 1)
            if many == 1:
                target.unflatten(1, (size, -1)).copy_(heads)
            else:
                target.copy_(heads.flatten(1, 2).unflatten(1, (-1, many)).sum(2))

    def of_tokens(self, heads: Tensor) -> Tensor:
        """One tensor (N, h, D) of this rank's heads as (n, H, D) of its tokens."""
        count = heads.shape[1] * self.ranks.size
        target = heads.new_empty(self.slices.counts[self.ranks.rank], count, heads.shape[2])
        self.to_tokens(heads.reshape(heads.shape[0], -1), [target], [1])
        return target

    def _send(self, out: Tensor, x: Tensor, *, back: bool) -> None:
        """Rows of all ranks' tokens from those of this one's tokens for all ranks, or `back`."""
        counts = self.slices.counts
        mine = [counts[self.ranks.rank]] * self.ranks.size
        received, sent = (mine, counts) if back else (counts, mine)
        self.ranks.all_to_all(out, x, received, sent).wait()


def joined_like(parts: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A new matrix (N, W) and its column blocks, shaped as parts (N, h_i, D_i)."""
    widths = [part.shape[1] * part.shape[2] for part in parts]
    first = parts[0]
    whole = torch.empty(first.shape[0], sum(widths), dtype=first.dtype, device=first.device)
    blocks = whole.split(widths, 1)
    return whole, [
        block.unflatten(1, part.shape[1:]) for block, part in zip(blocks, parts, strict=True)
    ]
