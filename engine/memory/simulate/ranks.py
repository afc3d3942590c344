"""One of several ranks in a simulated step: its buckets, its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from engine.config.train_config import TrainConfig
from engine.distributed.data_parallel import DataParallel, OwnedPiece, named_pieces
from engine.distributed.group import processes_of
from engine.training.trainable import (
    LEAST_8BIT,
    backward_units,
    piece_optimizer,
    works_on_matrices,
)
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


Measure = Literal["state", "update"]
"""By what a rank has most: elements that it updates, or memory that updating them takes."""


def candidates(config: TrainConfig, *, gpu: bool) -> tuple[Measure, ...]:
    """By what the rank may have most whose step needs most.

    On a GPU adapters are small beside the rest, and so is what their update takes.
    """
    if processes_of(config) > 1 and (config.every_weight or not gpu):
        return "state", "update"
    return ("state",)


def fullest_rank(model: Decoder, config: TrainConfig, measure: Measure) -> DataParallel:
    """The buckets of the first rank of those that have most.

    An update takes most where the largest matrix is, or most elements have states in 8 bits.
    """
    units, size = backward_units(model), processes_of(config)
    matrices = works_on_matrices(config)
    made = partial(DataParallel, units=units, whole=matrices)

    def amount(pieces: Sequence[OwnedPiece]) -> int:
        if measure == "update" and matrices:
            return max((piece.count for piece in pieces), default=0)
        least = LEAST_8BIT if measure == "update" else 0
        return sum(piece.count for piece in pieces if piece.numel >= least)

    first = made(SimulatedRanks(0, size))
    amounts = [amount(first.pieces_of(rank)) for rank in range(size)]
    rank = amounts.index(max(amounts))
    return first if rank == 0 else made(SimulatedRanks(rank, size))


def own_optimizer(model: Decoder, config: TrainConfig, parallel: DataParallel) -> StepOptimizer:
    """The optimizer of what a rank updates."""
    names = {id(p): name for name, p in model.named_parameters()}
    return piece_optimizer(named_pieces(parallel, names), config)
