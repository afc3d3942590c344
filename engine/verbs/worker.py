"""One of the processes that `--gpus N` starts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from engine.config.tasks.workflow import DoctorSettings
from engine.config.train_config import TrainConfig
from engine.distributed.group import leads
from engine.errors import EngineError
from engine.runs.signals import Interrupted
from engine.storage import durable, names


def main(job: dict[str, Any]) -> int:
    """Do the job as one of the processes; the exit status."""
    from engine.verbs.training.train import train

    outcome = Path(job["outcome"])
    if leads():
        names.unlink(outcome, missing_ok=True)  # of a start before this one
    if "check" in job:
        return _check(outcome, DoctorSettings(**job["check"]))
    try:
        result = train(TrainConfig(**job["settings"]), console=job["console"] and leads())
    except Interrupted as error:
        _tell(outcome, {"error": str(error), "signal": error.number, "step": error.step})
        return int(error.code or 0) if isinstance(error.code, int) else 1
    except EngineError as error:
        if not leads():
            print(f"engine: rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        _tell(outcome, {"error": str(error), "kind": type(error).__name__})
        return 2
    facts = {"output": str(result.output_path), "metrics": result.metrics}
    _tell(outcome, facts | {"next": list(result.next), "pushed": result.pushed})
    return 0


def _check(outcome: Path, settings: DoctorSettings) -> int:
    """Look at the group that this process is one of."""
    from engine.verbs.doctor_group import examine_group

    try:
        report = examine_group(settings)
    except EngineError as error:
        _tell(outcome, {"error": str(error)})
        return 2
    if report is not None:
        _tell(outcome, report.plain())
    return 0


def _tell(outcome: Path, facts: dict[str, Any]) -> None:
    """Leave `facts` for the process that started this one; the first speaks for all."""
    if leads():
        durable.write_json(outcome, facts)


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
