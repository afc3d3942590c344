"""A run that is killed at any moment can go on, and from a step at least as new as it had told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[3] / "tests" / "support" / "processes" / "resume_crash_server.py"
ROOT = Path(__file__).parents[3]


def campaign(folder: Path, rounds: int, fault: str) -> dict[str, int]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SERVER), str(folder), str(rounds), fault],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen: dict[str, int] = json.loads(done.stdout)
    return seen


def test_no_kill_loses_an_acknowledged_step(tmp_path: Path) -> None:
    seen = campaign(tmp_path, 1000, "none")
    assert (seen["lost"], seen["unloadable"], seen["wrong"]) == (0, 0, 0)
    assert seen["good"] == seen["rounds"] == 1000
    assert seen["steps"] > 250
    # The campaign means something only if it kills inside the writing and deleting.
    assert seen["inside"] > 500


@pytest.mark.parametrize("fault", ["acknowledge-early", "retire-early"])
def test_the_campaign_notices_a_store_that_loses_steps(tmp_path: Path, fault: str) -> None:
    assert campaign(tmp_path, 100, fault)["lost"] == 1
