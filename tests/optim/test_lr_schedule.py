"""The learning rate: warm-up, its three shapes, and its ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim import lr_at
from optim.lr_schedule import KINDS


def rates(total: int, **options: Any) -> list[float]:
    return [lr_at(step, base=1.0, total=total, **options) for step in range(total)]


def test_warm_up_is_linear_and_its_first_update_already_learns() -> None:
    schedule = rates(100, warmup=10)
    assert schedule[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert schedule[10] == 1.0


def test_cosine_falls_along_half_a_wave() -> None:
    schedule = rates(100, warmup=0)
    assert schedule[0] == 1.0
    assert schedule[50] == pytest.approx(0.5)
    assert schedule[25] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert 0.0 < schedule[99] < 1e-3


def test_linear_falls_along_a_line() -> None:
    assert rates(8, warmup=0, kind="linear") == pytest.approx([1 - i / 8 for i in range(8)])


def test_constant_stays() -> None:
    assert rates(5, warmup=2, kind="constant") == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_end_is_the_smallest_rate_and_it_stays_there(kind: str) -> None:
    for step in (100, 101, 10_000):
        assert lr_at(step, base=2.0, warmup=5, total=100, kind=kind, min_ratio=0.1) == (
            pytest.approx(0.2)
        )


def test_warm_up_may_outlast_the_run() -> None:
    assert rates(3, warmup=10) == pytest.approx([0.1, 0.2, 0.3])


@given(
    total=st.integers(1, 500),
    warmup=st.integers(0, 500),
    kind=st.sampled_from(KINDS),
    min_ratio=st.floats(0, 1),
)
def test_it_rises_then_falls_and_stays_within_bounds(
    total: int, warmup: int, kind: str, min_ratio: float
) -> None:
    schedule = rates(total, warmup=warmup, kind=kind, min_ratio=min_ratio)
    assert all(0.0 < rate <= 1.0 for rate in schedule)
    up, down = schedule[:warmup], schedule[warmup:]
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert all(rate >= min_ratio - 1e-12 for rate in down)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="cosine, linear, constant"):
        lr_at(0, base=1.0, warmup=0, total=1, kind="step")
    for step, warmup, total in ((-1, 0, 1), (0, -1, 1), (0, 0, 0)):
        with pytest.raises(ValueError, match="negative"):
            lr_at(step, base=1.0, warmup=warmup, total=total)
    with pytest.raises(ValueError, match="min_ratio"):
        lr_at(0, base=1.0, warmup=0, total=1, min_ratio=1.5)
