"""Verbs that are killed, or refused by the disk, at a file operation leave nothing half done."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.torture.crashes.every_verb import LINES

ROOT = Path(__file__).parents[3]


def faults(folder: Path, every: int, *names: str) -> dict[str, dict[str, int | list[str]]]:
    program = [sys.executable, "-m", "bench.torture.crashes.file_faults"]
    done = subprocess.run(
        [*program, str(folder), str(every), "all", *names],
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen: dict[str, dict[str, int | list[str]]] = json.loads(done.stdout)
    return seen


def test_every_command_of_the_campaigns_still_runs(tmp_path: Path) -> None:
    seen = faults(tmp_path, 1_000_000, *LINES)  # no operation is the millionth
    assert seen.keys() == set(LINES)
    assert all(figures["operations"] and figures["wrong"] == [] for figures in seen.values())


def test_a_second_start_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    verbs = ("export gguf", "data split", "data dedup")
    seen = faults(tmp_path, 3, *verbs)
    assert seen.keys() == set(verbs)
    for name, figures in seen.items():
        assert figures["wrong"] == [], name
        # Each operation met one of the three faults.
        trials = [figures[kind] for kind in ("killed", "ENOSPC", "EIO")]
        assert sum(map(int, map(str, trials))) == figures["operations"]
        assert all(trials)
