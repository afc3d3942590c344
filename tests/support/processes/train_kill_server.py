"""Kills a whole training run at random moments until it has ended, and resumes it each time.

A server that has torch loaded forks one child per life, so a life costs milliseconds instead of an
import. Each child trains with `--resume auto` and is killed after a random time; the last one is
left to end. Prints one JSON object with what was seen.

Usage: train_kill_server.py MODEL DATA OUTPUT KILLS [CHANGES], the last being settings as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from engine.config.train_config import TrainConfig
from engine.verbs.training.train import train
from tests.support.processes.forked import forked, status_of


def settings(model: str, data: str, output: Path, changes: dict[str, Any]) -> TrainConfig:
    plain: dict[str, Any] = {
        "model": model,
        "data": data,
        "output_dir": output,
        "resume": "auto",
        "max_steps": 60,
        "batch_size": 2,
        "max_length": 64,
        "accumulate": 2,
        "lora_dropout": 0.1,
        "learning_rate": 5e-3,
        "checkpoint_every": 1,
        "device": "cpu",
        "plot": False,
    }
    return TrainConfig(**(plain | changes))


def life(config: TrainConfig, steps: int | None, jitter: float = 0.0) -> int:
    """Train in a child until it has saved `steps` steps more, and `jitter` seconds longer.

    Without a number of steps it may train to its end. Returns its exit status, -9 if killed.
    """
    assert config.output_dir is not None
    target = None if steps is None else newest(config.output_dir) + steps
    child = forked(lambda: train(config, console=False))
    while target is not None:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if newest(config.output_dir) >= target:
            time.sleep(jitter)
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.002)
    return status_of(child)


def newest(output: Path) -> int:
    steps = [int(p.name.split("-")[1]) for p in output.glob("checkpoint-*")]
    return max(steps, default=0)


def main(model: str, data: str, output: Path, kills: int, changes: str = "{}") -> None:
    torch.set_num_threads(1)
    config, randomness = settings(model, data, output, json.loads(changes)), random.Random(0)
    whole = config.model_copy(update={"output_dir": output.with_name("whole"), "resume": None})
    assert life(whole, None) == 0
    statuses, steps = [], []
    for _ in range(kills):
        statuses.append(life(config, randomness.randint(0, 3), randomness.uniform(0, 0.06)))
        steps.append(newest(output))
    last = life(config, None)
    print(json.dumps({"statuses": statuses, "steps": steps, "last": last}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
