"""Kills a small forge at each of its file operations, and finishes it each time.

A server that has torch loaded forks one child per life. One is killed right before its n-th
operation under the job's folder (a file opened for writing, a flush, a rename, a removal, a folder
made or removed), the next goes on to the end. What is then there must be what an undisturbed job
leaves, byte by byte. Prints one JSON object with what was seen.

Usage: forge_kill_server.py MODEL ROWS FOLDER [EVERY [FIRST]]
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from engine.config.tasks.pruning import ForgeSettings, PruneSettings
from engine.config.train_config import TrainConfig
from engine.plots import new_figure
from engine.verbs.models.forge import forge
from tests.support.processes.forked import forked, status_of

_CHANGES = (
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
)
_VOLATILE = ("tokens_per_second", "train_seconds", "peak_memory_bytes", "bytes", "digest")
_BYTES = (".safetensors", ".jsonl", "config.json", "tokenizer.json")
_TIMED = "metrics.jsonl"


def job(model: str, rows: str, folder: Path) -> ForgeSettings:
    """One cycle of pruning, repair and two steps of training."""
    training = TrainConfig(
        model=model,
        data=[rows],
        method="lora",
        max_steps=2,
        checkpoint_every=1,
        max_length=64,
        device="cpu",
        plot=False,
    )
    pruning = PruneSettings(fraction=0.25, scope="layer", calibration_rows=4, device="cpu")
    return ForgeSettings(
        output_dir=folder, training=training, pruning=pruning, heldout_rows=2, samples=1
    )


class Operations:
    """Counts what this process changes under a folder; right before one of them it is killed."""

    def __init__(self, folder: Path, last: int | None, told: int) -> None:
        self._folder, self._last, self._told = str(folder), last, told
        self._count = 0
        flush = os.fsync

        def flushed(descriptor: Any) -> None:
            self._next(Path(f"/proc/self/fd/{descriptor}").readlink())
            flush(descriptor)

        vars(os)["fsync"] = flushed
        sys.addaudithook(self._hook)

    def _hook(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = given
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._next(path)
        elif event in _CHANGES:
            self._next(given[0])

    def _next(self, path: object) -> None:
        if not isinstance(path, str | os.PathLike):
            return
        # Removals inside a folder name their files alone, relative to an open descriptor.
        text = os.fspath(path)
        if isinstance(text, bytes) or text.startswith("/") > text.startswith(self._folder):
            return
        if self._count == self._last:
            os.kill(os.getpid(), signal.SIGKILL)
        self._count += 1
        if self._last is None:
            os.pwrite(self._told, str(self._count).encode(), 0)


def life(work: Callable[[], object], folder: Path, last: int | None, told: int) -> int:
    """Do the job in a child, killed before an operation; its exit status, -9 if killed."""

    def counted() -> None:
        Operations(folder, last, told)
        work()

    return status_of(forked(counted))


def lasting(value: Any) -> Any:
    """Results without times and memory, and what follows from them."""
    if isinstance(value, dict):
        return {key: lasting(one) for key, one in value.items() if key not in _VOLATILE}
    return [lasting(one) for one in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, str]:
    """Every file by its path: a digest of its bytes, of results without times; else nothing."""
    seen = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name == ".lock":
            continue
        told = ""
        if path.name.endswith(_BYTES) and path.name != _TIMED:
            told = sha256(path.read_bytes()).hexdigest()
        elif path.name == "results.json":
            told = json.dumps(lasting(json.loads(path.read_text(encoding="utf-8"))))
        seen[str(path.relative_to(folder))] = told
    return seen


def main(model: str, rows: str, folder: Path, every: int = 1, first: int = 0) -> None:
    torch.set_num_threads(1)
    new_figure("warm", 1, 1)
    output = folder / "job"

    def work() -> object:
        return forge(job(model, rows, output), resume=True)

    folder.mkdir()
    told = os.open(folder / "operations", os.O_RDWR | os.O_CREAT)
    assert life(work, output, None, told) == 0
    count, expected = int(os.pread(told, 20, 0)), contents(output)
    seen = {"operations": count, "killed": 0, "same": 0, "files": len(expected)}
    for number in range(first % every, count, every):
        shutil.rmtree(output)
        status = life(work, output, number, told)
        assert status in (0, -9), (number, status)
        seen["killed"] += status == -9
        assert life(work, output, count * 9, told) == 0, number
        now = contents(output)
        seen["same"] += now == expected
        if now != expected:
            other = {key for key in {*now, *expected} if now.get(key) != expected.get(key)}
            print(f"operation {number}: {sorted(other)}", file=sys.stderr)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:]))
