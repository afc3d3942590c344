"""Series for a chart: few points, and no extreme left out."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.monitoring.metrics_tail import FIGURES, MetricsTail
from engine.runs.metrics import smoothed

MOST_POINTS = 1000
SMOOTHED = ("loss", "grad_norm", "tokens_per_second")
_MOST_LISTED = 200

Steps = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


def series(
    tail: MetricsTail, smoothing: float = 0.0, first: int = 0, last: int | None = None
) -> dict[str, Any]:
    """Points of every figure from step `first` to `last`, as JSON has them.

    `smoothing` from 0 to below 1 is the weight of the past in a moving mean over all steps, which
    is given beside the figures of `SMOOTHED`. `not_finite` are steps whose loss was not a number.
    """
    with tail.lock:
        tail.update()
        steps = np.array(tail.steps, dtype=np.int64)
        columns = {name: np.array(tail.columns[name], dtype=np.float64) for name in FIGURES}
        damaged = tail.damaged
    inside = steps >= first
    if last is not None:
        inside &= steps <= last
    figures: dict[str, Any] = {}
    for name, values in columns.items():
        known = np.isfinite(values)
        figures[name] = _points(steps, values, inside & known)
        if smoothing > 0 and name in SMOOTHED:
            smooth = np.full_like(values, np.nan)
            smooth[known] = smoothed(values[known].tolist(), smoothing)
            figures[f"{name}_smooth"] = _points(steps, smooth, inside & known)
    missing = steps[inside & ~np.isfinite(columns["loss"])]
    return {
        "steps": int(inside.sum()),
        "first": int(steps[0]) if len(steps) else None,
        "last": int(steps[-1]) if len(steps) else None,
        "figures": figures,
        "not_finite": {"count": len(missing), "steps": missing[:_MOST_LISTED].tolist()},
        "damaged": damaged,
    }


def _points(steps: Steps, values: Values, chosen: npt.NDArray[np.bool_]) -> dict[str, list[Any]]:
    steps, values = steps[chosen], values[chosen]
    index = downsampled(values, MOST_POINTS)
    return {"steps": steps[index].tolist(), "values": values[index].tolist()}


def downsampled(values: Values, most: int) -> npt.NDArray[np.int64]:
    """Indices of at most `most` values (>= 4), ascending; all where there are few enough.

    First and last are among them, and the least and the greatest of each of equal buckets: no spike
    and no dip is lost, however short. `values`: (n,), finite.
    """
    count = len(values)
    if count <= most:
        return np.arange(count)
    edges = np.linspace(0, count, (most - 2) // 2 + 1).astype(np.int64)
    chosen = {0, count - 1}
    for start, end in itertools.pairwise(edges):
        bucket = values[start:end]
        chosen |= {int(start + bucket.argmin()), int(start + bucket.argmax())}
    return np.array(sorted(chosen), dtype=np.int64)
