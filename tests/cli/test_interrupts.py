"""Ctrl-C at any moment: the process ends with status 130 and one line."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.source_tree import ROOT
from tests.support.tiny_model import write_tiny_model

TICKS = os.sysconf("SC_CLK_TCK")
STARTUP = 0.05
"""Seconds of processor time in which Python itself starts and has no handler of ours."""
LATEST = 3.0
MOMENTS = 8


def processor_seconds(pid: int) -> float | None:
    """Time that a process has computed; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return None
    return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / TICKS


def interrupt(words: list[str], moment: float, folder: Path) -> tuple[int, str] | None:
    """Status and error stream of the command, interrupted when it has computed so long."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *words],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    while (spent := processor_seconds(process.pid)) is not None and spent < moment:
        time.sleep(0.002)
    if spent is not None:
        process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    return None if spent is None else (process.returncode, errors)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "model")
    rows = '{"prompt": "Word?", "response": "abc."}\n' * 40
    (tmp_path / "rows.jsonl").write_text(rows)
    return tmp_path


TRAIN = "train --model model --data rows.jsonl --device cpu --epochs 50 --max-length 64 --no-plot"
COMMANDS = {
    "train": TRAIN.split(),
    "eval": ["eval", "--model", "model", "--data", "rows.jsonl", "--device", "cpu"],
    "prune": ["prune", "--model", "model", "--output", "pruned", "--fraction", "0.25"],
    "doctor": ["doctor"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_at_any_moment_ends_with_one_line(name: str, folder: Path) -> None:
    randomness = random.Random(name)
    seen = 0
    for number in range(MOMENTS):
        latest = 1.5 if number % 2 else LATEST
        answer = interrupt(COMMANDS[name], randomness.uniform(STARTUP, latest), folder)
        if answer is None:
            continue
        status, errors = answer
        lines = [line for line in errors.splitlines() if "engine: Stop" in line]
        if status == 0 or (status == -signal.SIGINT and not lines and "Traceback" not in errors):
            continue  # the signal came when everything was done, or as Python was ending
        seen += 1
        # Where the exception went through code that C started, Python ends itself by the signal,
        # which a shell shows as 130 too.
        assert status in (130, -signal.SIGINT), errors
        assert "Traceback" not in errors, errors
        assert len(lines) == 1, errors
    assert seen >= MOMENTS // 3


def test_ctrl_c_while_torch_is_imported_ends_at_once(folder: Path) -> None:
    answer = interrupt(COMMANDS["train"], 0.4, folder)
    assert answer is not None
    assert answer[0] == 130
    assert answer[1] == "engine: Stopped.\n"
    assert not (folder / "runs").exists()


def test_a_program_that_imports_the_command_line_keeps_its_own_handler(
    capfd: pytest.CaptureFixture[str],
) -> None:
    from cli import main as cli

    before: Callable[..., object] | int | None = signal.getsignal(signal.SIGINT)
    assert cli.main(["--version"]) == 0
    assert signal.getsignal(signal.SIGINT) is before
