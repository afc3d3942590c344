"""Runs that stop anywhere and go on, beside undisturbed ones.

A run of drawn settings is stopped, as a signal would, after one to five of its steps, and each time
resumed. Its weights, its last checkpoint with the optimizer's state, and what it told of every step
must be those of the same run undisturbed, bit by bit.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import engine.verbs.training.train
from bench.torture.campaign import Campaign, Figures, silent
from engine.config.train_config import TrainConfig
from engine.runs.signals import Interrupted, StopSignals
from engine.verbs.training.train import train
from tests.support.small_runs import small_run, write_pairs
from tests.support.tiny_model import write_tiny_model

TIMED = ("tokens_per_second", "peak_memory_bytes", "eta_seconds", "seconds")
MOST_STOPS = 5


class StopsAfter(StopSignals):
    """A signal that comes after so many steps of this life."""

    steps = 0

    def __init__(self, repeats: float = 0.0) -> None:
        super().__init__(repeats)
        self._read = 0

    @property
    def requested(self) -> int | None:
        """SIGTERM's number once the steps are made."""
        self._read += 1
        return 15 if 0 < self.steps <= self._read else None


def drawn(chance: random.Random, folder: Path) -> dict[str, Any]:
    """Settings of a run whose resuming has something to restore."""
    changes: dict[str, Any] = {
        "max_length": chance.choice((48, 96)), "batch_size": chance.randint(1, 3),
        "accumulate": chance.randint(1, 8), "packing": chance.random() < 0.5,
        "optimizer": chance.choice(("adamw8bit", "adamw", "lion8bit", "adafactor")),
        "lr_schedule": chance.choice(("cosine", "linear", "constant")),
        "lora_dropout": chance.choice((0.0, 0.1)), "method": chance.choice(("lora", "qlora")),
        "checkpoint_every": chance.randint(0, 3), "seed": chance.randrange(1 << 20),
        "streaming": chance.choice(("off", "on")), "max_steps": chance.randint(3, 8),
    }  # fmt: skip
    if chance.random() < 0.5:  # the end of an epoch is the end of the run, or inside it
        del changes["max_steps"]
        changes |= {"epochs": chance.randint(1, 3), "accumulate": chance.randint(1, 3)}
        changes["streaming"] = "off"
    match chance.randrange(5):
        case 0:
            changes |= {"method": "full", "lora_dropout": 0.0, "learning_rate": 1e-3}
        case 1:
            changes |= {"data": str(folder / "pairs.jsonl"), "objective": "dpo"}
            changes |= {"streaming": "off", "packing": False, "method": "lora"}
            changes |= {"reference_cache": "none"}
        case 2:
            changes |= {"ema_decay": 0.9, "streaming": "off"}
    return changes


def lives(config: TrainConfig, stops: list[int]) -> int:
    """Train with a stop after each number of steps, then to the end; how often it was stopped."""
    names, stopped = vars(engine.verbs.training.train), 0
    original, names["StopSignals"] = names["StopSignals"], StopsAfter
    try:
        for steps in [*stops, 0]:
            StopsAfter.steps = steps
            try:
                train(config, console=False)
                break
            except Interrupted:
                stopped += 1
    finally:
        names["StopSignals"] = original
    return stopped


def state(run: Path) -> dict[str, Any]:
    """Every tensor that a run saved, and what it told of each step but for times and memory."""
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name[11:]), default=run)
    tensors = {
        str(path.relative_to(last if path.is_relative_to(last) else run)): path.read_bytes()
        for folder in ({last, *run.glob("[am]*")} - {run})
        for path in folder.rglob("*.safetensors")
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [{k: v for k, v in line.items() if k not in TIMED} for line in lines]
    return {**tensors, "metrics": told, "last": last.name}


def resumes(trials: int, seed: int) -> Figures:
    """So many runs of drawn settings, each undisturbed and in parts."""
    chance, counts, wrong = random.Random(seed), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as name, silent():
        folder = Path(name)
        model = write_tiny_model(folder / "model")
        rows = [{"prompt": f"Word {n}?", "response": "yes. " * (1 + n % 4)} for n in range(9)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_pairs(folder / "pairs.jsonl", 7)
        for _ in range(trials):
            changes = drawn(chance, folder)
            data = changes.pop("data", str(folder / "rows.jsonl"))
            seen = []
            for number in range(2):
                run = folder / f"run-{number}"
                config = small_run(model, data, run, resume="auto", **changes)
                most = chance.randint(1, MOST_STOPS) * number
                counts["stops"] += lives(config, [chance.randint(1, 3) for _ in range(most)])
                seen.append(state(run))
                shutil.rmtree(run)
            counts["equal"] += seen[0] == seen[1]
            if seen[0] != seen[1]:
                names = [key for key in seen[0] if seen[0][key] != seen[1].get(key)]
                wrong.append(f"{changes}: {names}")
    return {"trials": trials, **counts, "wrong": wrong}


RESUMES = {
    "T8": Campaign(
        "runs stopped and resumed one to five times, of drawn settings",
        500,
        resumes,
        lambda f: f["equal"] == f["trials"] and not f["wrong"],
        part=25,
    )
}
