"""Small runs for tests, and everything that a folder holds."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.train_config import TrainConfig
from engine.data.examples import Example


def random_examples(seed: int, lengths: Sequence[int]) -> list[Example]:
    """Examples of these lengths, of random tokens that every golden model has, all trained."""
    generator = np.random.default_rng(seed)
    return [
        Example(generator.integers(3, 60, length), [True] * length, f"row {length}")
        for length in lengths
    ]


def small_run(model: Path, data: Path | str, output: Path, **changes: Any) -> TrainConfig:
    """Settings of 6 steps of two rows on a CPU, with `changes`."""
    plain: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "output_dir": output,
        "max_steps": 6,
        "batch_size": 2,
        "max_length": 96,
        "learning_rate": 5e-3,
        "device": "cpu",
        "plot": False,
        "checkpoint_every": 2,
    }
    return TrainConfig(**(plain | changes))


def snapshot(folder: Path) -> dict[str, str]:
    """Name -> digest of every file under a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def quick_words(model: Path, output: Path) -> list[str]:
    """Options of 2 steps of two rows on a CPU, for a command of `engine train`."""
    changes = {"max_steps": 2, "batch_size": 2, "max_length": 96, "device": "cpu", "plot": False}
    words = [f"{key}={value}" for key, value in changes.items()]
    return ["--model", str(model), "--output-dir", str(output), *words]


def adapter_bytes(run: Path) -> bytes:
    """The weights that a run saved."""
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


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
    own: dict[str, Any] = {
        "objective": "dpo",
        "method": "lora",
        "max_steps": 4,
        "reference_cache": "none",
    }
    return small_run(model, data, output, **(own | changes))
