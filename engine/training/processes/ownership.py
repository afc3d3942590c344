"""Which process updates which pieces of the trained parameters."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.train_config import TrainConfig
from engine.distributed.data_parallel import (
    DataParallel,
    JoinedParallel,
    OwnedPiece,
    named_pieces,
)
from engine.distributed.mesh import Mesh
from engine.training.trainable import backward_units, works_on_matrices
from models.decoder import Decoder
from models.memory.sharded_parameters import ParameterPiece
from models.over_ranks import expert_parameters

PADDING = "padding"
"""The name of what a process updates that has no piece of any parameter."""


@dataclass(frozen=True, eq=False)
class OwnedShare:
    """A piece of a parameter that is number `part` of `parts` of the whole, as experts are."""

    piece: OwnedPiece
    part: int = 0
    parts: int = 1

    @property
    def begin(self) -> int:
        """Its first element in the whole."""
        return self.part * self.piece.numel + self.piece.begin

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return self.parts * self.piece.numel


def sums_over(model: Decoder, config: TrainConfig, mesh: Mesh) -> JoinedParallel:
    """What adds gradients up: over all processes, of experts over those that have the same ones."""
    units, experts = backward_units(model), {id(p) for p in expert_parameters(model)}
    whole = works_on_matrices(config)
    others = [[p for p in unit if id(p) not in experts] for unit in units]
    sets = [DataParallel(mesh.every, others, data=mesh.data, whole=whole)]
    if experts:
        own = [[p for p in unit if id(p) in experts] for unit in units]
        sets.append(DataParallel(mesh.replicas, own, whole=whole))
    return JoinedParallel(*sets)


def owned_by_all(parallel: JoinedParallel, mesh: Mesh) -> list[list[OwnedShare]]:
    """What each process updates."""
    every, *experts = parallel.sets
    share = 1 if mesh.experts is None else mesh.experts.size
    owned = []
    for rank in range(mesh.every.size):
        replica, part = divmod(rank, share)
        owned.append([OwnedShare(piece) for piece in every.pieces_of(rank)])
        for divided in experts:
            owned[-1] += [OwnedShare(p, part, share) for p in divided.pieces_of(replica)]
    return owned


def own_pieces(model: Decoder, parallel: JoinedParallel, mesh: Mesh) -> list[ParameterPiece]:
    """What the optimizer of this process moves; zeros where it updates nothing."""
    names = {id(p): name for name, p in model.named_parameters()}
    every, *experts = parallel.sets
    part, share = (0, 1) if mesh.experts is None else (mesh.experts.rank, mesh.experts.size)
    pieces = named_pieces(every, names)
    for divided in experts:
        pieces += named_pieces(divided, names, part, share)
    if pieces:
        return pieces
    zeros = next(bucket.padding for one in parallel.sets for bucket in one.buckets)
    return [ParameterPiece(PADDING, zeros.shape, 0, zeros)]
