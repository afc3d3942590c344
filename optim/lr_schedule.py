"""The learning rate, a pure function of the step.

Warm-up is linear over the first `warmup` updates and ends at `base`; the first update already
learns. From there to `total`, with x in [0, 1] the share of the remaining updates already made:

    constant: 1        linear: 1 - x        cosine: (1 + cos(pi x)) / 2
    polynomial: (1 - x)^power
    cosine_with_restarts: (1 + cos(pi frac(cycles x))) / 2, and 0 at x = 1
    warmup_stable_decay: 1, and over the last `decay_steps` updates, with y the share of those
        linear: 1 - y        cosine: (1 + cos(pi y)) / 2        1-sqrt: 1 - sqrt(y)

times `base`, squeezed into [min_ratio * base, base]. After the warm-up these are the rates of
transformers' schedules of the same names; its warm-up begins at 0, one update behind this one.
Sources: Loshchilov & Hutter 2017 (arXiv 1608.03983) for restarts, Hu et al. 2024 (arXiv 2404.06395)
and Hägele et al. 2024 (arXiv 2405.18392) for warm-up, stable and decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

KINDS = (
    "cosine",
    "linear",
    "constant",
    "polynomial",
    "warmup_stable_decay",
    "cosine_with_restarts",
)
DECAY_SHAPES = ("linear", "cosine", "1-sqrt")


@dataclass(frozen=True)
class ScheduleShape:
    """What single kinds of schedules read: the exponent, the waves, and the decay at the end."""

    power: float = 1.0
    cycles: int = 1
    decay_steps: int = 1
    decay_shape: str = "cosine"

    def __post_init__(self) -> None:
        if self.power <= 0.0 or self.cycles < 1 or self.decay_steps < 1:
            raise ValueError(
                f"power must be positive, cycles and decay_steps at least 1, got {self.power}, "
                f"{self.cycles} and {self.decay_steps}"
            )
        if self.decay_shape not in DECAY_SHAPES:
            raise ValueError(
                f"the decay must be one of {', '.join(DECAY_SHAPES)}, got {self.decay_shape!r}"
            )


DEFAULT_SHAPE = ScheduleShape()


def lr_at(
    step: int,
    *,
    base: float,
    warmup: int,
    total: int,
    kind: str = "cosine",
    min_ratio: float = 0.0,
    shape: ScheduleShape = DEFAULT_SHAPE,
) -> float:
    """Learning rate of the update after `step` completed ones, of `total` updates in all.

    Past `total` it stays at its last value. Raises ValueError for an unknown `kind`, negative
    counts, a `total` below 1, and a `min_ratio` outside [0, 1].
    """
    if kind not in KINDS:
        raise ValueError(f"the schedule must be one of {', '.join(KINDS)}, got {kind!r}")
    if step < 0 or warmup < 0 or total < 1:
        raise ValueError(
            f"step and warmup must not be negative and total must be at least 1, "
            f"got step {step}, warmup {warmup}, total {total}"
        )
    if not 0.0 <= min_ratio <= 1.0:
        raise ValueError(f"min_ratio must lie in [0, 1], got {min_ratio}")
    if step < warmup:
        return base * (step + 1) / warmup
    if kind == "constant":
        return base
    if kind == "warmup_stable_decay":
        begin = max(warmup, total - shape.decay_steps)
        share = _decayed(min(1.0, max(0, step - begin) / max(1, total - begin)), shape.decay_shape)
    else:
        share = _share(min(1.0, (step - warmup) / max(1, total - warmup)), kind, shape)
    return base * (min_ratio + (1.0 - min_ratio) * share)


def _share(done: float, kind: str, shape: ScheduleShape) -> float:
    """The share of the peak where `done` of the updates after the warm-up are made."""
    if kind == "cosine_with_restarts":
        return _wave(shape.cycles * done % 1.0) if done < 1.0 else 0.0
    if kind == "polynomial":
        return float((1.0 - done) ** shape.power)
    return 1.0 - done if kind == "linear" else _wave(done)


def _decayed(done: float, shape: str) -> float:
    """The share of the peak where `done` of the decay is over."""
    if shape == "1-sqrt":
        return 1.0 - math.sqrt(done)
    return 1.0 - done if shape == "linear" else _wave(done)


def _wave(done: float) -> float:
    """Half a wave of the cosine, from 1 to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * done))
