"""Slices of tokens and shares of experts over torch's groups of processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kernels.runtime.ranks import Ranks
from models.layers.context import StepSettings
from models.over_ranks import divide_experts, split_context
from tests.models.parallel.test_expert_parallel import (
    Results,
    assert_equal,
    documents,
    dropping,
    joined,
    random_model,
    step,
    together,
)

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
from engine.distributed.torch_ranks import TorchRanks
from tests.models.parallel.test_processes import compute
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
compute(TorchRanks(), folder)
dist.destroy_process_group()
"""
SETTINGS = StepSettings(dropout_seed=3, hidden_dropout=0.25, attention_dropout=0.25)


def compute(ranks: Ranks | None, folder: str) -> Results:
    """One rank's step, which is saved for the parent, or that of one process alone."""
    family = ROOT / "tests" / "fixtures" / "golden" / "qwen3_5_moe_vl"
    model, batch = dropping(random_model(family)), joined(documents(3))
    if ranks is None:
        return step(model, batch, batch.items, SETTINGS)
    divide_experts(model, ranks)
    split_context(model, ranks)
    results = step(model, batch, batch.items, SETTINGS)
    save_file({n: t.contiguous() for n, t in results.items()}, f"{folder}/{ranks.rank}.safetensors")
    return results


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    """DeltaNet, attention and a mixture with a shared expert, with dropout, in fp64."""
    started = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), str(rank)], cwd=ROOT)
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in started] == [0, 0]
    parts = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert all(part["loss"].dtype == torch.float64 for part in parts)
    assert_equal(together(parts), compute(None, str(tmp_path)))
