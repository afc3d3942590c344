"""One process alone needs nothing of torch.distributed that torch itself does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, sys
import torch
before = set(sys.modules)
from engine.config.train_config import NO_DATA, TrainConfig
import engine.verbs.training.train
from engine.verbs.training.plan import plan
plan(TrainConfig(model="smollm2-135m", data=NO_DATA, max_length=64, batch_size=1))
assert "engine.memory.simulate.step" in sys.modules
print(json.dumps([m for m in set(sys.modules) - before if m.startswith("torch.distributed")]))
"""


def test_plans_and_runs_of_one_process_import_no_groups() -> None:
    bare = "import json, sys, torch._dynamo; print(json.dumps(list(sys.modules)))"
    told, known = (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        for code in (PROGRAM, bare)
    )
    assert told.returncode == 0, told.stderr
    # torch's own compiler, which the first meta op imports, brings some of them.
    assert set(json.loads(told.stdout)) <= set(json.loads(known.stdout))
    assert not any("elastic" in module for module in json.loads(told.stdout))
