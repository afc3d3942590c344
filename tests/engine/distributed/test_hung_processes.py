"""A process that does not answer ends the others, whatever they divide."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import string
import subprocess
import time
from pathlib import Path

import psutil

from tests.engine.distributed.test_processes import start, wait_for, words
from tests.support.tiny_model import write_tiny_model, write_tokenizer

TIMEOUT = 20
BOUND = 240.0
DIVISIONS = {
    "rows": (),
    "weights": ("--shard", "weights"),
    "training": ("--shard", "weights", "--method", "full", "--lora-dropout", "0"),
    "context": ("--context-parallel", "2"),
    "experts": ("--expert-parallel", "2"),
}


def begun(folder: Path, division: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A run of two processes that has saved a step, and its second process."""
    folder.mkdir(exist_ok=True)
    write_tiny_model(folder / "model", "qwen3_moe")
    # The model has 64 rows of its vocabulary.
    write_tokenizer(folder / "model", f"{string.ascii_lowercase}{string.digits} \n.?WI")
    (folder / "rows.jsonl").write_text('{"prompt": "What?", "response": "It is 3."}\n' * 8)
    how = ("--max-steps", "100000", "--heldout", "0", "--ddp-timeout", str(TIMEOUT))
    process = start("cli.main", *words(folder, "run", "--gpus", "2", *how, *DIVISIONS[division]))
    wait_for(folder / "run" / "checkpoint-3", process)
    children = psutil.Process(process.pid).children(recursive=True)
    return process, next(one for one in children if one.environ().get("LOCAL_RANK") == "1")


def ended(*processes: subprocess.Popen[str] | psutil.Process) -> None:
    """Kill what a test that failed has left."""
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            one.kill()


def test_a_process_that_hangs_ends_the_others(tmp_path: Path) -> None:
    """Far sooner than the half hour that torch gives a group that nobody told otherwise.

    The groups wait beside each other.
    """
    groups: dict[str, tuple[subprocess.Popen[str], psutil.Process]] = {}
    said: dict[str, tuple[str, bool, float]] = {}
    try:
        for division in DIVISIONS:
            process, hung = groups[division] = begun(tmp_path / division, division)
            hung.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        for division, (process, hung) in groups.items():
            output, _ = process.communicate(timeout=BOUND)
            said[division] = output, hung.is_running(), time.monotonic() - began
    finally:
        ended(*(one for group in groups.values() for one in group))
    for division, (output, stays, seconds) in said.items():
        assert groups[division][0].returncode != 0 and seconds < BOUND, division
        assert "did not answer within --ddp-timeout" in output, (division, output)
        assert "--resume auto" in output and not stays, division


def test_a_process_that_cannot_write_ends_all_with_its_name(tmp_path: Path) -> None:
    """As on a machine whose disk is full: here no file of that process may grow over 300 bytes."""
    process, full = begun(tmp_path, "training")
    try:
        resource.prlimit(full.pid, resource.RLIMIT_FSIZE, (300, 300))
        output, _ = process.communicate(timeout=BOUND)
    finally:
        ended(process, full)
    assert process.returncode == 2
    last = output[output.rindex("engine: ") :]
    assert last.startswith("engine: Rank 1 on ") and "rank-1.safetensors: File too large" in last
    safe = "checkpoint-" + re.findall(r"steps are safe: (?:\d+, )*(\d+)", last)[0]
    run = tmp_path / "run"
    assert max(run.glob("checkpoint-*"), key=lambda path: int(path.name[11:])).name == safe
