"""One entry per run: state, progress and newest figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.forging.stages import JOB
from engine.monitoring.confined import is_own_file, own_object
from engine.monitoring.metrics_tail import MetricsTail
from engine.monitoring.state import state_of, verb_of
from engine.runs.summary import SUMMARY
from engine.storage.lock import is_locked

_OF_A_STEP = (
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "peak_memory_bytes",
    "eta_seconds",
    "skipped",
)
_OF_A_SUMMARY = (
    "heldout_perplexity_before",
    "heldout_perplexity",
    "perplexity_before",
    "planned_peak_bytes",
    "train_seconds",
)


def overview(folder: Path, tail: MetricsTail) -> dict[str, Any]:
    """State, progress and newest figures of the run in `folder`, as JSON has them.

    `has` names the views that there is something to show in.
    """
    with tail.lock:
        tail.update()
        last, count = dict(tail.last), len(tail.steps)
        heldout = next((x for x in reversed(tail.columns["eval_perplexity"]) if x == x), None)
    summary = own_object(folder / SUMMARY)
    manifest = own_object(folder / "manifest.json")
    alive = is_locked(folder)
    verb = verb_of(folder, summary)
    state = state_of(alive, summary)
    if verb == "prune" and not summary and not alive:
        state = "finished"  # its record is written last, and older versions wrote no summary
    metrics = _object(summary.get("metrics"))
    figures = {name: last.get(name) for name in _OF_A_STEP}
    figures |= {name: metrics.get(name, manifest.get(name)) for name in _OF_A_SUMMARY}
    if figures["heldout_perplexity"] is None:
        figures["heldout_perplexity"] = heldout
    error = summary.get("error_message")
    return {
        "folder": str(folder),
        "verb": verb,
        "state": state,
        "step": last.get("step", 0),
        "steps": count,
        "total_steps": manifest.get("total_steps"),
        "figures": {name: value for name, value in figures.items() if _is_number(value)},
        "error": error if isinstance(error, str) and not alive else None,
        "updated": _last_write(folder),
        "has": sorted(_views(folder, verb)),
    }


def _views(folder: Path, verb: str) -> set[str]:
    views = {
        "pruning": "pruning.json",
        "samples": "samples.jsonl",
        "forge": JOB,
        "settings": "config.yaml",
    }
    has = {view for view, file in views.items() if is_own_file(folder / file)}
    if "forge" in has:
        has |= {"samples", "pruning", "settings"}
    if verb == "train" and "settings" in has:
        has.add("rows")
    return has


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _last_write(folder: Path) -> float | None:
    """When a file of the run was written last, in seconds since the epoch."""
    newest = 0.0
    for name in ("metrics.jsonl", SUMMARY, "pipeline.log", "stages", "pruning.json"):
        try:
            newest = max(newest, (folder / name).stat().st_mtime)
        except OSError:
            continue
    return newest or None
