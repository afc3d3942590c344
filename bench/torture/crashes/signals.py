"""Signals at random moments of a run, which saves and ends.

`python -m bench.torture.crashes.signals FOLDER COUNT` prints one JSON object. A server that has
torch loaded forks a child that trains with `--resume auto`, sends it SIGTERM, SIGINT or SIGHUP at
some moment after its first step, and forks the next. Each must end with 128 + the signal and a
checkpoint of the step it was at, or with 0 where it was at its end; a run in many parts must end
with the bytes of one that nothing disturbed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from engine.config.train_config import TrainConfig
from engine.runs.checkpoints import CheckpointStore
from engine.verbs.training.train import train
from tests.support.processes.forked import forked, status_of
from tests.support.processes.train_kill_server import settings
from tests.support.small_runs import adapter_bytes
from tests.support.tiny_model import write_tiny_model

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STEPS = 40
LONGEST_WAIT = 0.15


def lines(output: Path) -> int:
    """Steps that a run has told."""
    file = output / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def life(config: TrainConfig, number: signal.Signals | None, wait: float) -> tuple[int, float]:
    """Train in a child that gets a signal some time after a step of its own.

    Returns its exit status, and the seconds from the signal to its end.
    """
    assert config.output_dir is not None
    before = lines(config.output_dir)

    def work() -> None:
        for one in SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        train(config, console=False)

    child = forked(work)
    sent = time.monotonic()
    if number is not None:
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if lines(config.output_dir) > before:
                time.sleep(wait)
                sent = time.monotonic()
                os.kill(child, number)
                break
            time.sleep(0.002)
    return status_of(child), time.monotonic() - sent


def saved(output: Path) -> int:
    """The step of the newest checkpoint, which is verified; 0 without one."""
    with CheckpointStore(output) as store:
        newest = store.latest()
        return 0 if newest is None else newest.step


def main(folder: Path, count: int, seed: int = 0) -> None:
    """Send so many signals, and print the figures."""
    torch.set_num_threads(1)
    model = write_tiny_model(folder / "model")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "Word {n}?", "response": "yes."}}\n' for n in range(9)))
    changes: dict[str, Any] = {"max_steps": STEPS, "checkpoint_every": 0, "batch_size": 2}
    chance, counts, slowest = random.Random(seed), Counter[str](), 0.0
    config = settings(str(model), str(rows), folder / "whole", changes)
    assert life(config.model_copy(update={"resume": None}), None, 0)[0] == 0
    expected, run = adapter_bytes(folder / "whole"), 0
    wrong: list[str] = []
    while counts["sent"] < count:
        # Some runs save at each step, so that signals meet the saving too.
        every = {"output_dir": folder / f"run-{run}", "checkpoint_every": run % 2}
        config = config.model_copy(update=every)
        number = SIGNALS[counts["sent"] % len(SIGNALS)]
        status, seconds = life(config, number, chance.uniform(0, LONGEST_WAIT))
        output = folder / f"run-{run}"
        if status == 0:
            counts["at_its_end"] += 1
            counts["same_bytes"] += adapter_bytes(output) == expected
            run += 1
            continue
        counts["sent"] += 1
        slowest = max(slowest, seconds)
        if status != 128 + number:
            wrong.append(f"{number.name}: status {status}")
        elif saved(output) != lines(output):
            wrong.append(f"{number.name}: saved {saved(output)}, trained {lines(output)}")
        else:
            counts["good"] += 1
    figures = {"trials": counts["sent"], "good": counts["good"], "runs_ended": counts["at_its_end"]}
    figures |= {"same_bytes": counts["same_bytes"]}
    print(json.dumps(figures | {"slowest_s": round(slowest, 2), "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
