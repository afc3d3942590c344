"""Packing: nothing lost, nothing too full, few bins."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.batches.packing import best_fit


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90))
def test_every_item_is_packed_once_and_no_bin_overflows(lengths: list[int], budget: int) -> None:
    bins = best_fit(lengths, budget)
    assert sorted(index for group in bins for index in group) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in group) <= budget for group in bins)
    lower = -(-sum(lengths) // budget)
    assert len(bins) <= 11 / 9 * max(lower, 1) + 4


def reference(lengths: list[int], budget: int) -> list[int]:
    """Best fit by looking at every bin; the free space of the bins, sorted."""
    spaces: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= size]
        if fitting:
            spaces.remove(min(fitting))
            spaces.append(min(fitting) - size)
        else:
            spaces.append(budget - size)
    return sorted(spaces)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60))
def test_the_bins_are_as_full_as_those_of_the_plain_algorithm(lengths: list[int]) -> None:
    bins = best_fit(lengths, 40)
    assert sorted(40 - sum(lengths[i] for i in group) for group in bins) == reference(lengths, 40)


def test_a_known_case() -> None:
    assert best_fit([5, 7, 3, 2, 5], 10) == [[1, 2], [0, 4], [3]]
    assert best_fit([], 10) == []


@pytest.mark.parametrize("lengths", [[11], [0], [3, -1]])
def test_items_that_fit_no_bin_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit bins of 10"):
        best_fit(lengths, 10)
