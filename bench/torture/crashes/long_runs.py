"""Training for long, and training the same again in other processes.

`python -m bench.torture.crashes.long_runs FOLDER soak STEPS` watches a run's memory, threads and
open files; `... FOLDER same RUNS [METHOD]` trains in so many processes per method. Each prints one
JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.verbs.training.train import train
from tests.support.processes.forked import forked
from tests.support.processes.train_kill_server import settings
from tests.support.tiny_model import write_tiny_model

METHODS = ("lora", "qlora", "full")
_WARM = 0.2
"""Share of a run in which memory may still grow: caches and arenas fill."""


def inputs(folder: Path) -> tuple[Path, Path]:
    """A tiny model and some rows."""
    model, rows = write_tiny_model(folder / "model"), folder / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "Word {n}?", "response": "yes."}}\n' for n in range(24)))
    return model, rows


def used_by(process: int) -> tuple[int, int, int]:
    """Resident bytes, threads and open files of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    told = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    files = len(os.listdir(f"/proc/{process}/fd"))  # noqa: PTH208
    return int(told["VmRSS"].split()[0]) * 1024, int(told["Threads"]), files


def soak(folder: Path, steps: int) -> dict[str, Any]:
    """Train so many steps in a child, and watch it."""
    model, rows = inputs(folder)
    changes: dict[str, Any] = {
        "max_steps": steps, "checkpoint_every": max(1, steps // 20), "accumulate": 1,
    }  # fmt: skip
    config = settings(str(model), str(rows), folder / "run", changes)
    child = forked(lambda: train(config, console=False))
    file, samples = folder / "run" / "metrics.jsonl", []
    done, ended = 0, (0, 0)
    while ended == (0, 0):
        time.sleep(0.25)
        done = file.read_bytes().count(b"\n") if file.exists() else 0
        if 0 < done < steps:
            samples.append((done, *used_by(child)))
        ended = os.waitpid(child, os.WNOHANG)
    settled = np.array([sample for sample in samples if sample[0] > _WARM * steps], float)
    slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0]
    return {
        "trials": done,
        "status": os.waitstatus_to_exitcode(ended[1]),
        "samples": len(settled),
        "mib_per_10k_steps": round(float(slope) * 10_000 / 2**20, 2),
        "most_mib_more": round(float(np.ptp(settled[:, 1])) / 2**20, 2),
        "threads": sorted(map(int, set(settled[:, 2]))),
        "most_files_more": int(settled[:, 3].max() - settled[:, 3].min()),
    }


def same(folder: Path, runs: int, *methods: str) -> dict[str, Any]:
    """Train by each method in so many fresh processes, and compare what they wrote."""
    model, rows = inputs(folder)
    differ = []
    for method in methods:
        seen = set()
        for number in range(runs):
            output = folder / f"{method}-{number}"
            options = {
                "model": model, "data": rows, "output-dir": output, "method": method,
                "max-steps": 4, "batch-size": 2, "max-length": 64, "lora-dropout": 0.1,
                "device": "cpu",
            }  # fmt: skip
            if method == "full":
                del options["lora-dropout"]
            words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
            command = [sys.executable, "-m", "engine", "train", *words, "--no-plot"]
            environment = os.environ | {"PYTHONHASHSEED": str(number)}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            (weights,) = output.glob("[am]*/*.safetensors")
            seen.add(hashlib.sha256(weights.read_bytes()).hexdigest())
        if len(seen) > 1:
            differ.append(method)
    return {"trials": runs * len(methods), "methods": len(methods), "differ": differ}


def main(folder: Path, kind: str, count: int, *methods: str) -> None:
    """Print the figures of one kind."""
    torch.set_num_threads(1)
    figures = soak(folder, count) if kind == "soak" else same(folder, count, *methods or METHODS)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
