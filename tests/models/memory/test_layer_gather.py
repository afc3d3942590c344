"""The order of a layer's gathers, and when they are waited for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.memory.layer_gather import ALIGNED, LayerGather, gathered_layers, share_bytes

CPU = torch.device("cpu")


def test_layers_that_stay_are_not_gathered_again() -> None:
    assert gathered_layers(5, 0, first=True) == [0, 1, 2, 3, 4, 2, 1, 0]
    assert gathered_layers(5, 0, first=False) == [2, 3, 4, 2, 1, 0]
    assert gathered_layers(5, None, first=False) == [0, 1, 2, 3, 4]
    assert gathered_layers(5, 3, first=False) == [0, 1, 2, 3, 4, 2]
    assert gathered_layers(2, 0, first=False) == []
    assert gathered_layers(1, 0, first=False) == []


class Late:
    """A group whose gathers write when they are waited for, and never before."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.started: list[int] = []

    def all_gather(self, out: Tensor, x: Tensor) -> Any:
        self.started.append(int(x[0]))

        class Pending:
            def wait(self) -> None:
                out.copy_(x)

        return Pending()


def test_a_layer_is_gathered_ahead_and_waited_for_at_its_turn() -> None:
    ranks: Any = Late()
    gather = LayerGather(ranks, CPU)
    for number in range(3):
        gather.add(torch.full((300 + number,), number, dtype=torch.uint8))
    seen = []
    for index, ahead in [(0, 1), (1, 1), (2, 1), (2, -1), (1, -1), (0, -1), (2, 1), (0, 1)]:
        seen.append(int(gather.arrive(index, ahead)[7]))
    assert seen == [0, 1, 2, 2, 1, 0, 2, 0]
    assert ranks.started == [0, 1, 2, 0, 2, 0]
    assert share_bytes(300, 2) == ALIGNED
