"""A run that is killed at random moments and resumed each time ends with the undisturbed bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SERVER = Path(__file__).parents[3] / "tests" / "support" / "processes" / "train_kill_server.py"
ROOT = Path(__file__).parents[3]
KILLS = 20


def test_twenty_kills_leave_the_adapter_of_the_undisturbed_run(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parts = tmp_path / "parts"
    done = subprocess.run(
        [sys.executable, str(SERVER), str(tiny_model), str(write_rows(9)), str(parts), str(KILLS)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["last"] == 0, done.stderr
    # A life may end by itself once the run is over; the others must really have been killed, and at
    # different steps.
    assert set(seen["statuses"]) <= {-9, 0}
    assert seen["statuses"].count(-9) >= KILLS // 2
    assert len(set(seen["steps"])) >= KILLS // 4
    result = Path("adapter") / "adapter_model.safetensors"
    assert (parts / result).read_bytes() == (tmp_path / "whole" / result).read_bytes()
