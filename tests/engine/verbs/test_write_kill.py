"""A merge or quantisation that is killed leaves no half directory, and the next one works."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import engine
from tests.support.small_runs import small_run

ROOT = Path(__file__).parents[3]
SERVER = ROOT / "tests" / "support" / "processes" / "write_kill_server.py"
KILLS = 20


def test_twenty_kills_of_each_leave_whole_directories_or_none(
    tiny_model: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    config = small_run(tiny_model, write_rows(4), tmp_path / "run", max_steps=1)
    adapter = engine.train(config, console=False).adapter_path
    done = subprocess.run(
        [sys.executable, str(SERVER), str(tiny_model), str(adapter), str(tmp_path), str(KILLS)],
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    for verb in ("quantize", "merge"):
        assert seen[verb]["killed"] >= KILLS // 2, seen
        assert seen[verb]["left"] >= 1, seen  # some were killed while they wrote
        assert seen[verb]["torn"] == 0, seen
        assert seen[verb]["swept"], seen
