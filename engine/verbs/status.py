"""`engine status`: the state of a run, from its files alone.

Only reads, never waits, and does not import torch: a status line in a shell loop should be cheap.
"""

import time
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.runs.commands import command_of
from engine.runs.metrics import describe_seconds, read_metrics
from engine.storage.lock import is_locked, read_holder
from engine.storage.safe_files import json_object_or_empty

_RUN_FILES = ("metrics.jsonl", "config.yaml", "summary.json", "pipeline.log")


def find_run(name: str, root: Path) -> Path:
    """The run directory that `name` means: a path, a name under `root`, or "" for the newest.

    Raises `ConfigError` where there is none.
    """
    if name:
        for candidate in (Path(name), root / name):
            if any((candidate / file).exists() for file in _RUN_FILES):
                return candidate
        raise ConfigError(
            f"{name!r} is no run directory: expected one of {', '.join(_RUN_FILES)} in it or in "
            f"{root / name}."
        )
    runs = [entry for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    runs = [entry for entry in runs if any((entry / file).exists() for file in _RUN_FILES)]
    if not runs:
        raise ConfigError(f"There are no runs under {root}/. Name a run directory.")
    return max(runs, key=_last_change)


def _last_change(run: Path) -> float:
    times = [(run / file).stat().st_mtime for file in _RUN_FILES if (run / file).exists()]
    return max(times)


def read_status(run: Path, tail: int = 0) -> dict[str, Any]:
    """State, progress and the last step of a run. Raises `CheckpointError` for damaged metrics.

    `state` is running, finished, stopped at a step (by a signal, after its checkpoint), failed, or
    died (no process, no summary: killed or lost).
    """
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if line.get("loss") is not None or "lr" in line]
    last = steps[-1] if steps else {}
    summary = json_object_or_empty(run / "summary.json")
    manifest = json_object_or_empty(run / "manifest.json")
    alive = is_locked(run)
    if alive:
        state = "running"
    elif summary:
        state = "finished" if summary.get("status") == "Success" else "failed"
    else:
        state = "died"
    stopped = summary.get("stopped")
    stopped_at = stopped.get("step") if isinstance(stopped, dict) else None
    if state == "failed" and isinstance(stopped_at, int):
        state = f"stopped at step {stopped_at}"
    status: dict[str, Any] = {
        "run": str(run),
        "state": state,
        "alive": alive,
        "process": read_holder(run) if alive else None,
        "step": last.get("step", 0),
        "total_steps": manifest.get("total_steps"),
        "last": last,
        "checkpoints": _checkpoints(run),
        "output_path": summary.get("output_path"),
        "error_message": summary.get("error_message") if not alive else None,
        "metrics": summary.get("metrics", {}),
        "updated_seconds_ago": _age(run / "metrics.jsonl"),
    }
    if tail:
        status["log"] = _last_lines(run / "pipeline.log", tail)
    return status


def describe_status(status: dict[str, Any]) -> list[str]:
    """The status as lines for a terminal."""
    last, total = status["last"], status["total_steps"]
    who = status["process"]
    state = status["state"] + (f" (process {who['pid']} on {who['host']})" if who else "")
    rows = [("run", status["run"]), ("state", state)]
    share = f" of {total}  ({status['step'] / total:.0%})" if total else ""
    rows.append(("step", f"{status['step']}{share}" + _bar(status["step"], total)))
    if last:
        shown = {
            "epoch": ("epoch", "{:.2f}"),
            "loss": ("loss", "{:.4f}"),
            "lr": ("learning rate", "{:.3g}"),
            "grad_norm": ("gradient norm", "{:.3g}"),
            "tokens_per_second": ("tokens/s", "{:,.0f}"),
        }
        for key, (label, form) in shown.items():
            if last.get(key) is not None:
                rows.append((label, form.format(last[key])))
        if last.get("peak_memory_bytes"):
            rows.append(("peak memory", f"{last['peak_memory_bytes'] / 2**30:.2f} GiB"))
        if status["alive"]:
            rows.append(("time left", describe_seconds(last.get("eta_seconds"))))
        if last.get("skipped"):
            rows.append(("skipped steps", str(last["skipped"])))
    if status["updated_seconds_ago"] is not None:
        rows.append(("last step", f"{describe_seconds(status['updated_seconds_ago'])} ago"))
    if status["checkpoints"]:
        rows.append(("checkpoints", ", ".join(map(str, status["checkpoints"]))))
    if status["output_path"]:
        rows.append(("output", status["output_path"]))
    if status["checkpoints"] and status["state"] not in ("running", "finished"):
        rows.append(("go on with", command_of("resume", Path(status["run"]))))
    if status["error_message"] and not status["state"].startswith("stopped"):
        rows.append(("error", status["error_message"]))
    return [f"{label:<14} {value}" for label, value in rows] + list(status.get("log", []))


def _bar(step: int, total: int | None, width: int = 24) -> str:
    if not total:
        return ""
    full = min(width, step * width // total)
    return f"  [{'#' * full}{'.' * (width - full)}]"


def _checkpoints(run: Path) -> list[int]:
    names = [entry.name.removeprefix("checkpoint-") for entry in run.glob("checkpoint-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def _age(path: Path) -> float | None:
    return round(max(0.0, time.time() - path.stat().st_mtime), 1) if path.exists() else None


def _last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines, without reading more of a long log than its last MiB."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            return file.read().decode("utf-8", "replace").splitlines()[-count:]
    except FileNotFoundError:
        return []
