"""What is compared of runs, read from their files alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.monitoring import records
from engine.monitoring.metrics_tail import MetricsTail
from engine.monitoring.overview import overview
from engine.monitoring.series import series
from engine.runs.summary import SUMMARY
from engine.storage.home import real
from engine.storage.safe_files import json_object_or_empty

CURVES = ("loss", "eval_loss", "lr", "grad_norm", "tokens_per_second")
_WHERE = frozenset({"output_dir", "run_id", "template_date", "resume", "overwrite"})
"""Settings that always differ and say nothing of what a run is."""
_FIRST = (
    "heldout_loss", "heldout_perplexity", "best_metric", "best_value", "best_step", "loss", "steps",
    "trained_tokens", "train_seconds", "tokens_per_second", "peak_memory_bytes",
)  # fmt: skip
"""Figures in the order in which somebody asks for them; the others follow."""

Curve = tuple[list[int], list[float]]


@dataclass(frozen=True)
class ComparedRun:
    """One run: its name beside the others, its folder, and what its files say."""

    name: str
    folder: Path
    state: str
    settings: Mapping[str, str]
    figures: Mapping[str, Any]
    curves: Mapping[str, Curve]

    def as_dict(self) -> dict[str, Any]:
        """JSON values; the settings stand beside those of the other runs."""
        curves = {
            name: {"steps": steps, "values": values}
            for name, (steps, values) in self.curves.items()
        }
        return {
            "name": self.name,
            "folder": str(self.folder),
            "state": self.state,
            "figures": dict(self.figures),
            "curves": curves,
        }


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other."""

    runs: Sequence[ComparedRun]

    def settings(self) -> list[tuple[str, list[str | None]]]:
        """Settings that differ, with each run's value; None where a run does not have it."""
        names = dict.fromkeys(name for run in self.runs for name in run.settings)
        rows = [(name, [run.settings.get(name) for run in self.runs]) for name in names]
        return [row for row in rows if row[0] not in _WHERE and len(set(row[1])) > 1]

    def figures(self) -> list[tuple[str, list[Any]]]:
        """Final figures of the runs, those asked for most first."""
        names = dict.fromkeys(name for run in self.runs for name in run.figures)
        known = [name for name in _FIRST if name in names]
        rest = [name for name in names if name not in _FIRST]
        return [(name, [run.figures.get(name) for run in self.runs]) for name in [*known, *rest]]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        names = [run.name for run in self.runs]
        return {
            "runs": [run.as_dict() for run in self.runs],
            "differing_settings": {
                name: dict(zip(names, values, strict=True)) for name, values in self.settings()
            },
        }


def read_runs(folders: Sequence[Path], names: Sequence[str] | None = None) -> Comparison:
    """The runs in some folders; `names` are theirs beside each other, else what tells them apart.

    Raises `ConfigError` where a folder is named twice.
    """
    resolved = [real(folder) for folder in folders]
    twice = [str(a) for a, b in zip(folders, resolved, strict=True) if resolved.count(b) > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is named twice; name every run once.")
    shown = list(names) if names is not None else short_names(folders)
    return Comparison([_read(folder, name) for folder, name in zip(folders, shown, strict=True)])


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of every path, or more of it where two end alike."""
    parts = [real(folder).parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*own[-count:])) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> ComparedRun:
    tail = MetricsTail(folder / "metrics.jsonl")
    view = overview(folder, tail)
    drawn = series(tail)["figures"]
    curves = {c: (drawn[c]["steps"], drawn[c]["values"]) for c in CURVES if drawn[c]["steps"]}
    metrics = json_object_or_empty(folder / SUMMARY).get("metrics")
    figures = {key: value for key, value in view["figures"].items() if key in _FIRST}
    figures |= {"steps": view["step"]} if view["step"] else {}
    figures |= metrics if isinstance(metrics, dict) else {}
    return ComparedRun(name, folder, view["state"], records.settings(folder), figures, curves)
