"""States of parameters that ranks divide, saved and restored by name.

A rank's piece of a parameter is whole blocks of 256 elements, and 8-bit states are of such blocks:
the pieces of all ranks joined are the states of the whole, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kernels.adamw8bit import ROW
from optim.interface import StepOptimizer
from optim.param_groups import DividedParameter


def piece_states(optimizer: StepOptimizer, pieces: Iterable[DividedParameter]) -> dict[str, Tensor]:
    """This rank's states by the names of parameter and state, without copies, for a checkpoint."""
    optimizer.state_tensors()  # makes them, before the first step
    return {
        f"{piece.name}.{key}": tensor
        for piece in pieces
        for key, tensor in optimizer.state[piece.parameter].items()
    }


@torch.no_grad()
def restore_pieces(
    optimizer: StepOptimizer,
    pieces: Sequence[DividedParameter],
    parameters: Sequence[Mapping[str, Tensor]],
    states: Sequence[Mapping[str, Tensor]],
) -> None:
    """Take this rank's part of what all ranks of a run saved, in their order, however many.

    `parameters` are their pieces by name, `states` what `piece_states` gave. The last of `pieces`
    is whole on every rank. Raises ValueError, changing nothing, where something is missing or of
    another size.
    """
    optimizer.state_tensors()
    values = {piece.name: piece.parameter.data for piece in pieces}
    parts = own_parts(pieces, values, parameters)
    copies = [(value, parts[name]) for name, value in values.items()]
    for piece in pieces:
        ranks = 1 if piece is pieces[-1] else len(states)
        parameter = piece.parameter
        for key, own in optimizer.state[parameter].items():
            copies.append((own, _part(piece, own, _joined(f"{piece.name}.{key}", states[:ranks]))))
    for own, part in copies:
        own.copy_(part)


def own_parts(
    pieces: Sequence[DividedParameter],
    like: Mapping[str, Tensor],
    saved: Sequence[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """This rank's parts, in the form of `like`, of what all ranks of a run saved of parameters.

    All by the parameters' names; the last of `pieces` is whole on every rank. Raises ValueError
    where something is missing or of another size.
    """
    return {
        piece.name: _part(
            piece,
            like[piece.name],
            _joined(piece.name, saved[:1] if piece is pieces[-1] else saved),
        )
        for piece in pieces
    }


def _joined(name: str, saved: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """What all ranks have of a tensor; a rank may have nothing of it."""
    parts = [tensors[name] for tensors in saved if name in tensors]
    if not parts:
        raise ValueError(f"no rank saved {name}")
    return torch.cat([part.reshape(-1) for part in parts]) if parts[0].dim() else parts[0]


def _part(piece: DividedParameter, own: Tensor, whole: Tensor) -> Tensor:
    """The part of a joined tensor that belongs to a piece, in the form of `own`."""
    numel = piece.parameter.numel()
    if own.dim() == 0:
        return whole
    first = piece.begin if own.numel() >= numel else piece.begin // ROW
    part = whole[first : first + own.numel()]
    if part.numel() != own.numel() or part.dtype != own.dtype:
        raise ValueError(
            f"what the ranks saved of {piece.name} has {whole.numel()} elements of {whole.dtype}; "
            f"{own.numel()} of {own.dtype} are expected from {first} on"
        )
    return part.view(own.shape).to(own.device)
