"""Whether a difference between models is more than chance, in words.

Models are judged on the same held-out rows. Rows are drawn with replacement, a thousand times and
always the same draws; the middle 95 % of what comes out is the interval (Efron 1979). A difference
between two models is taken row by row, which leaves out what is hard about a row for both. Where
the baseline was trained with several seeds, the distance between its best and its worst is what
chance alone does to a training.

    kept           the whole interval of the loss stays under two hundredths of a nat a token (2 %
                   of the perplexity), or the model is better
    lost           the whole interval is above zero, and the difference above what seeds make
    within noise   neither can be said of these rows and seeds
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.forging.task_score import told

TOLERANCE = 0.02
_DRAWS, _SEED = 1000, 1979
Rows = Sequence[Sequence[float]]
"""Of each row the sum of its losses in nats, and its trained tokens."""
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Nats a token of one model above another: the mean, the interval, and the spread of seeds."""

    mean: float
    low: float
    high: float
    spread: float

    @property
    def verdict(self) -> str:
        """kept, lost or within noise."""
        if self.high <= TOLERANCE:
            return "kept"
        return "lost" if self.low > 0 and self.mean > self.spread else "within noise"


def perplexity_interval(rows: Rows) -> tuple[float, float]:
    """The 95 % interval of the perplexity that rows give."""
    losses, tokens = _columns(rows)
    drawn = _draws(len(losses))
    low, high = np.quantile(losses[drawn].sum(1) / tokens[drawn].sum(1), (0.025, 0.975))
    return math.exp(min(low, 700.0)), math.exp(min(high, 700.0))


def difference(after: Rows, baselines: Sequence[Rows]) -> Difference:
    """What `after` loses against the mean of `baselines`, which saw the same rows."""
    losses, tokens = _columns(after)
    others = [_columns(rows)[0] for rows in baselines]
    if any(len(rows) != len(losses) for rows in others):
        raise ValueError("models are compared on the same rows")
    gaps = losses - np.mean(others, axis=0)
    drawn = _draws(len(losses))
    low, high = np.quantile(gaps[drawn].sum(1) / tokens[drawn].sum(1), (0.025, 0.975))
    means = [float(rows.sum() / tokens.sum()) for rows in others]
    mean = float(gaps.sum() / tokens.sum())
    return Difference(mean, float(low), float(high), max(means) - min(means))


def judged(results: dict[str, Any]) -> dict[str, Any] | None:
    """The verdict on the last trained model; None where nothing was trained."""
    if not results["cycles"]:
        return None
    last = results["cycles"][-1]["trained"]
    chains = [results["baseline_cycles"], *results.get("baseline_seeds", [])]
    trained = [chain[-1]["trained"] for chain in chains if chain]
    against = trained or [results["baseline"]]
    if any("row_losses" not in one for one in (last, *against)):
        return None  # a job of an earlier version
    gap = difference(last["row_losses"], [one["row_losses"] for one in against])
    text = _text(gap, len(trained))
    if "task" in last:
        text += " " + told(last, against[0])
    return {
        "verdict": gap.verdict,
        "against": "baseline" if trained else "untrained",
        "seeds": len(trained),
        "loss_difference": gap.mean,
        "interval": [gap.low, gap.high],
        "seed_spread": gap.spread,
        "text": text,
    }


def _text(gap: Difference, seeds: int) -> str:
    percent = [100 * math.expm1(min(value, 20.0)) for value in (gap.mean, gap.low, gap.high)]
    whom = "the baseline" if seeds else "the model before any training"
    if seeds > 1:
        spread = 100 * math.expm1(min(gap.spread, 20.0))
        whom += f" of {seeds} seeds, which are {spread:.1f} % apart"
    said = (
        f"{gap.verdict}: perplexity {percent[0]:+.1f} % (95 % of draws of the held-out rows: "
        f"{percent[1]:+.1f} to {percent[2]:+.1f} %) against {whom}."
    )
    if not seeds:
        said += " What the training alone is worth, --baseline tells."
    elif seeds == 1:
        said += " One seed: --baseline-seeds 3 tells what chance does to a training."
    return said


def _columns(rows: Rows) -> tuple[_Floats, _Floats]:
    table = np.asarray(rows, dtype=np.float64)
    return table[:, 0], table[:, 1]


def _draws(rows: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(_SEED).integers(0, rows, (_DRAWS, rows))
