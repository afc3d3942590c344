"""Which processes share what: rows, the tokens of a row, weights."""

from __future__ import annotations

from dataclasses import dataclass

from engine.distributed.group import Group
from engine.errors import ConfigError
from kernels.runtime.ranks import ONE_RANK, Ranks


@dataclass(frozen=True)
class Mesh:
    """The groups of one process.

    `every` has all processes: gradients are summed over it. `context` shares the tokens of each
    batch; the rows of a step are dealt to `data`, one process of every such group. Base weights
    are divided over `weights`. In `lockstep` all processes run the same number of passes.
    """

    every: Ranks = ONE_RANK
    data: Ranks = ONE_RANK
    context: Ranks = ONE_RANK
    weights: Ranks | None = None

    @property
    def lockstep(self) -> bool:
        """Whether a pass of one process is a pass of all."""
        return self.weights is not None


ALONE_MESH = Mesh()
"""The groups of a process that trains by itself."""


def lay_out(group: Group, context: int = 1, divided: bool = False) -> Mesh:
    """The groups of this process; all must call this together, with the same arguments.

    `context` processes that follow each other share a batch's tokens; `divided` says that base
    weights are. Raises `ConfigError` where the processes cannot be divided so.
    """
    size = group.ranks.size
    if size % context:
        raise ConfigError(
            f"context_parallel is {context}, which does not divide the {size} processes that train "
            "together. Start a multiple of it (--gpus, or torchrun's --nproc-per-node)."
        )
    weights = group.ranks if divided and size > 1 else None
    if context == 1:
        return Mesh(group.ranks, group.ranks, ONE_RANK, weights)
    from engine.distributed.torch_ranks import group_of

    rank = group.ranks.rank
    runs = [list(range(first, first + context)) for first in range(0, size, context)]
    strides = [list(range(first, size, context)) for first in range(context)]
    # Every process makes every group, as torch asks for, and keeps its own.
    own_run, own_stride = (
        next(ranks for members, ranks in made if rank in members)
        for made in ([(members, group_of(members)) for members in kind] for kind in (runs, strides))
    )
    return Mesh(group.ranks, own_stride, own_run, weights)
