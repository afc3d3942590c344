"""Plans of memory beside measured steps, and budgets that are walls."""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from bench.torture.campaign import Campaign, Figures, silent
from engine.errors import MemoryPlanError
from engine.verbs.training.train import train
from tests.engine.memory.test_meter import MODELS, SETTINGS, planned_and_measured
from tests.support.processes.forked import forked, status_of
from tests.support.small_runs import small_run
from tests.support.tiny_model import write_tiny_model

MIB = 1 << 20
ROOMY = "8GiB"
LARGEST_ERROR = 0.5
RUNS: tuple[dict[str, Any], ...] = (
    {}, {"method": "full"}, {"method": "lora", "accumulate": 2}, {"optimizer": "adafactor"},
    {"gradient_checkpointing": "full"}, {"gradient_checkpointing": "none"}, {"packing": True},
    {"method": "full", "optimizer_in_backward": True, "max_grad_norm": 0.0},
)  # fmt: skip


def memory(trials: int, seed: int) -> Figures:
    """Plans of so many settings, each for rows of drawn lengths, and eight runs under budgets."""
    chance, worst = random.Random(seed), 0.0
    choices = [(family, name) for name in SETTINGS for family in MODELS]
    with silent():
        planned_and_measured(*choices[0], [9])  # a process makes some small tables once
        for number in range(trials):
            lengths = [chance.randint(9, 200) for _ in range(3)]
            planned, measured = planned_and_measured(*choices[number % len(choices)], lengths)
            worst = max(worst, abs(planned.bytes - measured.bytes) / measured.bytes)
        counts = budgets(chance)
    return {"trials": trials, "worst_percent": round(100 * worst, 3), **counts}


def budgets(chance: random.Random) -> Counter[str]:
    """Runs with a mebibyte less than what is planned, which must not begin, and a percent more."""
    counts = Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, rows = write_tiny_model(folder / "model"), folder / "rows.jsonl"
        rows.write_text(
            "".join(f'{{"prompt": "Word {n}?", "response": "yes."}}\n' for n in range(9))
        )
        for number, changes in enumerate(RUNS):
            run = folder / str(number)
            run.mkdir()
            begin = partial(_ended, model, rows, changes)
            if (ended := begin(ROOMY, run / "roomy")) != "trained":
                raise RuntimeError(f"{changes} with a budget of {ROOMY}: {ended}")
            summary = json.loads((run / "roomy" / "summary.json").read_text())
            limit = summary["metrics"]["planned_limit_bytes"]
            refused = begin(limit - MIB, run / "small") == "refused"
            told = run / "small" / "metrics.jsonl"
            counts["refused"] += refused and not (told.exists() and told.read_text())
            counts["trained"] += begin(round(1.01 * limit), run / "large") == "trained"
            counts["runs"] += 1
    return counts


def _ended(
    model: Path, rows: Path, changes: dict[str, Any], budget: int | str, output: Path
) -> str:
    """How a run ended, in a child: each begins with the memory that this process has now."""
    config = small_run(model, rows, output, memory_budget=budget, **changes)

    def work() -> int:
        try:
            train(config, console=False)
        except MemoryPlanError:
            return 2
        return 0

    status = status_of(forked(work))
    return {0: "trained", 2: "refused"}.get(status, f"status {status}")


MEMORY = {
    "T20": Campaign(
        "plans of memory, and budgets a little too small and large",
        68,
        memory,
        lambda f: f["worst_percent"] <= LARGEST_ERROR and f["refused"] == f["trained"] == f["runs"],
        disk=True,
    )
}
