"""Rows of an embedding that is divided among ranks by vocabulary.

Every rank sends each id to the rank that has its row, and gets the row back: two all-to-alls of
what is asked for, and none of the matrix. Rows come as they are, so a lookup is exact. Backward
sends the rows' gradients the same way, and the owner adds them up in fp32 or wider. How many ids go
where depends on the ids, so the host waits for them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear.int8 import rows_int8
from kernels.loss.linear_cross_entropy import Head
from kernels.runtime.ranks import Ranks, gathered
from kernels.vocabulary.shard import VocabularyShard


class _Routes:
    """Which of a rank's ids go to whom, and how many come from whom."""

    def __init__(self, shard: VocabularyShard, ids: Tensor) -> None:
        ranks = shard.ranks
        self._ranks: Ranks = ranks
        owners = torch.div(ids, shard.per_rank, rounding_mode="floor")
        self.order = torch.argsort(owners, stable=True)
        counts = torch.bincount(owners, minlength=ranks.size)
        table = gathered(ranks, counts)
        self.asked: Sequence[int] = table[ranks.rank].tolist()
        self.answered: Sequence[int] = table[:, ranks.rank].tolist()

    def to_owners(self, x: Tensor) -> Tensor:
        """x (n, ...) of this rank's ids, as it arrives at the owners."""
        out = x.new_empty(sum(self.answered), *x.shape[1:])
        given = x.index_select(0, self.order)
        self._ranks.all_to_all(out, given, self.answered, self.asked).wait()
        return out

    def from_owners(self, rows: Tensor) -> Tensor:
        """What the owners have for what they were asked, in the order of this rank's ids."""
        came = rows.new_empty(sum(self.asked), *rows.shape[1:])
        self._ranks.all_to_all(came, rows, self.asked, self.answered).wait()
        out = torch.empty_like(came)
        return out.index_copy_(0, self.order, came)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Head, shard: VocabularyShard, ids: Tensor) -> Tensor:
        ctx.routes = _Routes(shard, ids)
        ctx.local = ctx.routes.to_owners(ids) - shard.first
        ctx.size, ctx.dtype = weight.shape, weight.dtype
        rows_here = (
            weight.index_select(0, ctx.local)
            if isinstance(weight, Tensor)
            else rows_int8(weight, ctx.local)
        )
        rows: Tensor = ctx.routes.from_owners(rows_here)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        arrived = ctx.routes.to_owners(dy.contiguous())
        wide = torch.promote_types(ctx.dtype, torch.float32)
        total = torch.zeros(ctx.size, dtype=wide, device=dy.device)
        total.index_add_(0, ctx.local, arrived.to(wide))
        return total.to(ctx.dtype), None, None


def lookup(shard: VocabularyShard, ids: Tensor) -> Tensor:
    """Rows (N, H) of ids (N,) int64, in [0, V). Every rank calls it, some perhaps without ids.

    Where the rows are trained, every rank must also run backward.
    """
    rows: Tensor = _Lookup.apply(shard.weight, shard, ids)
    return rows
