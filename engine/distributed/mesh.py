"""Which processes share what: rows, the tokens of a row, weights, experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from engine.distributed.group import Group
from engine.errors import ConfigError
from kernels.runtime.ranks import ONE_RANK, Ranks

GroupOf = Callable[[Sequence[int]], Ranks]
"""Makes the group of these processes; for others it is nothing to use."""


@dataclass(frozen=True)
class Mesh:
    """The groups of one process.

    `every` has all processes: gradients are summed over it. `context` shares the tokens of each
    batch; the rows of a step are dealt to `data`, one process of every such group. Base weights
    are divided over `weights`, experts over `experts`; `replicas` have the same experts. In
    `lockstep` all processes run the same number of passes.
    """

    every: Ranks = ONE_RANK
    data: Ranks = ONE_RANK
    context: Ranks = ONE_RANK
    weights: Ranks | None = None
    experts: Ranks | None = None
    replicas: Ranks = ONE_RANK

    @property
    def lockstep(self) -> bool:
        """Whether a pass of one process is a pass of all."""
        return self.weights is not None or self.experts is not None


ALONE_MESH = Mesh()
"""The groups of a process that trains by itself."""


@dataclass(frozen=True)
class MeshSizes:
    """How many processes share the tokens of a batch, and experts; whether weights are divided."""

    context: int = 1
    experts: int = 1
    weights: bool = False

    def check(self, size: int) -> None:
        """Raises `ConfigError` where so many processes cannot be divided so."""
        for name, count in (("context_parallel", self.context), ("expert_parallel", self.experts)):
            if size % count:
                raise ConfigError(
                    f"{name} is {count}, which does not divide the {size} processes that train "
                    "together. Start a multiple of it (--gpus, or torchrun's --nproc-per-node)."
                )


def lay_out(group: Group, sizes: MeshSizes, group_of: GroupOf | None = None) -> Mesh:
    """The groups of this process; all must call this together, with the same arguments.

    Processes that follow each other share a batch's tokens, or the experts. `group_of` makes the
    group of some processes, by default one of torch's. Raises `ConfigError` where they cannot be
    divided so.
    """
    every = group.ranks
    sizes.check(every.size)
    make = group_of or partial(_torch_group, timeout=group.timeout)
    context, data = _runs(every, sizes.context, make)
    experts, replicas = _runs(every, sizes.experts, make)
    return Mesh(
        every,
        data,
        context,
        every if sizes.weights and every.size > 1 else None,
        experts if sizes.experts > 1 else None,
        replicas if sizes.experts > 1 else ONE_RANK,
    )


def _torch_group(members: Sequence[int], timeout: int) -> Ranks:
    from engine.distributed.torch_ranks import group_of

    return group_of(members, timeout)


def _runs(every: Ranks, length: int, group_of: GroupOf) -> tuple[Ranks, Ranks]:
    """The run of so many consecutive processes that this one is in, and those of its place in it.

    Every process makes every group, as torch asks for, and keeps its own.
    """
    if length == 1:
        return ONE_RANK, every
    runs = [list(range(first, first + length)) for first in range(0, every.size, length)]
    strides = [list(range(first, every.size, length)) for first in range(length)]
    own_run, own_stride = (
        next(ranks for members, ranks in made if every.rank in members)
        for made in ([(members, group_of(members)) for members in kind] for kind in (runs, strides))
    )
    return own_run, own_stride
