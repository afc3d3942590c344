"""Divided models in processes of a real group, whose collectives overlap with computation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.model_sources.load_model import LayerPlacement
from kernels.runtime.ranks import Ranks
from models.sharding import (
    WholeParameters,
    finish_gradients,
    idle_pass,
    shard_parameters,
    trained_pieces,
)
from optim.clip import norm_over_ranks
from optim.param_groups import piece_groups
from tests.models.test_sharding import (
    SETTINGS,
    accumulated,
    assert_sum,
    batches_of,
    built,
    expected_of,
)
from tests.support.processes.rank_threads import run_ranks

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
from pathlib import Path
from engine.distributed.torch_ranks import TorchRanks
from tests.models.test_sharded_processes import work
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
work(TorchRanks(), folder)
dist.destroy_process_group()
"""


def adapters(ranks: Ranks, items: float) -> dict[str, Tensor]:
    """Gradients of adapters on divided weights, with a divided vocabulary."""
    model = built("qwen3", LayerPlacement(False, ranks, ranks), quantization="int8")
    return accumulated(model, batches_of(ranks.rank), 2, items)


def parameters(ranks: Ranks, items: float) -> dict[str, Tensor]:
    """Divided parameters after two steps of full fine-tuning."""
    model = built("llama", full=True, dtype=torch.float32)
    shard_parameters(model, ranks)
    optimizer = torch.optim.SGD(piece_groups(trained_pieces(model)), 1e-2)
    mine = batches_of(ranks.rank)
    for _ in range(2):
        for number in range(2):
            if number < len(mine):
                model.batch_loss(mine[number], SETTINGS, num_items=items).backward()
            else:
                idle_pass(model, SETTINGS, num_items=items)
        norm = norm_over_ranks(*finish_gradients(model), ranks)
        optimizer.step()
        optimizer.zero_grad()
    whole = WholeParameters(model)
    return {name: whole.parameter(name).clone() for name in whole.shapes} | {"norm": norm}


def work(ranks: Ranks, folder: Path) -> None:
    items = float(sum(b.trained_tokens for rank in range(2) for b in batches_of(rank)))
    save_file(adapters(ranks, items), folder / f"adapters-{ranks.rank}")
    save_file(parameters(ranks, items), folder / f"parameters-{ranks.rank}")


def test_processes_compute_what_threads_and_one_process_do(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", PROGRAM, str(tmp_path), str(rank)] for rank in range(2)]
    started = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    whole, items = expected_of(built("qwen3", quantization="int8"), 2)
    threads = run_ranks(2, lambda own: parameters(own, items))
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert_sum([load_file(tmp_path / f"adapters-{rank}") for rank in range(2)], whole, 1e-12)
    for rank in range(2):
        mine = load_file(tmp_path / f"parameters-{rank}")
        assert mine.keys() == threads[rank].keys()
        assert all(torch.equal(mine[name], x) for name, x in threads[rank].items())
