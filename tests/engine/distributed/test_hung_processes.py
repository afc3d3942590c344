"""A process that does not answer ends the others, whatever they divide."""

from __future__ import annotations

import contextlib
import signal
import string
import time
from pathlib import Path

import psutil
import pytest

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


@pytest.mark.parametrize("division", DIVISIONS)
def test_a_process_that_hangs_ends_the_others(division: str, tmp_path: Path) -> None:
    """Far sooner than the half hour that torch gives a group that nobody told otherwise."""
    write_tiny_model(tmp_path / "model", "qwen3_moe")
    # The model has 64 rows of its vocabulary.
    write_tokenizer(tmp_path / "model", f"{string.ascii_lowercase}{string.digits} \n.?WI")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What?", "response": "It is 3."}\n' * 8)
    how = ("--max-steps", "100000", "--heldout", "0", "--ddp-timeout", str(TIMEOUT))
    process = start("cli.main", *words(tmp_path, "run", "--gpus", "2", *how, *DIVISIONS[division]))
    wait_for(tmp_path / "run" / "checkpoint-3", process)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("LOCAL_RANK") == "1"
    ]
    began = time.monotonic()
    hung = workers[0]
    hung.send_signal(signal.SIGSTOP)
    try:
        output, _ = process.communicate(timeout=BOUND)
        stays = hung.is_running()
    finally:
        for one in (*workers, psutil.Process(process.pid)) if process.poll() is None else workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    assert process.returncode != 0 and time.monotonic() - began < BOUND
    assert "did not answer within --ddp-timeout" in output, output
    assert "--resume auto" in output
    assert not stays
