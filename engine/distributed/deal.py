"""Deal the rows of a step to ranks, which finish together.

A step is the same whatever the number of ranks: its rows, their gradients' sum, the number that it
is divided by. Only who computes a row differs. Every rank deals for itself and comes to the same
result, so nothing is sent.

By cost, rows go from the dearest to the cheapest, each to the rank that has least so far (Graham
1969, at most 4/3 of the best). In order, every rank gets a run of the step's rows: that is for
steps whose random masks depend on where in its micro-batch a token stands.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

Lengths = Callable[[int], int]


@dataclass(frozen=True)
class DealtRows:
    """Rows that a rank computes in one pass, by their index in the data.

    They are those of micro-batch `micro` of the step; in order, they begin at its token
    `first_token`.
    """

    rows: tuple[int, ...]
    micro: int = 0
    first_token: int = 0


@dataclass(frozen=True)
class RowCost:
    """What a row of t tokens costs: t * linear + t^2 * square, in products of two numbers."""

    linear: float
    square: float

    def __call__(self, tokens: int) -> float:
        return tokens * (self.linear + tokens * self.square)


@dataclass(frozen=True)
class PassLimits:
    """What one pass may hold: rows, and tokens where rows are packed."""

    rows: int
    tokens: int | None = None


def deal_by_cost(
    step: Sequence[Sequence[int]], length: Lengths, cost: RowCost, ranks: int, limits: PassLimits
) -> list[list[DealtRows]]:
    """The pieces of every rank of a step of micro-batches, whose rows are mixed.

    A row is in one piece; the pieces of a rank are within `limits` and keep the order of the step.
    """
    rows = [row for micro in step for row in micro]
    costs = [cost(length(row)) for row in rows]
    loads = [(0.0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(rows)), key=lambda index: (-costs[index], index)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + costs[index], rank))
    return [_cut([rows[index] for index in sorted(share)], length, limits) for share in shares]


def _cut(rows: Sequence[int], length: Lengths, limits: PassLimits) -> list[DealtRows]:
    """Rows in as few pieces as the limits allow, of about as many rows each."""
    most = limits.rows
    if limits.tokens is None and rows:
        most = -(-len(rows) // -(-len(rows) // most))
    pieces: list[list[int]] = []
    tokens = 0
    for row in rows:
        full = limits.tokens is not None and tokens + length(row) > limits.tokens
        if not pieces or full or (limits.tokens is None and len(pieces[-1]) == most):
            pieces.append([])
            tokens = 0
        pieces[-1].append(row)
        tokens += length(row)
    return [DealtRows(tuple(piece), micro) for micro, piece in enumerate(pieces)]


def deal_in_order(
    step: Sequence[Sequence[int]], length: Lengths, cost: RowCost, ranks: int
) -> list[list[DealtRows]]:
    """The pieces of every rank: a run of the step's rows, cut where a micro-batch ends."""
    flat = [(micro, row) for micro, rows in enumerate(step) for row in rows]
    sums = list(accumulate((cost(length(row)) for _, row in flat), initial=0.0))
    ends, begin = [], 0
    for rank in range(1, ranks + 1):
        goal = sums[-1] * rank / ranks
        # The boundary nearest to the goal, the earlier one of two.
        end = min(range(begin, len(sums)), key=lambda index: (abs(sums[index] - goal), index))
        ends.append(len(flat) if rank == ranks else end)
        begin = ends[-1]
    starts = _starts(step, length)
    bounds = zip([0, *ends[:-1]], ends, strict=True)
    return [_runs(flat[first:last], starts[first:last]) for first, last in bounds]


def _starts(step: Sequence[Sequence[int]], length: Lengths) -> list[int]:
    """The first token of every row in its micro-batch."""
    return [start for rows in step for start in list(accumulate(map(length, rows), initial=0))[:-1]]


def _runs(rows: Sequence[tuple[int, int]], starts: Sequence[int]) -> list[DealtRows]:
    """Consecutive rows as a piece for every micro-batch."""
    pieces: list[DealtRows] = []
    for (micro, row), start in zip(rows, starts, strict=True):
        if pieces and pieces[-1].micro == micro:
            pieces[-1] = DealtRows((*pieces[-1].rows, row), micro, pieces[-1].first_token)
        else:
            pieces.append(DealtRows((row,), micro, start))
    return pieces
