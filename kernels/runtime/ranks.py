"""Processes that compute one step together, as arithmetic sees them.

A `Ranks` is a group of processes, each with a number. Its methods are collectives: every rank calls
the same ones in the same order, with tensors that fit together. They return a `Transfer`; until it
was waited for, the tensors may be neither read nor written. On a GPU waiting lets the stream of the
computation wait, not the host. `engine.distributed` makes groups of torch's; one process alone is
`ONE_RANK`, for which nothing is sent and nothing is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Transfer(Protocol):
    """A collective that is under way."""

    def wait(self) -> object:
        """Let what follows see its result."""


class Ranks(Protocol):
    """A group of processes; this one is number `rank` of `size`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: Tensor) -> Transfer:
        """Replace x by its sum over all ranks."""

    def maximum(self, x: Tensor) -> Transfer:
        """Replace x by its elementwise maximum over all ranks."""

    def all_gather(self, out: Tensor, x: Tensor) -> Transfer:
        """Write x (n,) of every rank, in their order, to out (size * n,)."""

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Transfer:
        """Write the sum over all ranks of this rank's part of x (size * n,) to out (n,).

        What x is afterwards is not said: it may be the place where sums are made.
        """

    def all_to_all(
        self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Transfer:
        """Send sent[r] rows of x to every rank r; received[r] rows of out come from it.

        Both are contiguous, and rows are laid in the order of the ranks.
        """

    def broadcast(self, x: Tensor, source: int) -> Transfer:
        """Replace x by that of the rank `source`."""


class Done:
    """A transfer that is complete already."""

    def wait(self) -> None:
        """Nothing is under way."""


DONE = Done()
"""Of anything that was waited for."""


class OneRank:
    """A process alone: what it sends to itself is what it has."""

    rank, size = 0, 1

    def all_reduce(self, x: Tensor) -> Transfer:
        return DONE

    def maximum(self, x: Tensor) -> Transfer:
        return DONE

    def all_gather(self, out: Tensor, x: Tensor) -> Transfer:
        out.copy_(x)
        return DONE

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Transfer:
        out.copy_(x)
        return DONE

    def all_to_all(
        self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Transfer:
        out.copy_(x)
        return DONE

    def broadcast(self, x: Tensor, source: int) -> Transfer:
        return DONE


ONE_RANK = OneRank()
"""The group of a process that is alone."""


def gathered(ranks: Ranks, x: Tensor) -> Tensor:
    """The tensors x (...) of all ranks, which have one shape: (R, ...), without gradients."""
    flat = x.detach().reshape(-1)
    every = flat.new_empty(ranks.size * flat.numel())
    ranks.all_gather(every, flat).wait()
    return every.view(ranks.size, *x.shape)


def host_sums(ranks: Ranks, *numbers: float) -> list[float]:
    """The sums over all ranks of numbers that the host has."""
    return _of_all(ranks, numbers, ranks.all_reduce)


def host_maxima(ranks: Ranks, *numbers: float) -> list[float]:
    """The largest of all ranks of numbers that the host has."""
    return _of_all(ranks, numbers, ranks.maximum)


def _of_all(
    ranks: Ranks, numbers: Sequence[float], collective: Callable[[Tensor], Transfer]
) -> list[float]:
    if ranks.size == 1:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    collective(values).wait()
    result: list[float] = values.tolist()
    return result
