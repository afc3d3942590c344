"""The shuffled order that takes no memory."""

import numpy as np
import pytest

from engine.data.streaming.order import ShuffledOrder


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000, 4097, 65_536])
def test_every_row_comes_once(count: int) -> None:
    order = ShuffledOrder(count, seed=3, purpose=1, draw=2).at(np.arange(count))
    assert sorted(order.tolist()) == list(range(count))
    again = ShuffledOrder(count, seed=3, purpose=1, draw=2).at(np.arange(count)[::-1])
    assert order.tolist() == again[::-1].tolist()


def test_seeds_and_draws_give_other_orders_and_ends_are_refused() -> None:
    orders = {
        tuple(ShuffledOrder(50, seed, 1, draw).at(np.arange(50)).tolist())
        for seed in range(4)
        for draw in range(4)
    }
    assert len(orders) == 16
    for wrong in (-1, 50):
        with pytest.raises(IndexError):
            ShuffledOrder(50, 0, 1, 0).at(wrong)


def test_neighbours_do_not_stay_together() -> None:
    count = 200_000
    order = ShuffledOrder(count, 7, 1, 0).at(np.arange(count))
    where = np.argsort(order)
    gaps = np.abs(np.diff(where))
    # Of a uniform permutation the distance of two rows has the mean count/3.
    assert abs(gaps.mean() / (count / 3) - 1) < 0.02
    assert (gaps < 1000).mean() < 0.013
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01
    # Every part of the epoch reads every part of the file.
    parts = np.histogram2d(np.arange(count), order, bins=20)[0]
    assert np.abs(parts / (count / 400) - 1).max() < 0.25
