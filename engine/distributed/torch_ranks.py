"""A group of torch.distributed as the `Ranks` that kernels and models know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from engine.errors import GroupError
from kernels.runtime.ranks import ONE_RANK, Ranks, Transfer

# torch 2.13 renamed both; older versions know the second name alone.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchRanks:
    """The processes of a group of torch's, by default all.

    `sent` counts the bytes that this rank gives to each kind of collective. What a collective does
    with them on the wire depends on its algorithm: a ring sends them 2 (N - 1) / N times for
    all_reduce and (N - 1) / N times for the others, of the whole vector.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent: Counter[str] = Counter()

    def all_reduce(self, x: Tensor) -> Transfer:
        self._count("all_reduce", x)
        return _started(lambda: dist.all_reduce(x, group=self._group, async_op=True), "all_reduce")

    def maximum(self, x: Tensor) -> Transfer:
        self._count("all_reduce", x)
        most = dist.ReduceOp.MAX
        return _started(
            lambda: dist.all_reduce(x, most, group=self._group, async_op=True), "all_reduce"
        )

    def all_gather(self, out: Tensor, x: Tensor) -> Transfer:
        self._count("all_gather", x)
        return _started(lambda: _all_gather(out, x, group=self._group, async_op=True), "all_gather")

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Transfer:
        self._count("reduce_scatter", x)
        if x.device.type == "cpu":  # where gloo sums up all of a copy
            whole = _started(
                lambda: dist.all_reduce(x, group=self._group, async_op=True), "reduce_scatter"
            )
            return _PartOfSum(whole, out, x.view(self.size, -1)[self.rank])
        return _started(
            lambda: _reduce_scatter(out, x, group=self._group, async_op=True), "reduce_scatter"
        )

    def all_to_all(
        self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Transfer:
        self._count("all_to_all", x)
        return _started(
            lambda: dist.all_to_all_single(
                out, x, list(received), list(sent), group=self._group, async_op=True
            ),
            "all_to_all",
        )

    def broadcast(self, x: Tensor, source: int) -> Transfer:
        self._count("broadcast", x)
        rank = source if self._group is None else dist.get_global_rank(self._group, source)
        return _started(
            lambda: dist.broadcast(x, rank, group=self._group, async_op=True), "broadcast"
        )

    def _count(self, kind: str, x: Tensor) -> None:
        self.sent[kind] += x.numel() * x.element_size()


def group_of(members: Sequence[int], timeout: int) -> Ranks:
    """A group of these processes, which all processes make; for others it is nothing to use.

    Its collectives wait `timeout` seconds, whatever those of other groups do.
    """
    made = dist.new_group(list(members), timeout=timedelta(seconds=timeout))
    if len(members) == 1 or dist.get_rank() not in members:
        return ONE_RANK
    return TorchRanks(made)


class _Started:
    """A collective of torch's whose failure is told in one paragraph."""

    def __init__(self, work: Any, kind: str) -> None:
        self._work, self._kind = work, kind

    def wait(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            raise GroupError(
                f"Rank {dist.get_rank()} of {dist.get_world_size()} waited for the others "
                f"({self._kind}) and one of them ended, or did not answer within --ddp-timeout: "
                f"{' '.join(str(error).split())[:300]}. What ended it stands in its own output. "
                "The last checkpoint is whole: go on from it with --resume auto."
            ) from error


def _started(start: Callable[[], Any], kind: str) -> Transfer:
    try:
        return _Started(start(), kind)
    except RuntimeError as error:
        return _Started(_Failed(error), kind)


class _PartOfSum:
    """A sum over all ranks, of which `part` goes to `out`."""

    def __init__(self, whole: Transfer, out: Tensor, part: Tensor) -> None:
        self._whole, self._out, self._part = whole, out, part

    def wait(self) -> None:
        self._whole.wait()
        self._out.view(-1).copy_(self._part)


class _Failed:
    """A collective that could not even start; waiting for it raises why."""

    def __init__(self, error: RuntimeError) -> None:
        self._error = error

    def wait(self) -> None:
        raise self._error
