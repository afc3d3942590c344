"""One of several ranks in a simulated step: its buckets, its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from engine.config.train_config import TrainConfig
from engine.distributed.data_parallel import DataParallel
from engine.distributed.group import processes_of
from engine.training.trainable import backward_units, optimizer_over
from kernels.runtime.ranks import Transfer
from models.decoder import Decoder
from optim import StepOptimizer


class _Sending:
    """A transfer that keeps what it sends until it is forgotten."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def wait(self) -> None:
        """Nothing is under way."""


@dataclass(frozen=True)
class SimulatedRanks:
    """Number `rank` of `size` ranks, which sends nothing: what arrives is as it was allocated."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Transfer:
        return _Sending(x)

    def maximum(self, x: Tensor) -> Transfer:
        return _Sending(x)

    def all_gather(self, out: Tensor, x: Tensor) -> Transfer:
        return _Sending(x)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Transfer:
        return _Sending(x)

    def all_to_all(
        self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Transfer:
        return _Sending(x)

    def broadcast(self, x: Tensor, source: int) -> Transfer:
        return _Sending(x)


def fullest_rank(model: Decoder, size: int) -> DataParallel:
    """The buckets of the rank of `size` that updates most of the model's parameters."""
    return _as_rank(model, size, lambda owned: sum(p.numel() for p in owned))


def largest_rank(model: Decoder, size: int) -> DataParallel:
    """The buckets of the rank of `size` that updates the model's largest parameter."""
    return _as_rank(model, size, lambda owned: max((p.numel() for p in owned), default=0))


def candidates(config: TrainConfig) -> tuple[Callable[[Decoder, int], DataParallel], ...]:
    """Which ranks may be the one whose step needs most.

    Of all weights an update may need most where there are most of them, or where the largest is;
    adapters are small beside the rest.
    """
    if config.every_weight and processes_of(config) > 1:
        return fullest_rank, largest_rank
    return (fullest_rank,)


def _as_rank(model: Decoder, size: int, measure: Callable[[list[Tensor]], int]) -> DataParallel:
    """The buckets of the first rank of those for whose parameters `measure` is largest."""
    units = backward_units(model)
    first = DataParallel(SimulatedRanks(0, size), units)
    owned: list[list[Tensor]] = [[] for _ in range(size)]
    for bucket in first.buckets:
        for p, owner in zip(bucket.parameters, bucket.owners, strict=True):
            owned[owner].append(p)
    rank = max(range(size), key=lambda rank: (measure(owned[rank]), -rank))
    return first if rank == 0 else DataParallel(SimulatedRanks(rank, size), units)


def own_optimizer(model: Decoder, config: TrainConfig, parallel: DataParallel) -> StepOptimizer:
    """The optimizer of what a rank updates."""
    named = model.named_parameters()
    return optimizer_over([(name, p) for name, p in named if id(p) in parallel.owned], config)
