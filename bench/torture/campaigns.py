"""The campaigns: each does so many trials and counts what came out."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from bench.torture.arithmetic import ARITHMETIC
from bench.torture.campaign import Campaign, Figures
from bench.torture.crashes.campaigns import CRASHES
from bench.torture.group_kills import GROUP_KILLS
from bench.torture.hostile_files import HOSTILE_FILES
from bench.torture.memory_walls import MEMORY
from engine.errors import CheckpointError
from engine.runs.checkpoints import CheckpointStore

ROOT = Path(__file__).parents[2]
PROCESSES = ROOT / "tests" / "support" / "processes"


def kills(trials: int, seed: int) -> Figures:
    """SIGKILL at random moments of a process that saves checkpoint after checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PROCESSES / "resume_crash_server.py"), folder]
        done = subprocess.run(
            [*command, str(trials), "none", str(seed)],
            capture_output=True,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
    figures: Figures = json.loads(done.stdout)
    return figures


def store_with_steps(folder: Path, steps: int) -> CheckpointStore:
    """A store of checkpoints of a few tensors."""
    store = CheckpointStore(folder)
    for step in range(1, steps + 1):
        tensors = {"a": torch.randn(64, 33), "b": torch.full((700,), step, dtype=torch.uint8)}
        store.save(step, {"adapter/adapter_model": tensors}, {"step": step})
    return store


def rot(trials: int, seed: int) -> Figures:
    """One flipped bit in a file of the newest checkpoint: found, and the one before it loads."""
    chance, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name, store_with_steps(Path(name), 2) as store:
        newest = store.path_of(2)
        whole = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
        sizes = [len(data) for data in whole.values()]
        for _ in range(trials):
            (path,) = chance.choices(list(whole), sizes)
            changed = bytearray(whole[path])
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            try:
                store.load(newest)
                counts["missed"] += 1
            except CheckpointError:
                counts["detected"] += 1
            path.write_bytes(whole[path])
        counts["previous_loads"] = int(store.load(store.path_of(1)).step == 1)
    return {"trials": trials, **counts}


def full_disks(trials: int, seed: int) -> Figures:
    """Saving on a file system of so many sizes, in a mount namespace of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bench.torture.full_disk", folder, str(trials)]
        done = subprocess.run(
            ["unshare", "-Urm", *command], capture_output=True, text=True, check=True, cwd=ROOT
        )
    figures: Figures = json.loads(done.stdout)
    return figures


def protocol_steps(trials: int, seed: int) -> Figures:
    """Each step of the saving protocol taken away: the tests must notice every one."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider",
         "tests/engine/runs/test_protocol_steps.py"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1]
    return {"passed": done.returncode == 0, "pytest": last.split(" in ")[0]}


def _no_loss(figures: Figures) -> bool:
    return not any(figures[key] for key in ("lost", "unloadable", "wrong"))


CAMPAIGNS: dict[str, Campaign] = {
    "T1": Campaign("SIGKILL while checkpoints are saved", 10_000, kills, _no_loss, part=500),
    "T5": Campaign(
        "flipped bits of a checkpoint",
        10_000,
        rot,
        lambda f: f["detected"] == f["trials"] and f["previous_loads"] == 1,
    ),
    "T6": Campaign(
        "full disks", 100, full_disks, lambda f: f["loadable"] == f["trials"] == f["named"]
    ),
    "T23": Campaign("steps of the protocol taken away", 1, protocol_steps, lambda f: f["passed"]),
    **CRASHES,
    **HOSTILE_FILES,
    **ARITHMETIC,
    **MEMORY,
    **GROUP_KILLS,
}
