"""Ranks that are threads of one process: collectives without processes to start."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.distributed.group import Group
from engine.distributed.mesh import Mesh, MeshSizes, lay_out
from kernels.runtime.ranks import ONE_RANK, Done, Ranks, Transfer
from kernels.runtime.scratch import use_pool

T = TypeVar("T")
_PATIENCE = 60.0


class Meeting:
    """Where threads show each other a value; all must ask for the same thing."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=_PATIENCE)
        self._shown: list[Any] = [None] * size

    def exchange(self, rank: int, what: str, value: Any) -> list[Any]:
        """What every rank shows, in their order; raises where they do not ask for the same."""
        self._shown[rank] = (what, value)
        self._barrier.wait()
        shown = list(self._shown)
        self._barrier.wait()
        assert len({name for name, _ in shown}) == 1, f"ranks disagree: {[n for n, _ in shown]}"
        return [value for _, value in shown]

    def abort(self) -> None:
        """Let nobody wait for a rank that failed."""
        self._barrier.abort()


class ThreadRanks:
    """One of the threads of a `Meeting`."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self.rank, self.size = meeting, rank, meeting.size
        self.sent: Counter[str] = Counter()

    def _all(self, kind: str, x: Tensor) -> list[Tensor]:
        self.sent["all_reduce" if kind == "maximum" else kind] += x.numel() * x.element_size()
        what = f"{kind} of {tuple(x.shape) if kind != 'all_to_all' else ''} {x.dtype}"
        shown: list[Tensor] = self._meeting.exchange(self.rank, what, x.detach().clone())
        return shown

    def all_reduce(self, x: Tensor) -> Transfer:
        total = torch.stack(self._all("all_reduce", x)).sum(0, dtype=x.dtype)
        x.detach().copy_(total)
        return Done()

    def maximum(self, x: Tensor) -> Transfer:
        x.detach().copy_(torch.stack(self._all("maximum", x)).amax(0))
        return Done()

    def all_gather(self, out: Tensor, x: Tensor) -> Transfer:
        out.detach().copy_(torch.cat(self._all("all_gather", x)))
        return Done()

    def reduce_scatter(self, out: Tensor, x: Tensor) -> Transfer:
        total = torch.stack(self._all("reduce_scatter", x)).sum(0, dtype=x.dtype)
        out.detach().copy_(total.chunk(self.size)[self.rank])
        return Done()

    def all_to_all(
        self, out: Tensor, x: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Transfer:
        assert sum(sent) == len(x) and sum(received) == len(out)
        assert x.is_contiguous() and out.is_contiguous()
        parts: list[tuple[list[int], Tensor]] = self._meeting.exchange(
            self.rank, f"all_to_all {x.dtype}", (list(sent), x.detach().clone())
        )
        self.sent["all_to_all"] += x.numel() * x.element_size()
        mine = [rows.split(counts)[self.rank] for counts, rows in parts]
        assert [len(part) for part in mine] == list(received)
        out.detach().copy_(torch.cat(mine))
        return Done()

    def broadcast(self, x: Tensor, source: int) -> Transfer:
        x.detach().copy_(self._all("broadcast", x)[source])
        return Done()


def run_on_mesh(
    size: int, sizes: MeshSizes, work: Callable[[Mesh], T], kind: type[ThreadRanks] = ThreadRanks
) -> list[T]:
    """What `work` returns on each of `size` ranks that are laid out as a run's processes are."""
    meetings: dict[tuple[int, ...], Meeting] = {}
    lock = threading.Lock()

    def inside(every: ThreadRanks) -> T:
        def group(members: Sequence[int]) -> Ranks:
            if len(members) == 1 or every.rank not in members:
                return ONE_RANK
            with lock:
                meeting = meetings.setdefault(tuple(members), Meeting(len(members)))
            return kind(meeting, members.index(every.rank))

        try:
            return work(lay_out(Group(every), sizes, group))
        except BaseException:
            for meeting in list(meetings.values()):
                meeting.abort()
            raise

    return run_ranks(size, inside, kind)


def run_ranks(
    size: int, work: Callable[[ThreadRanks], T], kind: type[ThreadRanks] = ThreadRanks
) -> list[T]:
    """What `work` returns on each of `size` ranks; the first error of any is raised."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            with use_pool({}):
                results[rank] = work(kind(meeting, rank))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
