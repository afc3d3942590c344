"""A killed and resumed run with best checkpoint, early stopping and samples ends undisturbed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.runs.metrics import read_metrics

ROOT = Path(__file__).parents[4]
SERVER = ROOT / "tests" / "support" / "processes" / "train_kill_server.py"
KILLS = 5
TIMES = ("seconds", "tokens_per_second", "eta_seconds", "peak_memory_bytes")
CHANGES: dict[str, Any] = {
    "heldout": 0.4,
    "eval_every": 2,
    # The greatest loss is the first one: what a resumed run forgot would be its best anew.
    "greater_is_better": True,
    "early_stopping": "8,0.05",
    "load_best_at_end": True,
    "sample_every": 4,
    "sample_max_new_tokens": 2,
    "sample_temperature": 0.9,
    "checkpoint_every": 3,
}


def told(run: Path) -> list[dict[str, Any]]:
    """The lines of the metrics without what a clock measured."""
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: line[key] for key in line if key not in TIMES} for line in lines]


def checkpoints(run: Path) -> dict[str, dict[str, Any]]:
    """Name -> best and file digests of every checkpoint; its state holds seconds."""
    manifests = {
        path.name: json.loads((path / "MANIFEST.json").read_text())
        for path in run.glob("checkpoint-*")
    }
    return {
        name: {
            "best": manifest["best"],
            **{file: facts for file, facts in manifest["files"].items() if file != "state.json"},
        }
        for name, manifest in manifests.items()
    }


def test_kills_change_neither_the_best_nor_the_end_nor_a_sample(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"Word 1?"\n"Word 5?"\n')
    changes = json.dumps(CHANGES | {"sample_prompts": str(prompts)})
    words = [str(tiny_model), str(write_rows(12)), str(tmp_path / "parts"), str(KILLS), changes]
    done = subprocess.run(
        [sys.executable, str(SERVER), *words],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["last"] == 0, done.stderr
    assert set(seen["statuses"]) <= {-9, 0} and seen["statuses"].count(-9) >= 3, seen
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    ends = [json.loads((run / "summary.json").read_text())["metrics"] for run in (parts, whole)]
    steps = ends[1]["steps"]
    assert steps == ends[1]["best_step"] + 2 * 8 < 60, ends[1]
    for name in ("adapter/adapter_model.safetensors", "samples.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name
    assert told(parts) == told(whole)
    assert checkpoints(parts) == checkpoints(whole)
    for figure in ("steps", "best_step", "best_value", "heldout_loss", "heldout_loss_before"):
        assert ends[0][figure] == ends[1][figure], figure
