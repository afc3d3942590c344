"""What a sweep leaves: its record, a table, a picture."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.comparing.picture import draw_curves, panels
from engine.comparing.runs import read_runs
from engine.comparing.text import shown, table
from engine.plots import new_figure, save_figure
from engine.runs.summary import SUMMARY
from engine.storage import durable
from engine.storage.safe_files import json_object_or_empty
from engine.sweeps.recipe import Sweep
from engine.sweeps.trials import Trial

log = logging.getLogger(__name__)

RECORD, TABLE, PICTURE = "sweep.json", "sweep.md", "sweep.png"
_BESIDE = ("steps", "train_seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended: `value` is the sweep's metric, None where the run failed or has none."""

    trial: Trial
    status: str
    value: float | None
    metrics: Mapping[str, Any]
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "trial": self.trial.name,
            "parameters": dict(self.trial.values),
            "status": self.status,
            "value": self.value,
            "run_directory": str(self.trial.folder),
            "metrics": dict(self.metrics),
            "error_message": self.error,
        }


@dataclass(frozen=True)
class SweepResult:
    """All trials of a sweep, the best first; `status` is that of the command line."""

    sweep: Sweep
    trials: Sequence[TrialResult]
    status: int = 0

    @property
    def best(self) -> TrialResult | None:
        """The best trial; None where none has the metric."""
        first = self.trials[0] if self.trials else None
        return first if first is not None and first.value is not None else None

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "file": str(self.sweep.file),
            "method": self.sweep.method,
            "metric": self.sweep.metric,
            "goal": "maximize" if self.sweep.greatest else "minimize",
            "parameters": [parameter.name for parameter in self.sweep.parameters],
            "best": self.best.trial.name if self.best is not None else None,
            "trials": [trial.as_dict() for trial in self.trials],
        }


def result_of(trial: Trial, metric: str) -> TrialResult:
    """How a trial ended, by its run's own summary."""
    summary = json_object_or_empty(trial.folder / SUMMARY)
    metrics = summary.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    status = summary.get("status")
    value = metrics.get(metric) if status == "Success" else None
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    error = summary.get("error_message")
    return TrialResult(
        trial,
        str(status) if status else "not run",
        float(value) if good and value is not None else None,
        metrics,
        error if isinstance(error, str) else None,
    )


def ranked(results: Sequence[TrialResult], greatest: bool) -> list[TrialResult]:
    """The best first; those without the metric last, in their order."""
    sign = -1.0 if greatest else 1.0
    return sorted(results, key=lambda r: math.inf if r.value is None else sign * r.value)


def sweep_table(result: SweepResult, *, markdown: bool = False) -> str:
    """A line for each trial, the best first."""
    sweep = result.sweep
    names = [parameter.name for parameter in sweep.parameters]
    head = ["trial", *names, sweep.metric, *_BESIDE, "status"]
    rows = [
        [
            one.trial.name,
            *(_given(one.trial.values.get(name)) for name in names),
            shown(one.value),
            *(shown(one.metrics.get(name)) for name in _BESIDE),
            one.status,
        ]
        for one in result.trials
    ]
    if not markdown:
        return table(head, rows)
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _given(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else shown(value)


def write_report(result: SweepResult) -> None:
    """Write `sweep.json`, `sweep.md` and, with matplotlib, `sweep.png`."""
    folder = result.sweep.output_dir
    durable.write_json(folder / RECORD, result.as_dict())
    durable.write_text(folder / TABLE, sweep_table(result, markdown=True) + "\n")
    _draw(result, folder / PICTURE)


def _draw(result: SweepResult, target: Path) -> None:
    """Curves of the trials, and the metric against each number that was varied."""
    sweep = result.sweep
    done = [one for one in result.trials if one.value is not None]
    if not done:
        return
    numeric = [p for p in sweep.parameters if all(_is_number(o.trial.values[p.name]) for o in done)]
    figure = new_figure("picture of the sweep", 5.0 * (1 + len(numeric)), 4.2)
    if figure is None:
        return
    first, *others = panels(figure, 1 + len(numeric))
    runs = read_runs([one.trial.folder for one in done], [one.trial.name for one in done]).runs
    name = "eval_loss" if any("eval_loss" in run.curves for run in runs) else "loss"
    curves = [(run.name, run.curves[name]) for run in runs if name in run.curves]
    draw_curves(first, curves, name, smooth=name == "loss")
    best = done[0]
    for axes, parameter in zip(others, numeric, strict=True):
        points = [(one.trial.values[parameter.name], one.value) for one in done]
        axes.plot(*zip(*points, strict=True), "o", color="tab:blue")
        axes.plot([best.trial.values[parameter.name]], [best.value], "*", color="tab:orange",
                  markersize=14)  # fmt: skip
        if parameter.log or _spans_decades([x for x, _ in points]):
            axes.set_xscale("log")
        axes.set(xlabel=parameter.name, ylabel=sweep.metric, title=parameter.name)
        axes.grid(alpha=0.3)
    save_figure(figure, target)
    log.info("Picture of the sweep: %s", target)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= 10
