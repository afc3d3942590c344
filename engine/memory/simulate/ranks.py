"""One of several ranks in a simulated step: groups, buckets, optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from engine.config.train_config import TrainConfig
from engine.distributed.data_parallel import JoinedParallel
from engine.distributed.group import processes_of
from engine.distributed.mesh import ALONE_MESH, Mesh, MeshSizes
from engine.training.processes.divided_state import DividedStep
from engine.training.processes.ownership import (
    OwnedShare,
    own_pieces,
    owned_by_all,
    sums_over,
)
from engine.training.trainable import (
    LEAST_8BIT,
    make_optimizer,
    piece_optimizer,
    works_on_matrices,
)
from kernels.runtime.ranks import ONE_RANK, Ranks, Transfer
from kernels.runtime.simulation import shapes_only
from models.decoder import Decoder
from optim import StepOptimizer


class SimulatedDivision(DividedStep):
    """What ranks do, and send, around the passes of a step whose parameters they divide."""

    def __init__(self, model: Decoder, groups: SimulatedMesh) -> None:
        super().__init__(model, groups.mesh.data)
        self._groups = groups

    def finish(self) -> None:
        with self._groups.once_a_step():
            super().finish()

    def norm(self, gradients: Sequence[Tensor], sums: Tensor) -> Tensor:
        with self._groups.once_a_step():
            return super().norm(gradients, sums)


class _Sending:
    """A transfer that keeps what it sends until it is forgotten."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def wait(self) -> None:
        """Nothing is under way."""


@dataclass(frozen=True)
class SimulatedRanks:
    """Number `rank` of `size` ranks, which sends nothing: what arrives is as it was allocated.

    Numbers that the host has, such as counts, arrive as if all ranks had the same. `sent` counts
    the bytes that this rank gives to each kind of collective.
    """

    rank: int
    size: int
    sent: Counter[str] = field(default_factory=Counter, compare=False)

    def all_reduce(self, x: Tensor) -> Transfer:
        return self._given("all_reduce", x)

    def maximum(self, x: Tensor) -> Transfer:
        return self._given("all_reduce", x)

    def all_gather(self, out: Tensor, x: Tensor) -> Transfer:
        if not (x.is_meta or out.is_meta):
            out.view(self.size, -1).copy_(x.expand(self.size, -1))
        return self._given("all_gather", x)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Transfer:
        return self._given("reduce_scatter", x)

    def all_to_all(
        self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Transfer:
        return self._given("all_to_all", x)

    def broadcast(self, x: Tensor, source: int) -> Transfer:
        return self._given("broadcast", x)

    def _given(self, kind: str, x: Tensor) -> Transfer:
        self.sent[kind] += x.numel() * x.element_size()
        return _Sending(x)


@dataclass(frozen=True)
class SimulatedMesh:
    """The groups of the rank that has most, and what it gives to their collectives.

    `passes` counts what it gives in passes, `steps` what it gives once a step; gradients and
    parameters of data parallelism, which `Mesh.every` and `Mesh.replicas` exchange, are in neither.
    """

    mesh: Mesh
    passes: Counter[str]
    steps: Counter[str]

    @classmethod
    def of(cls, config: TrainConfig) -> SimulatedMesh:
        """That of a run: the first share of rows and weights, the last slice of tokens.

        Raises `ConfigError` where the processes cannot be divided so.
        """
        passes, steps, size = Counter[str](), Counter[str](), processes_of(config)
        if size == 1:
            return cls(ALONE_MESH, passes, steps)
        context, experts = config.context_parallel, config.expert_parallel
        MeshSizes(context, experts).check(size)

        def group(count: int, sent: Counter[str], rank: int = 0) -> Ranks:
            return ONE_RANK if count == 1 else SimulatedRanks(rank, count, sent)

        mesh = Mesh(
            SimulatedRanks(0, size, Counter()),
            group(size // context, steps),
            group(context, passes, context - 1),
            group(size, passes) if config.shard == "weights" else None,
            group(experts, passes) if experts > 1 else None,
            group(size // experts, Counter()) if experts > 1 else ONE_RANK,
        )
        return cls(mesh, passes, steps)

    @contextmanager
    def once_a_step(self) -> Iterator[None]:
        """What is sent inside the block is not of the passes."""
        before = self.passes.copy()
        yield
        given = self.passes - before
        self.passes.subtract(given)
        self.steps.update(given)

    def at(self, rank: int) -> Mesh:
        """The mesh whose gradients are those of number `rank` of all ranks."""
        every, replicas, experts = self.mesh.every, self.mesh.replicas, self.mesh.experts
        share = 1 if experts is None else experts.size
        return Mesh(
            SimulatedRanks(rank, every.size),
            self.mesh.data,
            self.mesh.context,
            self.mesh.weights,
            experts,
            SimulatedRanks(rank // share, replicas.size) if replicas.size > 1 else ONE_RANK,
        )


Measure = Literal["state", "update"]
"""By what a rank has most: state of what it updates, or memory that updating it takes."""


def candidates(config: TrainConfig, *, gpu: bool) -> tuple[Measure, ...]:
    """By what the rank may have most whose step needs most.

    On a GPU adapters are small beside the rest, and so is what their update takes.
    """
    if processes_of(config) == 1 or divides_trained(config):
        return ("state",)
    return ("state", "update") if config.every_weight or not gpu else ("state",)


def divides_trained(config: TrainConfig) -> bool:
    """Whether processes divide the parameters that they train, and none owns whole ones."""
    return config.shard == "weights" and config.every_weight


def fullest_rank(
    model: Decoder, config: TrainConfig, groups: SimulatedMesh, measure: Measure
) -> tuple[Mesh, JoinedParallel]:
    """The mesh and the buckets of the first rank of those that have most.

    An update takes most where the largest matrix is, or most elements have states in 8 bits.
    """
    first = groups.at(0)
    parallel = sums_over(model, config, first)
    matrices = works_on_matrices(config)
    states = _state_bytes(model, config) if measure == "state" and matrices else {}

    def amount(shares: Sequence[OwnedShare]) -> int:
        pieces = [share.piece for share in shares]
        if states:
            return sum(states[id(piece.parameter)] for piece in pieces)
        if matrices:
            return max((piece.count for piece in pieces), default=0)
        least = LEAST_8BIT if measure == "update" else 0
        return sum(share.piece.count for share in shares if share.numel >= least)

    amounts = [amount(owned) for owned in owned_by_all(parallel, first)]
    rank = amounts.index(max(amounts))
    mesh = groups.at(rank)
    return mesh, parallel if rank == 0 else sums_over(model, config, mesh)


def _state_bytes(model: Decoder, config: TrainConfig) -> dict[int, int]:
    """The `id` of every trained parameter -> bytes of its state, which of matrices differ."""
    with shapes_only():
        optimizer = make_optimizer(model, config)
        optimizer.state_tensors()
        return {
            id(p): sum(t.numel() * t.element_size() for t in optimizer.state[p].values())
            for p in optimizer.ordered_params()
        }


def own_optimizer(
    model: Decoder, config: TrainConfig, mesh: Mesh, parallel: JoinedParallel
) -> StepOptimizer:
    """The optimizer of what a rank updates."""
    return piece_optimizer(own_pieces(model, parallel, mesh), config)
