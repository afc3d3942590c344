"""Every row of a step goes to one rank, within limits, and ranks get about the same work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.distributed.deal import DealtRows, PassLimits, RowCost, deal_by_cost, deal_in_order

COST = RowCost(100.0, 1.0)
STEPS = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=6), min_size=1, max_size=4)


def numbered(lengths: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Rows of micro-batches by number, and the length of each number."""
    flat = [length for micro in lengths for length in micro]
    numbers = iter(range(len(flat)))
    return [[next(numbers) for _ in micro] for micro in lengths], flat


@given(STEPS, st.integers(1, 5), st.integers(1, 4))
def test_by_cost_no_row_is_lost_or_read_twice(
    lengths: list[list[int]], ranks: int, most: int
) -> None:
    step, sizes = numbered(lengths)
    dealt = deal_by_cost(step, sizes.__getitem__, COST, ranks, PassLimits(most))
    assert sorted(r for share in dealt for p in share for r in p.rows) == list(range(len(sizes)))
    assert all(len(piece.rows) <= most for share in dealt for piece in share)
    costs = [sum(COST(sizes[r]) for p in share for r in p.rows) for share in dealt]
    best = max(sum(costs) / ranks, max(COST(size) for size in sizes))
    assert max(costs) <= 4 / 3 * best + 1e-6 or max(costs) <= best + max(map(COST, sizes))


@given(STEPS, st.integers(1, 5))
def test_packed_pieces_hold_no_more_tokens_than_they_may(
    lengths: list[list[int]], ranks: int
) -> None:
    step, sizes = numbered(lengths)
    dealt = deal_by_cost(step, sizes.__getitem__, COST, ranks, PassLimits(1, tokens=300))
    pieces = [piece for share in dealt for piece in share]
    assert sorted(row for piece in pieces for row in piece.rows) == list(range(len(sizes)))
    assert all(sum(sizes[row] for row in piece.rows) <= 300 for piece in pieces)


@given(STEPS, st.integers(1, 5))
def test_in_order_pieces_know_where_they_stood(lengths: list[list[int]], ranks: int) -> None:
    step, sizes = numbered(lengths)
    dealt = deal_in_order(step, sizes.__getitem__, COST, ranks)
    pieces = [piece for share in dealt for piece in share]
    assert [row for piece in pieces for row in piece.rows] == list(range(len(sizes)))
    for piece in pieces:
        rows = step[piece.micro]
        first = rows.index(piece.rows[0])
        assert tuple(rows[first : first + len(piece.rows)]) == piece.rows
        assert piece.first_token == sum(sizes[row] for row in rows[:first])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_finish_together(ranks: int) -> None:
    sizes = [17 * (1 + (7 * n) % 64) for n in range(64)]
    step = [list(range(64))]
    dealt = deal_by_cost(step, sizes.__getitem__, COST, ranks, PassLimits(64))
    costs = [sum(COST(sizes[r]) for p in share for r in p.rows) for share in dealt]
    assert max(costs) < 1.02 * sum(costs) / ranks


def test_pieces_of_a_rank_are_about_as_large() -> None:
    step = [[0, 1, 2], [3, 4]]
    dealt = deal_by_cost(step, lambda row: 10, COST, 1, PassLimits(4))
    assert dealt == [[DealtRows((0, 1, 2), 0), DealtRows((3, 4), 1)]]
