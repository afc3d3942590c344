"""Run directories written without training, for tests of what shows them."""

import json
import math
from pathlib import Path
from typing import Any


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    """One line of metrics.jsonl as a run writes it; the loss falls with the step."""
    line: dict[str, Any] = {
        "step": step, "epoch": step / 100, "loss": 2.0 * math.exp(-step / 60) + 0.5, "lr": 1e-4,
        "grad_norm": 1.0, "tokens_per_second": 200.0 + step % 7, "trained_tokens": 64,
        "peak_memory_bytes": 2**30 + step * 2**16, "eta_seconds": 1.0, "skipped": 0, "seconds": 0.5,
    }  # fmt: skip
    return line | changes


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines to a metrics.jsonl."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def write_run(
    folder: Path, steps: int = 50, status: str | None = "Success", **settings: Any
) -> Path:
    """A run directory: metrics, config.yaml, manifest and, with a `status`, a summary."""
    folder.mkdir(parents=True)
    lines = [step_line(step) for step in range(1, steps + 1)]
    for line in lines[9::10]:
        line |= {"eval_loss": line["loss"] + 0.1, "eval_perplexity": math.exp(line["loss"] + 0.1)}
    write_lines(folder / "metrics.jsonl", lines)
    config = {"model": "model", "data": ["rows.jsonl"], "learning_rate": 1e-4} | settings
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    manifest = {"total_steps": steps, "heldout_perplexity_before": 9.5, "machine": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if status is not None:
        error = None if status == "Success" else "The rows ended. Give more rows."
        summary: dict[str, Any] = {
            "verb": "train",
            "status": status,
            "error_message": error,
            "metrics": {},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_pruned(folder: Path, layers: int = 4, heads: int = 6) -> Path:
    """A folder with a pruning.json of some layers, one head of each pruned."""
    folder.mkdir(parents=True)
    record = {
        "format": "engine-pruning-1", "metric": "l2", "mode": "zero", "fraction": 1 / heads,
        "layers": [
            {"layer": layer, "heads": heads, "pruned": [layer % heads], "pruned_before": [],
             "scores": [1.0 + layer + head / 10 for head in range(heads)]}
            for layer in range(layers)
        ],
    }  # fmt: skip
    (folder / "pruning.json").write_text(json.dumps(record))
    return folder


def write_job(folder: Path) -> Path:
    """A directory of engine forge with two judged models and one that is being trained."""
    (folder / "stages").mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"training": {"lora_rank": 8}, "cycles": 1}))
    for name, perplexity in (("baseline", 20.0), ("cycle-1-pruned", 31.5)):
        stage = {
            "perplexity": perplexity, "parameters": 1000, "bytes": 4000, "pruned_heads": 0,
            "tokens_per_second": 12.5, "samples": [{"prompt": "What?", "text": f"of {name}"}],
        }  # fmt: skip
        (folder / "stages" / f"{name}.json").write_text(json.dumps(stage))
    (folder / "stages" / "data.json").write_text(json.dumps({"rows": 4}))
    write_pruned(folder / "cycle-1" / "pruned")
    return folder
