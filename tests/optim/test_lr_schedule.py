"""The learning rate: warm-up, its three shapes, and its ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim import ScheduleShape, lr_at
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


def test_a_polynomial_is_the_power_of_what_is_left() -> None:
    schedule = rates(10, warmup=0, kind="polynomial", shape=ScheduleShape(power=2.0))
    assert schedule == pytest.approx([(1 - i / 10) ** 2 for i in range(10)])


def test_restarts_begin_every_wave_at_the_peak_and_end_at_the_smallest_rate() -> None:
    shape = ScheduleShape(cycles=3)
    schedule = rates(30, warmup=0, kind="cosine_with_restarts", shape=shape)
    assert [i for i, rate in enumerate(schedule) if rate == 1.0] == [0, 10, 20]
    assert schedule[5] == schedule[15] == pytest.approx(0.5)
    assert lr_at(30, base=1.0, warmup=0, total=30, kind="cosine_with_restarts", shape=shape) == 0.0


def test_warm_up_stable_decay_stays_at_the_peak_until_its_last_steps() -> None:
    shape = ScheduleShape(decay_steps=4, decay_shape="linear")
    schedule = rates(12, warmup=2, kind="warmup_stable_decay", shape=shape)
    assert schedule == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    squat = rates(3, warmup=2, kind="warmup_stable_decay", shape=shape)
    assert squat == pytest.approx([0.5, 1.0, 1.0])


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
    for wrong in ({"power": 0.0}, {"cycles": 0}, {"decay_steps": 0}):
        with pytest.raises(ValueError, match="power must be positive"):
            ScheduleShape(**wrong)
    with pytest.raises(ValueError, match="linear, cosine, 1-sqrt"):
        ScheduleShape(decay_shape="step")
    with pytest.raises(ValueError, match="min_ratio"):
        lr_at(0, base=1.0, warmup=0, total=1, min_ratio=1.5)
