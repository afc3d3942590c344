"""Preference rows for tests, and a run that learns from them."""

import json
from pathlib import Path
from typing import Any

from engine.config.train_config import TrainConfig

ANSWERS = (("yes it is.", "no."), ("yes.", "not at all."), ("yes sure.", "no never was."))


def write_pairs(path: Path, count: int = 5) -> Path:
    """Prompts, each with a chosen and a rejected answer of other lengths."""
    rows = [
        {"prompt": f"Word {n}?", "chosen": ANSWERS[n % 3][0], "rejected": ANSWERS[n % 3][1]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_judged(path: Path, count: int = 6) -> Path:
    """Prompts with an answer and whether it is a good one."""
    rows = [
        {"prompt": f"Word {n}?", "completion": ANSWERS[n % 3][n % 2], "label": n % 2 == 0}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def preference_run(model: Path, data: Path, output: Path, **changes: Any) -> TrainConfig:
    """Settings of 4 steps of two pairs on a CPU, with `changes`."""
    plain: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "output_dir": output,
        "objective": "dpo",
        "method": "lora",
        "max_steps": 4,
        "batch_size": 2,
        "max_length": 96,
        "learning_rate": 5e-3,
        "device": "cpu",
        "plot": False,
        "checkpoint_every": 2,
        "reference_cache": "none",
    }
    return TrainConfig(**(plain | changes))
