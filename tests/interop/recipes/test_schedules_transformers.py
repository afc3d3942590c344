"""Learning rates after the warm-up are those of transformers' get_scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from optim import ScheduleShape, lr_at

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.interop

TOTAL, WARMUP, PEAK = 60, 7, 3e-4


def theirs(name: str, warmup: int, **options: Any) -> list[float]:
    """Learning rates of the updates 0 to TOTAL - 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = transformers.get_scheduler(name, optimizer, warmup, TOTAL, options or None)
    rates = []
    for _ in range(TOTAL):
        rates.append(float(schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    return rates


CASES: list[tuple[str, str, dict[str, Any], float, ScheduleShape]] = [
    ("cosine", "cosine", {}, 0.0, ScheduleShape()),
    ("cosine_with_min_lr", "cosine", {"min_lr_rate": 0.1}, 0.1, ScheduleShape()),
    ("linear", "linear", {}, 0.0, ScheduleShape()),
    ("constant_with_warmup", "constant", {}, 0.0, ScheduleShape()),
    ("polynomial", "polynomial", {"power": 2.5, "lr_end": 0.2 * PEAK}, 0.2, ScheduleShape(2.5)),
    ("polynomial", "polynomial", {}, 1e-7 / PEAK, ScheduleShape()),
    ("cosine_with_restarts", "cosine_with_restarts", {}, 0.0, ScheduleShape()),
    (
        "cosine_with_restarts",
        "cosine_with_restarts",
        {"num_cycles": 3},
        0.0,
        ScheduleShape(cycles=3),
    ),
    *(
        (
            "warmup_stable_decay",
            "warmup_stable_decay",
            {"num_decay_steps": 12, "decay_type": shape, "min_lr_ratio": ratio},
            ratio,
            ScheduleShape(decay_steps=12, decay_shape=shape),
        )
        for shape, ratio in (("linear", 0.0), ("cosine", 0.25), ("1-sqrt", 0.1))
    ),
]


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize(("name", "kind", "options", "ratio", "shape"), CASES)
def test_a_schedule_is_that_of_transformers(
    name: str, kind: str, options: dict[str, Any], ratio: float, shape: ScheduleShape, warmup: int
) -> None:
    wanted = theirs(name, warmup, **options)
    ours = [
        lr_at(step, base=PEAK, warmup=warmup, total=TOTAL, kind=kind, min_ratio=ratio, shape=shape)
        for step in range(TOTAL)
    ]
    assert ours[warmup:] == pytest.approx(wanted[warmup:], rel=1e-9, abs=1e-15)
    # The first update learns here, so the warm-up is one update ahead of theirs.
    rising = wanted[1 : warmup + 1]
    if kind == "warmup_stable_decay":  # whose warm-up begins at the smallest rate there
        rising = [(rate - ratio * PEAK) / (1.0 - ratio) for rate in rising]
    assert ours[:warmup] == pytest.approx(rising, rel=1e-9)
