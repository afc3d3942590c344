"""Optimizer groups and gradient norm of parameters divided among ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kernels.runtime.ranks import Ranks
from optim.param_groups import decays


class DividedParameter(Protocol):
    """A rank's part of a parameter of this name and whole shape, in whole blocks of 256."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> torch.Size: ...

    @property
    def parameter(self) -> nn.Parameter: ...


def piece_groups(
    pieces: Iterable[DividedParameter], weight_decay: float = 0.01, min_8bit_size: int = 4096
) -> list[dict[str, Any]]:
    """Groups as `param_groups` makes them, by what each piece is a part of.

    Whether states take 8 bits follows from the whole parameter too (`min_8bit_size` of a group), so
    that a step moves every element as an optimizer of whole parameters does. Raises ValueError if
    nothing trains.
    """
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for piece in pieces:
        whole = torch.empty(piece.shape, device="meta")
        kind = decays(piece.name, whole), whole.numel() >= min_8bit_size
        members.setdefault(kind, []).append(piece.parameter)
    if not members:
        raise ValueError("this rank has no part of any parameter, so there is nothing to optimise")
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "min_8bit_size": 0 if eight_bit else 1 << 62,
        }
        for (decayed, eight_bit), parameters in sorted(members.items(), reverse=True)
    ]


def norm_over_ranks(divided: Sequence[Tensor], whole: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """The 2-norm, fp32 (), of gradients of which ranks have parts and of whole ones, alike on all.

    Squares are summed in float64, in the order of the ranks, so all have the same bits; one rank's
    gradient that is not finite makes the norm so on all.
    """
    device = (*divided, *whole)[0].device
    own = torch.zeros(1, dtype=torch.float64, device=device)
    if divided:
        own += torch.stack(torch._foreach_norm(list(divided), 2, torch.float64)).square().sum()
    every = own.new_empty(ranks.size)
    ranks.all_gather(every, own).wait()
    total = every.sum()
    if whole:
        total = (
            total + torch.stack(torch._foreach_norm(list(whole), 2, torch.float64)).square().sum()
        )
    return total.sqrt().float()
