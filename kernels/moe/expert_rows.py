"""Rows of tokens, sorted by expert, where their experts are.

On one process a mixture's rows are gathered from the tokens. Where experts are divided over R
processes, rank r owns the E / R experts from r E / R on, and the M sorted rows of a rank lie owner
after owner: they are sent as they lie (an all-to-all of uneven counts, which are exchanged first),
sorted by expert again at their owners, in each expert by the rank that they came from, and what
becomes of them goes back along the same path. A rank may have no token, and an expert no row.

Source: Lepikhin et al. 2020 (GShard, arXiv 2006.16668); Fedus et al. 2021 (arXiv 2101.03961).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.elementwise.dropout import Seed
from kernels.moe.gathered import Gathered
from kernels.moe.grouped_matmul import Groups
from kernels.moe.router import Routing
from kernels.runtime.ranks import Ranks, gathered
from kernels.runtime.simulation import simulation


@dataclass(frozen=True, eq=False)
class OwnRows:
    """The rows of this process's tokens, whose experts are all here."""

    routing: Routing

    @property
    def groups(self) -> Groups:
        return self.routing.groups

    @property
    def weights(self) -> Tensor:
        """The router's weight (M, 1) of every row."""
        return self.routing.sorted_weights()

    def seed(self, seed: Seed) -> Seed:
        """Whose masks the rows are dropped by, from the seed of the tokens."""
        count = self.routing.experts.shape[1]
        return seed.at(0, seed.first_row * count).scaled(count)

    def of(self, *xs: Tensor) -> list[Gathered]:
        """The rows of every x (N, width), read where their tokens lie."""
        tokens = self.routing.tokens
        return [Gathered(x, tokens) for x in xs]

    def back(self, rows: Tensor) -> Tensor:
        """Rows as the routing sorts them."""
        return rows


@dataclass(frozen=True, eq=False)
class SentRows:
    """The rows (m, ...) of all ranks' tokens whose experts are here, and how they came.

    sent[r] of this rank's rows went to rank r, and received[r] came from it; sorted row i is number
    order[i] of those received. `rows_before` are all ranks' rows for experts of lower ranks, and
    `rows_of_lower_ranks` what those have sent.
    """

    ranks: Ranks
    routing: Routing
    groups: Groups
    sent: Sequence[int]
    received: Sequence[int]
    order: Tensor
    rows_before: int
    rows_of_lower_ranks: int
    weights: Tensor

    @classmethod
    def to_owners(cls, routing: Routing, ranks: Ranks) -> SentRows:
        """Agree on what goes where, and send the weights. The host waits for the counts.

        Raises `ValueError` where `ranks` does not divide the experts.
        """
        experts = routing.groups.count
        if experts % ranks.size:
            raise ValueError(
                f"{experts} experts cannot be divided equally over {ranks.size} processes"
            )
        own = experts // ranks.size
        counts = routing.groups.offsets.diff().long()
        table = gathered(ranks, counts.view(ranks.size, own)).cpu()  # from, to, expert
        if simulation() is not None:  # which asks for all experts equally often
            each = torch.tensor(routing.groups.bounds).diff()
            table = each.view(1, ranks.size, own).expand(ranks.size, -1, -1)
        here = table[:, ranks.rank]
        numbers = torch.arange(own).repeat(ranks.size)
        ordered, order = numbers.repeat_interleave(here.flatten()).sort(stable=True)
        device = routing.order.device
        rows = cls(
            ranks,
            routing,
            Groups.from_sorted(ordered.to(device), own),
            table[ranks.rank].sum(1).tolist(),
            here.sum(1).tolist(),
            order.to(device),
            int(table[:, : ranks.rank].sum()),
            int(table[: ranks.rank].sum()),
            routing.weights,
        )
        weights = rows._exchanged(routing.sorted_weights()).index_select(0, rows.order)
        return replace(rows, weights=weights)

    def seed(self, seed: Seed) -> Seed:
        """Whose masks the rows are dropped by: those of all ranks are numbered by expert.

        Where the ranks' tokens follow each other in one micro-batch, they are numbered as there.
        """
        begin = seed.base * self.routing.experts.shape[1] - self.rows_of_lower_ranks
        return replace(seed, first_row=self.rows_before, base=max(0, begin))

    def of(self, *xs: Tensor) -> list[Gathered]:
        """The rows of every rank's x (N, width), for every x."""
        tokens = self.routing.tokens
        return [Gathered(self._exchanged(x.index_select(0, tokens)), self.order) for x in xs]

    def back(self, rows: Tensor) -> Tensor:
        """What became of the rows (m, width), as this rank's routing sorts its own (M, width)."""
        given = torch.empty_like(rows, memory_format=torch.contiguous_format)
        given[self.order] = rows
        out = rows.new_empty(sum(self.sent), rows.shape[1])
        self.ranks.all_to_all(out, given, self.sent, self.received).wait()
        return out

    def _exchanged(self, rows: Tensor) -> Tensor:
        """This rank's rows (M, width) to their owners: those that came here (m, width)."""
        out = rows.new_empty(sum(self.received), rows.shape[1])
        self.ranks.all_to_all(out, rows.contiguous(), self.received, self.sent).wait()
        return out


ExpertRows = OwnRows | SentRows


def rows_of(routing: Routing, ranks: Ranks) -> ExpertRows:
    """The rows that this process's experts compute of a choice."""
    return OwnRows(routing) if ranks.size == 1 else SentRows.to_owners(routing, ranks)
