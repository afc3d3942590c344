"""Which verb made a directory, and how it ended, by its files.

Reads small files only and does not import torch: a status line in a shell loop should be cheap.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.forging.stages import JOB
from engine.runs.summary import SUMMARY, read_record

RUN_FILES = ("metrics.jsonl", "config.yaml", SUMMARY, "pipeline.log")
PRUNING = "pruning.json"
MARKS = (*RUN_FILES, JOB, PRUNING)
"""What a directory holds that a run, a job of forge, or a verb that writes a model has made."""


def is_made_here(folder: Path) -> bool:
    """Whether a run, a job of forge, or a verb that writes a model made `folder`."""
    return any((folder / name).exists() for name in MARKS)


def verb_of(folder: Path, summary: dict[str, Any] | None = None) -> str:
    """The verb that made `folder`, or is making it: `train` where nothing says another."""
    summary = read_record(folder / SUMMARY) if summary is None else summary
    if (folder / "metrics.jsonl").exists():
        return "train"
    if (folder / JOB).exists():
        return "forge"
    verb = summary.get("verb")
    if isinstance(verb, str):
        return verb
    return "prune" if (folder / PRUNING).exists() else "train"


def state_of(alive: bool, summary: dict[str, Any]) -> str:
    """running, finished, stopped at a step (by a signal), failed, or died (killed or lost)."""
    if alive:
        return "running"
    if not summary:
        return "died"
    if summary.get("status") == "Success":
        return "finished"
    stopped = summary.get("stopped")
    if not isinstance(stopped, dict):
        return "failed"
    step = stopped.get("step")
    return f"stopped at step {step}" if isinstance(step, int) else "stopped"
