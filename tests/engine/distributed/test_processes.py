"""Runs of real processes: what they leave is what one process leaves, whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.support.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[3]
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and rows of several lengths."""
    folder = tmp_path_factory.mktemp("processes")
    write_tiny_model(folder / "model")
    rows = [
        {"prompt": f"What is {n}? " * (1 + n % 3), "response": f"It is {n}. " * (1 + n % 5)}
        for n in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(folder: Path, name: str, *more: str) -> list[str]:
    """A command line that trains into `folder / name`."""
    return [
        *("train", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl")),
        *("--output-dir", str(folder / name), "--max-steps", str(STEPS), "--batch-size", "2"),
        *("--accumulate", "2", "--checkpoint-every", "3", "--lora-dropout", "0.1"),
        *("--device", "cpu", "--dtype", "float32", "--no-plot", "--heldout", "0.1", *more),
    ]


def start(*command: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finished(*command: str) -> tuple[int, str]:
    """The exit status and the output of a command."""
    process = start(*command)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def adapter(folder: Path, name: str, result: str = "adapter") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(
        folder / name / result / "adapter_model.safetensors"
    )
    return tensors


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / name / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """What one process leaves."""
    status, output = finished("cli.main", *words(folder, "alone"))
    assert status == 0, output
    return folder


@pytest.fixture(scope="module")
def together(folder: Path) -> Path:
    """What two processes leave that nobody disturbs."""
    status, output = finished("cli.main", *words(folder, "together", "--gpus", "2"))
    assert status == 0, output
    assert output.count("Trained adapter saved to") == 1 and "Next:" in output
    return folder


def test_two_processes_leave_what_one_does(alone: Path, together: Path) -> None:
    for mine, other in zip(lines(together, "together"), lines(alone, "alone"), strict=True):
        for name in ("step", "epoch", "lr", "trained_tokens"):
            assert mine[name] == other[name]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
    ours, theirs = adapter(together, "together"), adapter(alone, "alone")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-6, msg=name)
    figures = [
        json.loads((alone / name / "summary.json").read_text())["metrics"]
        for name in ("together", "alone")
    ]
    same = ("steps", "tokens", "trained_tokens", "trainable_parameters", "rows_trained")
    assert [figures[0][name] for name in same] == [figures[1][name] for name in same]
    assert figures[0]["heldout_loss"] == pytest.approx(figures[1]["heldout_loss"], rel=1e-5)
    checkpoints = [
        sorted(str(path.relative_to(alone / name)) for path in (alone / name).rglob("*.*"))
        for name in ("together", "alone")
    ]
    assert checkpoints[0] == checkpoints[1]


def test_divided_weights_and_rows_leave_what_one_process_does(alone: Path) -> None:
    """Four processes: two share the tokens of a batch, and all divide the base between them."""
    more = ("--gpus", "4", "--context-parallel", "2", "--shard", "weights")
    status, output = finished("cli.main", *words(alone, "divided", *more))
    assert status == 0, output
    figures = [
        json.loads((alone / name / "summary.json").read_text())["metrics"]
        for name in ("divided", "alone")
    ]
    before = [figure["heldout_loss_before"] for figure in figures]
    assert before[0] == pytest.approx(before[1], rel=1e-6)
    for mine, other in zip(lines(alone, "divided"), lines(alone, "alone"), strict=True):
        assert mine["trained_tokens"] == other["trained_tokens"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_a_group_that_is_stopped_goes_on_with_any_number(together: Path) -> None:
    """Every process is signalled, as SLURM does, and torchrun's agent passes its signal on too."""
    process = start("cli.main", *words(together, "stopped", "--gpus", "2"))
    wait_for(together / "stopped" / "checkpoint-3", process)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Go on with `engine resume" in output
    summary = json.loads((together / "stopped" / "summary.json").read_text())
    reached = summary["stopped"]["step"]
    assert 3 <= reached < STEPS
    more = ("--resume", "auto", "--gpus", "1")
    status, output = finished("cli.main", *words(together, "stopped", *more))
    assert status == 0, output
    for mine, other in zip(lines(together, "stopped"), lines(together, "together"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_a_process_that_is_killed_starts_again_to_the_same_bytes(together: Path) -> None:
    """Under torchrun itself, which starts all processes again from the last checkpoint."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    restarts = ("--max-restarts", "2", "-m", "cli.main")
    process = start(*launcher, *restarts, *words(together, "killed"))
    wait_for(together / "killed" / "checkpoint-3", process)
    workers = [
        child
        for child in psutil.Process(process.pid).children()
        if "cli.main" in child.cmdline() and child.environ().get("LOCAL_RANK") == "1"
    ]
    workers[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    target = together / "killed"
    assert len(json.loads((target / "manifest.json").read_text())["starts"]) == 2
    names = [f"{run}/adapter/adapter_model.safetensors" for run in ("killed", "together")]
    assert (together / names[0]).read_bytes() == (together / names[1]).read_bytes()


def test_what_all_refuse_is_told_once(folder: Path) -> None:
    status, output = finished(
        "cli.main", *words(folder, "refused", "--gpus", "2", "--data", "nowhere.jsonl")
    )
    assert status == 2
    assert output.count("nowhere.jsonl: there is no such data file") == 1
    assert "Traceback" not in output and "terminate called" not in output


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a process has written a folder."""
    end = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
