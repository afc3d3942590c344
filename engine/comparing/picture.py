"""Curves of several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.comparing.runs import Comparison, Curve
from engine.errors import ConfigError
from engine.plots import new_figure, save_figure
from engine.runs.metrics import smoothed
from engine.storage import names

_TITLES = {
    "loss": "loss (nats per trained token), smoothed",
    "eval_loss": "held-out loss",
    "lr": "learning rate",
}
_MOST_NAMED = 12


def draw_comparison(comparison: Comparison, target: Path) -> None:
    """Write a picture of the runs' curves. Raises `ConfigError` without matplotlib."""
    drawn = [figure for figure in _TITLES if any(figure in run.curves for run in comparison.runs)]
    figure = required_figure(5.5 * max(len(drawn), 1), 4.2)
    for axes, name in zip(panels(figure, len(drawn)), drawn, strict=True):
        curves = [(run.name, run.curves[name]) for run in comparison.runs if name in run.curves]
        draw_curves(axes, curves, _TITLES[name], smooth=name == "loss")
    names.mkdir(target.parent, parents=True, exist_ok=True)
    save_figure(figure, target)


def required_figure(width: float, height: float) -> Any:
    """An empty figure. Raises `ConfigError` where matplotlib is not installed."""
    figure = new_figure("picture", width, height)
    if figure is None:
        raise ConfigError(
            "A picture needs the package matplotlib, which is not installed: pip install "
            "'engine-trainer[plot]', or leave out --plot."
        )
    return figure


def panels(figure: Any, count: int) -> list[Any]:
    """The axes of `count` pictures beside each other."""
    return list(figure.subplots(1, count, squeeze=False)[0]) if count else []


def draw_curves(
    axes: Any, curves: Sequence[tuple[str, Curve]], title: str, *, smooth: bool = False
) -> None:
    """Draw curves over the steps, each with its name in the legend where they are few."""
    for name, (steps, values) in curves:
        mark = "o-" if len(steps) < 30 and not smooth else "-"
        axes.plot(steps, smoothed(values) if smooth else values, mark, markersize=3, label=name)
    axes.set(xlabel="step", title=title)
    axes.grid(alpha=0.3)
    if len(curves) <= _MOST_NAMED:
        axes.legend(fontsize="small")
