"""Kills verbs that write a model at random moments, and looks at what is left each time.

A server that has torch loaded forks one child per life. A killed life must leave the output whole
or absent; the next one works whatever was left. Prints one JSON object with what was seen.

Usage: write_kill_server.py MODEL ADAPTER FOLDER KILLS
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.verbs.models.merge import merge
from engine.verbs.models.quantize import quantize
from tests.support.processes.forked import forked, status_of

Write = Callable[[Path], object]


_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def _begun(output: Path) -> bool:
    return any(output.parent.glob(".tmp-*"))


def life(write: Write, output: Path, seconds: float | None, writing: bool = False) -> int:
    """Write in a child, killed after some seconds; returns its exit status, -9 if killed.

    With `writing` the seconds count from its first temporary file.
    """
    child = forked(lambda: write(output))
    if seconds is not None:
        if writing:
            while os.waitid(os.P_PID, child, _ENDED) is None and not _begun(output):
                time.sleep(0.0005)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return status_of(child)


def contents(folder: Path) -> dict[str, bytes]:
    """The files whose bytes the inputs decide: weights and configuration."""
    names = ("model.safetensors", "config.json", "tokenizer.json")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def campaign(write: Write, folder: Path, kills: int, randomness: random.Random) -> dict[str, int]:
    folder.mkdir()
    started = time.monotonic()
    assert life(write, folder / "undisturbed", None) == 0
    duration, expected = time.monotonic() - started, contents(folder / "undisturbed")
    output = folder / "out"
    seen = {"killed": 0, "left": 0, "appeared": 0, "torn": 0}
    for number in range(kills):
        # Every other life is killed while it writes, however busy the machine is.
        writing = number % 2 == 0 and not _begun(output)
        seconds = randomness.uniform(0, duration / 50 if writing else duration)
        status = life(write, output, seconds, writing)
        assert status in (0, -9), status
        seen["killed"] += status == -9
        seen["left"] += any(folder.glob(".tmp-*"))
        if output.exists():
            seen["appeared"] += 1
            whole = (output / "summary.json").exists() and (output / "README.md").exists()
            seen["torn"] += contents(output) != expected or not whole
            shutil.rmtree(output)
    assert life(write, output, None) == 0
    assert contents(output) == expected
    return seen | {"swept": not any(folder.glob(".tmp-*"))}


def main(model: str, adapter: str, folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    randomness = random.Random(0)
    verbs: dict[str, Write] = {
        "quantize": lambda output: quantize(model, output, bits=4),
        "merge": lambda output: merge(model, adapter, output),
    }
    print(
        json.dumps(
            {name: campaign(verb, folder / name, kills, randomness) for name, verb in verbs.items()}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
