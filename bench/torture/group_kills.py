"""Ranks that are killed at random moments, and started again."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bench.torture.campaign import Campaign, Figures
from tests.support.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[2]
STEPS_PER_KILL = 8
_PATIENCE = 300.0


def group_kills(trials: int, seed: int) -> Figures:
    """SIGKILL of one of two ranks, at a random moment of starting, training or saving.

    The run must end with the bytes of a run that nobody disturbs, and no step that a checkpoint
    acknowledged may be lost: the newest one never goes back.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_model(folder / "model")
        rows = [
            {"prompt": f"What is {n}?", "response": f"It is {n}. " * (1 + n % 5)} for n in range(24)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        steps = str(STEPS_PER_KILL * trials)
        calm = _start(folder, "calm", steps, 0)
        if calm.wait() != 0:
            raise RuntimeError("the run that nobody disturbs failed")
        began = time.monotonic()
        figures = _disturbed(folder, steps, trials, chance)
        both = [(folder / run / "adapter/adapter_model.safetensors") for run in ("calm", "killed")]
        figures["equal"] = int(both[1].exists() and both[0].read_bytes() == both[1].read_bytes())
        return {"trials": trials, **figures, "seconds": round(time.monotonic() - began, 1)}


def _start(folder: Path, run: str, steps: str, restarts: int) -> subprocess.Popen[bytes]:
    launcher = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    what = ["train", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    how = ["--output-dir", str(folder / run), "--max-steps", steps, "--checkpoint-every", "1"]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "cli.main"),
            *(*what, *how, "--batch-size", "4", "--device", "cpu", "--dtype", "float32"),
            *("--no-plot", "--lora-dropout", "0.1"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _disturbed(folder: Path, steps: str, trials: int, chance: random.Random) -> Figures:
    agent = _start(folder, "killed", steps, trials + 1)
    kills = lost = newest = 0
    while agent.poll() is None:
        reached = _newest(folder / "killed")
        lost += reached < newest
        newest = max(newest, reached)
        ranks = _ranks(agent)
        if kills < trials and len(ranks) == 2:
            # Some die while they start, most after the group has gone some steps further.
            goal, patience = newest + chance.choice((0, 1, 2, 4)), time.monotonic() + _PATIENCE
            while agent.poll() is None and _newest(folder / "killed") < goal:
                if time.monotonic() > patience:
                    break
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.6))
            ranks = _ranks(agent)
            if ranks:
                chance.choice(ranks).kill()
                kills += 1
        time.sleep(0.3)
    return {"kills": kills, "lost": lost, "status": agent.returncode}


def _newest(run: Path) -> int:
    """The last step whose checkpoint has its final name."""
    steps = [int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")]
    return max(steps, default=0)


def _ranks(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return [
            child
            for child in psutil.Process(agent.pid).children()
            if child.status() != psutil.STATUS_ZOMBIE and "cli.main" in child.cmdline()
        ]
    except psutil.NoSuchProcess:
        return []


GROUP_KILLS = Campaign(
    "one of two processes killed while they train together",
    50,
    group_kills,
    lambda f: f["equal"] == 1 and f["lost"] == 0 and f["status"] == 0 and f["kills"] == f["trials"],
)
