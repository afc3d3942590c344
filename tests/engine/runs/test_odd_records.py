"""Records of a run with values of any kind: status tells what it can, and never fails."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError
from engine.verbs.training.status import describe_status, read_status

METRICS: dict[str, Any] = {"step": 3, "loss": 1.5, "lr": 1e-4, "epoch": 0.5, "grad_norm": 2.0}
METRICS |= {"tokens_per_second": 9.0, "peak_memory_bytes": 7, "eta_seconds": 3.0, "skipped": 1}
SUMMARY: dict[str, Any] = {"verb": "train", "status": "Failure", "error_message": "x"}
SUMMARY |= {"metrics": {"loss": 1.0}, "stopped": {"step": 3}, "output_path": "a", "wall_seconds": 1}
MANIFEST: dict[str, Any] = {"total_steps": 6, "machine": {}, "directory": "/x"}
NOTE: dict[str, Any] = {"pid": 1, "host": "h"}
ODD: tuple[Any, ...] = (None, True, -1, 10**400, 1e308, "", "x\x1b[2J", [], {}, [[1]], {"a": [1]})


def damaged(record: dict[str, Any], chance: random.Random) -> str:
    odd = {key: chance.choice(ODD) if chance.random() < 0.4 else record[key] for key in record}
    return chance.choice(["[" * 9999, "5", "null"]) if chance.random() < 0.1 else json.dumps(odd)


def told(run: Path) -> str:
    """What status says of a run; or the error that names its metrics."""
    try:
        return "\n".join(describe_status(read_status(run)))
    except EngineError as error:
        return str(error) if "metrics.jsonl" in str(error) else ""


def test_status_of_a_run_with_odd_records_never_fails(tmp_path: Path) -> None:
    chance = random.Random(5)
    (tmp_path / "config.yaml").write_text("")
    for number in range(300):
        lines = [damaged(METRICS, chance) for _ in range(2)]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        if number % 3 == 0:
            (tmp_path / "metrics.jsonl").unlink()
        for name, record in (("summary", SUMMARY), ("manifest", MANIFEST)):
            (tmp_path / f"{name}.json").write_text(damaged(record, chance))
        (tmp_path / ".lock").write_text(damaged(NOTE, chance))
        assert told(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "manifest.json", ".lock"])
def test_status_waits_for_no_pipe(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    os.mkfifo(tmp_path / name)
    assert told(tmp_path)
