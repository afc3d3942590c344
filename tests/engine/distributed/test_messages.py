"""What one rank tells the others, and what all do when one of them fails."""

from __future__ import annotations

import pytest
import torch

from engine.distributed.group import Group
from engine.distributed.messages import (
    all_or_none,
    as_bytes,
    broadcast_tensors,
    broadcast_text,
    from_bytes,
    gather_texts,
)
from engine.errors import CheckpointError
from kernels.runtime.ranks import Ranks
from tests.support.processes.rank_threads import run_ranks


@pytest.mark.parametrize("text", ["", "ä", "x" * 100_000])
def test_every_rank_has_the_text_of_one(text: str) -> None:
    said = run_ranks(3, lambda ranks: broadcast_text(ranks, text if ranks.rank == 1 else "?", 1))
    assert said == [text] * 3


def test_every_rank_has_what_each_says() -> None:
    assert run_ranks(3, lambda r: gather_texts(r, "a" * r.rank)) == [["", "a", "aa"]] * 3


def test_tensors_become_those_of_the_first_rank_in_place() -> None:
    def work(ranks: Ranks) -> list[torch.Tensor]:
        whole = torch.full((4, 3), float(ranks.rank + 1))
        tensors = [whole, whole.t()[1:], torch.tensor(ranks.rank)]
        broadcast_tensors(ranks, tensors[1:])
        return tensors

    for whole, part, number in run_ranks(2, work)[1:]:
        assert part.tolist() == [[1.0] * 4] * 2 and int(number) == 0
        assert whole.tolist() == [[2.0, 1.0, 1.0]] * 4


def test_bytes_are_the_tensors_that_they_were_made_of() -> None:
    tensors = {
        "a": torch.randn(3, 5, dtype=torch.bfloat16),
        "b": torch.tensor(7),
        "c": torch.empty(0),
        "d": torch.arange(4, dtype=torch.uint8),
    }
    back = from_bytes(as_bytes(tensors), {n: torch.empty_like(t) for n, t in tensors.items()})
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_the_first_rank_that_fails_says_why_and_the_others_leave() -> None:
    def work(ranks: Ranks) -> str:
        def save() -> str:
            if ranks.rank in (1, 2):
                raise CheckpointError(f"the disk of rank {ranks.rank} is full")
            return "saved"

        try:
            return all_or_none(Group(ranks, ranks.rank), save)
        except CheckpointError as error:
            return str(error)
        except SystemExit as left:
            return f"left with {left.code}"

    told = ["left with 2", "the disk of rank 1 is full", "left with 2", "left with 2"]
    assert run_ranks(4, work) == told


def test_what_fails_nowhere_is_returned() -> None:
    done = run_ranks(2, lambda ranks: all_or_none(Group(ranks), lambda: ranks.rank))
    assert done == [0, 1]
    assert all_or_none(Group(), lambda: "alone") == "alone"
