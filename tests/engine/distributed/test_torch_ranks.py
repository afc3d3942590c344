"""Collectives of torch's process groups and of threads: the same sums, parts and bytes counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.runtime.ranks import ONE_RANK, Ranks
from tests.support.processes.rank_threads import run_ranks

ROOT = Path(__file__).parents[3]
PROGRAM = """
import os, sys, torch, torch.distributed as dist
torch.set_num_threads(1)
from engine.distributed.torch_ranks import TorchRanks
from tests.engine.distributed.test_torch_ranks import collectives
meeting, rank = "file://" + sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
ranks = TorchRanks()
print(collectives(ranks), dict(sorted(ranks.sent.items())))
dist.destroy_process_group()
"""


def collectives(ranks: Ranks) -> list[list[float]]:
    """What one rank has after one of each collective."""
    mine, size = 1.0 + ranks.rank, ranks.size
    total, most = torch.full((3,), mine, dtype=torch.float64), torch.tensor([mine, -mine])
    ranks.all_reduce(total).wait()
    ranks.maximum(most).wait()
    gathered = torch.empty(2 * size)
    ranks.all_gather(gathered, torch.full((2,), mine)).wait()
    part = torch.empty(1)
    ranks.reduce_scatter(part, mine * torch.arange(1.0, size + 1)).wait()
    # Every rank sends one row to the first and two to each of the others.
    sent = [1 if other == 0 else 2 for other in range(size)]
    rows = torch.full((sum(sent), 2), mine, dtype=torch.bfloat16)
    received = [sent[ranks.rank]] * size
    out = torch.empty(sum(received), 2, dtype=torch.bfloat16)
    ranks.all_to_all(out, rows, received, sent).wait()
    word = torch.tensor([ranks.rank], dtype=torch.uint8)
    ranks.broadcast(word, size - 1).wait()
    results = (total, most, gathered, part, out.flatten(), word)
    return [result.double().tolist() for result in results]


EXPECTED = [
    [[3.0] * 3, [2.0, -1.0], [1.0, 1.0, 2.0, 2.0], [3.0], [1.0, 1.0, 2.0, 2.0], [1.0]],
    [[3.0] * 3, [2.0, -1.0], [1.0, 1.0, 2.0, 2.0], [6.0], [1.0] * 4 + [2.0] * 4, [1.0]],
]


def test_threads_exchange_what_a_group_would() -> None:
    assert run_ranks(2, collectives) == EXPECTED


def test_processes_exchange_the_same_and_count_their_bytes(tmp_path: Path) -> None:
    commands = [
        [sys.executable, "-c", PROGRAM, str(tmp_path / "meeting"), str(rank)] for rank in range(2)
    ]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    told = [process.communicate(timeout=120)[0].strip() for process in started]
    sent = {
        "all_gather": 8,
        "all_reduce": 24 + 8,
        "all_to_all": 12,
        "broadcast": 1,
        "reduce_scatter": 8,
    }
    assert told == [f"{expected} {sent}" for expected in EXPECTED]


def test_one_process_has_what_it_sends_to_itself() -> None:
    assert collectives(ONE_RANK) == run_ranks(1, collectives)[0]


def test_threads_that_ask_for_different_things_are_told() -> None:
    def differ(ranks: Ranks) -> None:
        ranks.all_reduce(torch.zeros(1 + ranks.rank)).wait()

    with pytest.raises(AssertionError, match="disagree"):
        run_ranks(2, differ)
