"""Kills a process that saves checkpoints, again and again, and checks what it leaves behind.

A server that has torch loaded forks one child per round, which takes milliseconds. The child goes
on from the newest checkpoint and saves step after step, telling each one through a pipe.
After a random time it is killed; the newest checkpoint that loads must then be at least as new as
the last acknowledged one, with exactly that step's content. fsync does nothing here: a killed
process's writes survive in the system's cache, and the rounds are ten times as fast.

Usage: resume_crash_server.py FOLDER ROUNDS FAULT [SEED], where FAULT is `none` or one that is
planted to show that this campaign would notice it. Prints one JSON object.
"""

import json
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import torch

from engine.errors import CheckpointError
from engine.runs.checkpoints import CheckpointStore

LONGEST_LIFE = 0.03


def tensors_at(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "adapter/adapter_model": {"a": torch.randn(32, 16, generator=generator)},
        "optimizer": {"codes": torch.full((700,), step % 256, dtype=torch.uint8)},
    }


class EarlyRetirement(CheckpointStore):
    """The planted fault of clearing old checkpoints away before the new one is there."""

    def save(self, step: int, *rest: object, **named: object) -> Path:
        for old in self.steps():
            self._delete(self.path_of(old))
        return super().save(step, *rest, **named)  # type: ignore[arg-type]


def open_store(folder: Path, fault: str) -> CheckpointStore:
    return (EarlyRetirement if fault == "retire-early" else CheckpointStore)(folder)


def live(folder: Path, fault: str, pipe: int) -> None:
    """Go on from the newest checkpoint and save until killed."""
    store = open_store(folder, fault)
    newest = store.latest()
    step = 0 if newest is None else newest.step
    os.write(pipe, struct.pack("<q", -1))
    while True:
        step += 1
        if fault == "acknowledge-early":
            os.write(pipe, struct.pack("<q", step))
        store.save(step, tensors_at(step), {"step": step})
        os.write(pipe, struct.pack("<q", step))


def one_round(folder: Path, fault: str, life: float) -> int:
    """Run a child for `life` seconds after it is ready; return the last step it acknowledged."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            live(folder, fault, writer)
        finally:
            os._exit(70)
    os.close(writer)
    if not os.read(reader, 8):
        raise SystemExit("the child ended before it was ready")
    time.sleep(life)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WTERMSIG(status) != signal.SIGKILL:
        raise SystemExit("the child ended by itself")
    told = b""
    while part := os.read(reader, 1 << 16):
        told += part
    os.close(reader)
    return max((number for (number,) in struct.iter_unpack("<q", told)), default=0)


def check(folder: Path, acknowledged: int) -> str:
    """`good`, or what is wrong with the folder that the killed child left."""
    with CheckpointStore(folder) as store:
        try:
            newest = store.latest()
        except CheckpointError:
            return "unloadable"
        if list(folder.glob(".bad-*")):
            return "unloadable"
        step = 0 if newest is None else newest.step
        if step < acknowledged:
            return "lost"
        if newest is not None:
            for stem, group in tensors_at(step).items():
                loaded = newest.tensors(stem)
                if any(not torch.equal(loaded[name], group[name]) for name in group):
                    return "wrong"
    return "good"


def main(folder: Path, rounds: int, fault: str, seed: int = 1) -> None:
    os.fsync = lambda fd: None
    torch.set_num_threads(1)
    draw = random.Random(seed)
    seen = {"rounds": 0, "inside": 0, "good": 0, "lost": 0, "unloadable": 0, "wrong": 0, "steps": 0}
    acknowledged = 0
    for _ in range(rounds):
        # Where fewer than half of the rounds saved, the machine is busy: they last longer.
        longest = LONGEST_LIFE * (1 if 2 * acknowledged >= seen["rounds"] else 4)
        acknowledged = max(acknowledged, one_round(folder, fault, draw.uniform(0, longest)))
        seen["rounds"] += 1
        seen["inside"] += bool([*folder.glob(".tmp-*"), *folder.glob(".del-*")])
        verdict = check(folder, acknowledged)
        seen[verdict] += 1
        seen["steps"] = acknowledged
        if verdict != "good":
            break
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
