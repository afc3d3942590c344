"""The learning rate, a pure function of the step.

Warm-up is linear over the first `warmup` updates and ends at `base`; the first update already
learns. From there to `total`, with x in [0, 1] the share of the remaining updates already made:

    constant: 1        linear: 1 - x        cosine: (1 + cos(pi x)) / 2

times `base`, squeezed into [min_ratio * base, base].
"""

from __future__ import annotations

import math

KINDS = ("cosine", "linear", "constant")


def lr_at(
    step: int,
    *,
    base: float,
    warmup: int,
    total: int,
    kind: str = "cosine",
    min_ratio: float = 0.0,
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
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    share = 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return base * (min_ratio + (1.0 - min_ratio) * share)
