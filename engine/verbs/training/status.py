"""`engine status`: the state of a run, from its files alone.

Only reads, never waits, and does not import torch: a status line in a shell loop should be cheap.
"""

import os
import time
from pathlib import Path
from typing import Any

from engine.config.tasks.commands import command_of
from engine.errors import ConfigError
from engine.monitoring.state import MARKS, RUN_FILES, is_made_here, state_of, verb_of
from engine.runs.metrics import describe_seconds, read_metrics
from engine.runs.output import CHECKPOINT
from engine.runs.summary import read_record
from engine.storage.lock import is_locked, read_holder
from engine.storage.manifest import MANIFEST_NAME
from engine.storage.safe_files import json_object_or_empty, open_regular


def find_run(name: str, root: Path) -> Path:
    """The run directory that `name` means: a path, a name under `root`, or "" for the newest.

    Raises `ConfigError` where there is none.
    """
    if name:
        for candidate in (Path(name), root / name):
            if is_made_here(candidate):
                return candidate
        raise ConfigError(_no_run(name, root))
    runs = [entry for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    runs = [entry for entry in runs if any((entry / file).exists() for file in RUN_FILES)]
    if not runs:
        raise ConfigError(f"There are no runs under {root}/. Name a run directory.")
    return max(runs, key=_last_change)


def _no_run(name: str, root: Path) -> str:
    """What `name` is instead of a run, and what could be named."""
    path = Path(name)
    what = "there is no such folder"
    if (path.parent / "config.yaml").is_file() and path.exists():
        return f"{name} is a part of a run. Name the run itself: engine status {path.parent}"
    if (path / "config.json").exists():
        what = "it holds a model that no verb of this program wrote"
    elif path.is_dir():
        what = f"it holds none of {', '.join(MARKS)}"
    elif path.exists():
        what = "it is a file"
    runs = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []
    listed = f" Runs under {root}/: {', '.join(runs[-8:])}." if runs else ""
    return f"{name} is no run: {what}.{listed} `engine status` without a name shows the newest."


def _last_change(run: Path) -> float:
    times = [(run / file).stat().st_mtime for file in RUN_FILES if (run / file).exists()]
    return max(times)


def read_status(run: Path, tail: int = 0) -> dict[str, Any]:
    """State, progress and the last step of a run. Raises `CheckpointError` for damaged metrics.

    `state` is running, finished, stopped at a step (by a signal, after its checkpoint), failed, or
    died (no process, no summary: killed or lost).
    """
    if not (run / "metrics.jsonl").exists():
        other = _other_verb(run)
        if other is not None:
            return other
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if line.get("loss") is not None or "lr" in line]
    last = steps[-1] if steps else {}
    summary = read_record(run / "summary.json")
    manifest = read_record(run / "manifest.json")
    alive = is_locked(run)
    state = state_of(alive, summary)
    status: dict[str, Any] = {
        "run": str(run),
        "state": state,
        "alive": alive,
        "process": read_holder(run) if alive else None,
        "step": last.get("step", 0),
        "total_steps": manifest.get("total_steps"),
        "last": last,
        "checkpoints": _checkpoints(run),
        "best": _best(run),
        "output_path": summary.get("output_path"),
        "error_message": summary.get("error_message") if not alive else None,
        "metrics": summary.get("metrics", {}),
        "updated_seconds_ago": _age(run / "metrics.jsonl"),
    }
    if tail:
        status["log"] = _last_lines(run / "pipeline.log", tail)
    return status


def _other_verb(folder: Path) -> dict[str, Any] | None:
    """The status of what another verb than train made, or is making, in `folder`."""
    summary = read_record(folder / "summary.json")
    verb = verb_of(folder, summary)
    if verb == "train":
        return None
    alive = is_locked(folder)
    status: dict[str, Any] = {
        "run": str(folder),
        "verb": verb,
        "state": "finished" if verb == "prune" and not summary else state_of(alive, summary),
        "alive": alive,
        "process": read_holder(folder) if alive else None,
        "parameters": summary.get("parameters", {}),
        "metrics": summary.get("metrics", {}),
        "output_path": summary.get("output_path") or (None if verb == "forge" else str(folder)),
        "error_message": summary.get("error_message") if not alive else None,
        "wall_seconds": summary.get("wall_seconds"),
    }
    if verb == "forge":
        status |= _job(folder)
    return status


def _job(folder: Path) -> dict[str, Any]:
    """Stages of a job that are done, in order, and the run that is going on, if any."""
    done = sorted((folder / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime)
    runs = [path.parent for path in folder.glob("*/run/.lock") if is_locked(path.parent)]
    return {
        "stages": [path.stem for path in done],
        "training": read_status(runs[0]) if runs else None,
    }


def describe_status(status: dict[str, Any]) -> list[str]:
    """The status as lines for a terminal."""
    if "verb" in status:
        return _describe_other(status)
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
    if status["best"]:
        rows.append(("best", "{metric} {value:.4f} after step {step}".format(**status["best"])))
    if status["output_path"]:
        rows.append(("output", status["output_path"]))
    if status["checkpoints"] and status["state"] not in ("running", "finished"):
        rows.append(("go on with", command_of("resume", Path(status["run"]))))
    if status["error_message"] and not status["state"].startswith("stopped"):
        rows.append(("error", status["error_message"]))
    return [f"{label:<14} {value}" for label, value in rows] + list(status.get("log", []))


def _describe_other(status: dict[str, Any]) -> list[str]:
    who = status["process"]
    state = status["state"] + (f" (process {who['pid']} on {who['host']})" if who else "")
    rows = [(status["verb"], status["run"]), ("state", state)]
    model = status["parameters"].get("model")
    if model is not None:
        rows.append(("model", str(model)))
    if status.get("stages"):
        rows.append(("stages done", ", ".join(status["stages"])))
    for name, value in status["metrics"].items():
        if value not in (None, [], {}):
            rows.append((name.replace("_", " "), _short(value)))
    if status["wall_seconds"] is not None:
        rows.append(("took", describe_seconds(status["wall_seconds"])))
    if status["output_path"]:
        rows.append(("output", status["output_path"]))
    if status["error_message"]:
        rows.append(("error", status["error_message"]))
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}} {value}" for label, value in rows]
    if status.get("training"):
        lines += ["", *describe_status(status["training"])]
    return lines


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bar(step: int, total: int | None, width: int = 24) -> str:
    if not total:
        return ""
    full = min(width, step * width // total)
    return f"  [{'#' * full}{'.' * (width - full)}]"


def _checkpoints(run: Path) -> list[int]:
    matches = [CHECKPOINT.fullmatch(entry.name) for entry in run.glob("checkpoint-*")]
    return sorted(int(match[1]) for match in matches if match)


def _best(run: Path) -> dict[str, Any] | None:
    """The best evaluation so far, by the newest checkpoint's manifest; None without one."""
    for step in _checkpoints(run)[-1:]:
        best = json_object_or_empty(run / f"checkpoint-{step}" / MANIFEST_NAME).get("best")
        if isinstance(best, dict) and isinstance(best.get("value"), int | float):
            return {key: best.get(key) for key in ("metric", "value", "step")}
    return None


def _age(path: Path) -> float | None:
    return round(max(0.0, time.time() - path.stat().st_mtime), 1) if path.exists() else None


def _last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines, without reading more of a long log than its last MiB."""
    if not path.exists():
        return []
    with os.fdopen(open_regular(path), "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        return file.read().decode("utf-8", "replace").splitlines()[-count:]
