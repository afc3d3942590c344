"""Range test of learning rates: its rates, its curve, its suggestion.

The rate of step i of n is `low (high / low)^(i / (n - 1))`. The loss is smoothed by an exponential
moving mean; where that exceeds `DIVERGED` times its lowest value, or is not finite, the test ends.
Suggested is a tenth of the rate where the smoothed loss was lowest: there it is about to rise, and
an order of magnitude below it falls fast. The rate of its steepest descent over log(rate) up to
there is told beside it. Source: Smith 2017 (arXiv 1506.01186); the rules are fastai's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.plots import new_figure, save_figure
from engine.runs.metrics import smoothed
from engine.storage import durable, names

DIVERGED = 4.0
DECAY = 0.9
"""Of the moving mean."""
_UNSETTLED = 10
"""One in so many of the first steps is left out: the moving mean has seen too few."""
RULE = "a tenth of the rate at which the smoothed loss was lowest"
JSON_NAME, PICTURE_NAME = "lr_find.json", "lr_find.png"


def range_rates(steps: int, low: float, high: float) -> tuple[float, ...]:
    """`steps` rates from `low` to `high`, each by the same factor above the one before."""
    return tuple(low * (high / low) ** (index / (steps - 1)) for index in range(steps))


def has_diverged(losses: list[float]) -> bool:
    """Whether the smoothed loss has left the range that is worth looking at."""
    if not all(map(math.isfinite, losses)):
        return True
    curve = smoothed(losses, DECAY)
    return curve[-1] > DIVERGED * min(curve) > 0.0


@dataclass(frozen=True)
class LrCurve:
    """What a range test measured: a loss for each rate, and whether it ended by divergence.

    `figure` is the file of the picture, where one was drawn.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    diverged: bool
    path: Path | None = None
    figure: Path | None = None

    @property
    def smoothed(self) -> list[float]:
        """The moving mean of the losses."""
        return smoothed(list(self.losses), DECAY)

    @property
    def lowest(self) -> float | None:
        """The rate at which the smoothed loss was lowest; None where it never fell."""
        index = self._lowest()
        return None if index is None else self.rates[index]

    @property
    def steepest(self) -> float | None:
        """The rate before `lowest` at which the smoothed loss fell fastest over log(rate)."""
        last = self._lowest()
        if last is None:
            return None
        first = self._first()
        curve = np.array(self.smoothed[first : last + 1])
        slopes = np.gradient(curve, np.log(self.rates[first : last + 1]))
        return self.rates[first + int(np.argmin(slopes))]

    @property
    def suggestion(self) -> float | None:
        """A rate for the run, of two digits; None where the loss never fell."""
        return None if self.lowest is None else float(f"{self.lowest / 10:.1e}")

    def shown_losses(self) -> tuple[float, float]:
        """The losses that a picture shows: where it falls, not how far it rises in the end."""
        last = self._lowest()
        falling = self.losses if last is None else self.losses[: last + 1]
        low, high = min(falling), max(falling)
        margin = (high - low) or abs(high) or 1.0
        return low - 0.2 * margin, high + margin

    def _first(self) -> int:
        return math.ceil(len(self.rates) / _UNSETTLED)

    def _lowest(self) -> int | None:
        curve, first = self.smoothed[: len(self.rates)], self._first()
        if len(curve) <= first + 1:
            return None
        index = first + int(np.argmin(curve[first:]))
        return index if index > first and curve[index] < curve[first] else None

    def text(self) -> str:
        """What the test says, in one paragraph."""
        ended = "the loss diverged" if self.diverged else "the last rate"
        tried = (
            f"{len(self.rates)} steps from {self.rates[0]:.1e} to {self.rates[-1]:.1e} ({ended})"
        )
        if self.suggestion is None:
            return (
                f"Learning rate finder: {tried}. No suggestion: the smoothed loss never fell below "
                "its beginning. Give a lower --lr-find-min, more --lr-find-steps, or larger steps "
                "(--batch-size, --accumulate)."
            )
        edge = ""
        if not self.diverged and self.lowest == self.rates[-1]:
            edge = " The loss was still falling there: a higher --lr-find-max may find more."
        return (
            f"Learning rate finder: {tried}; the smoothed loss was lowest at {self.lowest:.1e} and "
            f"fell fastest at {self.steepest:.1e}. Suggested: {self.suggestion:g}, {RULE}.{edge}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything that was measured and follows from it, as JSON holds it."""
        return {
            "rates": list(self.rates),
            "losses": list(self.losses),
            "smoothed": self.smoothed,
            "diverged": self.diverged,
            "lowest": self.lowest,
            "steepest": self.steepest,
            "suggestion": self.suggestion,
            "rule": RULE,
        }


def write_curve(curve: LrCurve, folder: Path, facts: Mapping[str, Any]) -> LrCurve:
    """Write `lr_find.json`, with `facts` in it, and `lr_find.png`; the curve with their paths.

    Without matplotlib there is no picture, and the log says so.
    """
    names.mkdir(folder, parents=True, exist_ok=True)
    durable.write_json(folder / JSON_NAME, {**curve.as_dict(), **facts})
    figure = new_figure("picture of the learning rates", 8, 4.5)
    if figure is not None:
        axes = figure.subplots()
        axes.semilogx(curve.rates, curve.losses, color="tab:blue", alpha=0.35, label="loss")
        axes.semilogx(curve.rates, curve.smoothed, color="tab:blue", linewidth=2, label="smoothed")
        for name, rate, color in (
            ("suggested", curve.suggestion, "tab:green"),
            ("steepest", curve.steepest, "tab:orange"),
            ("lowest", curve.lowest, "tab:red"),
        ):
            if rate is not None:
                axes.axvline(rate, color=color, linestyle="--", label=f"{name}: {rate:.1e}")
        axes.set_ylim(*curve.shown_losses())
        axes.set(xlabel="learning rate", ylabel="loss", title=folder.name)
        axes.grid(alpha=0.3)
        axes.legend()
        save_figure(figure, folder / PICTURE_NAME)
    drawn = None if figure is None else folder / PICTURE_NAME
    return LrCurve(curve.rates, curve.losses, curve.diverged, folder / JSON_NAME, drawn)
