"""Each system call of saving a checkpoint, killed or failed by strace.

`python -m bench.torture.crashes.system_calls FOLDER EVERY KIND` prints one JSON object; KIND is
`kills` or `errors`. A server that has torch loaded forks a child per trial; strace takes hold of
it, and lets the n-th call of one sort kill the child or return an error. The child saves one
checkpoint more, which retires the oldest, and says when it is acknowledged. Then the newest must
load, be at least as new as what was acknowledged, and hold exactly its step's content, and nothing
half done may be left. Here the flushes are real, and writes from any language are met.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from engine.errors import EngineError
from engine.runs.checkpoints import CheckpointStore
from tests.support.processes.forked import forked, status_of
from tests.support.processes.resume_crash_server import check, tensors_at

CHANGING = ("mkdir", "mkdirat", "openat", "write", "pwrite64", "writev", "fsync", "fdatasync",
            "rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat", "rmdir",
            "ftruncate", "fallocate", "flock")  # fmt: skip
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EINTR)
EARLIER = 2


def save_one(folder: Path, told: socket.socket) -> int:
    """Save the next checkpoint, tell it, and return an exit status."""
    try:
        with CheckpointStore(folder) as store:
            step = EARLIER + 1
            store.save(step, tensors_at(step), {"step": step})
            told.send(b"+")
    except EngineError as error:
        told.send(b"-" if str(error).isprintable() and len(str(error)) < 2000 else b"?")
        return 2
    return 0


def traced(folder: Path, *options: str) -> tuple[int, bytes]:
    """Save in a child that strace holds; its exit status, and what it told."""
    # Sending is no call that is counted, as writing to a pipe is.
    reader, writer = socket.socketpair()
    gate, opened = os.pipe()

    def work() -> int:
        # What waits here is no call that is counted.
        reader.close()
        os.close(opened)
        return save_one(folder, writer) if os.read(gate, 1) else 1

    child = forked(work)
    writer.close()
    os.close(gate)
    tracer = subprocess.Popen(
        ["strace", "-qq", "-p", str(child), *options], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
        if time.monotonic() > deadline:
            raise TimeoutError("strace does not take hold")
        time.sleep(0.001)
    os.write(opened, b"+")
    os.close(opened)
    status = status_of(child)
    tracer.wait()
    told = reader.recv(10)
    reader.close()
    return status, told


def prepare(folder: Path) -> None:
    """A run with two checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with CheckpointStore(folder) as store:
        for step in range(1, EARLIER + 1):
            store.save(step, tensors_at(step), {"step": step})


def calls(folder: Path) -> Counter[str]:
    """How often saving makes each call."""
    prepare(folder)
    log = folder.with_name("calls")
    status, told = traced(folder, "-e", f"trace={','.join(CHANGING)}", "-o", str(log))
    if (status, told) != (0, b"+"):
        raise SystemExit(f"saving under strace ended with {status}, {told!r}")
    return Counter(re.findall(r"^(\w+)\(", log.read_text(), re.MULTILINE))


def verdict(folder: Path, status: int, told: bytes, error: int | None) -> str:
    """`good`, or what is wrong after a fault."""
    if error is None and status != -signal.SIGKILL:
        return "not killed"
    if error is not None and (status not in (0, 2) or told not in (b"+", b"-")):
        return f"ended with {status}, {told!r}"
    acknowledged = EARLIER + 1 if told == b"+" else EARLIER
    state = check(folder, acknowledged)
    left = [path.name for path in folder.iterdir() if path.name.startswith((".tmp", ".del"))]
    return "left over" if state == "good" and left else state


def main(folder: Path, every: int, kind: str) -> None:
    """Do every `every`-th of the trials, and print the figures."""
    torch.set_num_threads(1)
    run, counts, wrong = folder / "run", Counter[str](), list[str]()
    made = calls(run)
    number = 0
    for call, count in sorted(made.items()):
        for at in range(1, count + 1):
            for error in (None,) if kind == "kills" else ERRORS:
                number += 1
                if number % every:
                    continue
                name = "killed" if error is None else errno.errorcode[error]
                how = "signal=KILL" if error is None else f"error={name}"
                prepare(run)
                fault = ["-e", f"trace={call}", "-e", f"inject={call}:{how}:when={at}"]
                status, told = traced(run, *fault, "-o", os.devnull)
                counts[name] += 1
                state = verdict(run, status, told, error)
                counts["good"] += state == "good"
                if state != "good":
                    wrong.append(f"{call} {at} {name}: {state}")
    trials = sum(counts.values()) - counts["good"]
    figures: dict[str, Any] = {"calls": sum(made.values()), "trials": trials, **counts}
    figures["wrong"] = wrong
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
