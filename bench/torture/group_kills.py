"""Ranks that are killed at random moments, and started again."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from bench.torture.campaign import Campaign, Figures
from tests.support.tiny_model import write_tiny_model, write_tokenizer

ROOT = Path(__file__).parents[2]
STEPS_PER_KILL = 8
_PATIENCE = 300.0
_SAID = 600


@dataclass(frozen=True)
class Division:
    """What two processes divide: the options that say so, a model that has it, and the output."""

    options: tuple[str, ...] = ()
    family: str = "qwen3"
    output: str = "adapter/adapter_model.safetensors"


_DROPOUT = ("--lora-dropout", "0.1")
DIVISIONS = {
    "T25": ("their rows", Division(_DROPOUT)),
    "T25-weights": ("a frozen base", Division(("--shard", "weights", *_DROPOUT))),
    "T25-full": (
        "all that is trained",
        Division(("--shard", "weights", "--method", "full"), output="model/model.safetensors"),
    ),
    "T25-context": ("the tokens of a row", Division(("--context-parallel", "2", *_DROPOUT))),
    "T25-experts": ("experts", Division(("--expert-parallel", "2", *_DROPOUT), "qwen3_moe")),
}
"""Campaign -> what processes divide, in words and in settings."""


def group_kills(division: Division, trials: int, seed: int) -> Figures:
    """SIGKILL of one of two ranks, at a random moment of starting, training or saving.

    The run must end with the bytes of a run that nobody disturbs, and no step that a checkpoint
    acknowledged may be lost: the newest one never goes back.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_model(folder / "model", division.family)
        if division.family == "qwen3_moe":  # which has 64 rows of its vocabulary
            write_tokenizer(folder / "model", f"{string.ascii_lowercase}{string.digits} \n.?WI")
        rows = [
            {"prompt": f"What is {n}?", "response": f"It is {n}. " * (1 + n % 5)} for n in range(24)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        steps = str(STEPS_PER_KILL * trials)
        calm = _start(folder, "calm", steps, 0, division)
        if calm.wait() != 0:
            raise RuntimeError(f"the run that nobody disturbs failed: {_said(folder, 'calm')}")
        began = time.monotonic()
        agent = _start(folder, "killed", steps, trials + 1, division)
        figures = _disturbed(agent, folder / "killed", trials, chance)
        if figures["status"] != 0:
            figures["said"] = _said(folder, "killed")
        both = [folder / run / division.output for run in ("calm", "killed")]
        figures["equal"] = int(both[1].exists() and both[0].read_bytes() == both[1].read_bytes())
        return {"trials": trials, **figures, "seconds": round(time.monotonic() - began, 1)}


def _start(
    folder: Path, run: str, steps: str, restarts: int, division: Division
) -> subprocess.Popen[bytes]:
    launcher = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    what = ["train", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")]
    how = ["--output-dir", str(folder / run), "--max-steps", steps, "--checkpoint-every", "1"]
    with (folder / f"{run}.txt").open("wb") as said:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "cli.main"),
                *(*what, *how, "--batch-size", "4", "--device", "cpu", "--dtype", "float32"),
                *("--no-plot", *division.options),
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )


def _said(folder: Path, run: str) -> str:
    """The end of what a run wrote to its terminal."""
    return (folder / f"{run}.txt").read_text(errors="replace")[-_SAID:]


def _disturbed(
    agent: subprocess.Popen[bytes], run: Path, trials: int, chance: random.Random
) -> Figures:
    kills = lost = newest = 0
    while agent.poll() is None:
        reached = _newest(run)
        lost += reached < newest
        newest = max(newest, reached)
        ranks = _ranks(agent)
        if kills < trials and len(ranks) == 2:
            # Some die while they start, most after the group has gone some steps further.
            goal, patience = newest + chance.choice((0, 1, 2, 4)), time.monotonic() + _PATIENCE
            while agent.poll() is None and _newest(run) < goal:
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


def _unharmed(figures: Figures) -> bool:
    nothing_lost = figures["equal"] == 1 and figures["lost"] == figures["status"] == 0
    return nothing_lost and bool(figures["kills"] == figures["trials"])


GROUP_KILLS = {
    name: Campaign(
        f"one of two processes killed that divide {what}",
        50,
        partial(group_kills, division),
        _unharmed,
    )
    for name, (what, division) in DIVISIONS.items()
}
