"""Check a group of processes: versions, devices, link, clocks."""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from engine.distributed.group import Group
from engine.distributed.messages import gather_texts
from engine.provenance import git_commit, version
from kernels.runtime.ranks import Ranks, gathered

_SIZES = (1 << 20, 1 << 25)
_ROUNDS = 5
MOST_SKEW = 1.0
"""Seconds between clocks from which on logs and deadlines of machines cannot be compared."""


@dataclass(frozen=True)
class RankFacts:
    """What one process is; all but the last three should be the same on all."""

    python: str
    torch: str
    engine: str
    commit: str | None
    device: str
    host: str
    threads: int
    environment: dict[str, str]


@dataclass(frozen=True)
class GroupReport:
    """What a group is and what its link does; `problems` are what a run would stumble over.

    Bandwidth is that of the link: of a sum over N ranks each sends 2 (N - 1) / N times its bytes
    (the "bus bandwidth" of nccl-tests). `skew` is the largest difference between clocks, seconds.
    """

    processes: int
    machines: int
    backend: str
    ranks: list[RankFacts]
    latency_us: float
    gigabytes_per_second: dict[str, float]
    skew: float
    problems: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """As text."""
        first = self.ranks[0]
        rates = ", ".join(
            f"{r:.2f} GB/s at {size}" for size, r in self.gigabytes_per_second.items()
        )
        lines = [
            f"processes  {self.processes} on {self.machines} machine(s), over {self.backend}",
            f"devices    {', '.join(sorted({rank.device for rank in self.ranks}))}",
            f"versions   engine {first.engine}, torch {first.torch}, Python {first.python}",
            f"latency    {self.latency_us:.0f} us for a sum of one number",
            f"link       {rates}",
            f"clocks     at most {self.skew * 1000:.1f} ms apart",
        ]
        return [*lines, *(f"PROBLEM    {problem}" for problem in self.problems)]


def check_group(group: Group, device: torch.device) -> GroupReport:
    """Look at every process of the group and time its link; all ranks must call it together."""
    ranks = group.ranks
    told = gather_texts(ranks, json.dumps(asdict(_facts(device))))
    facts = [RankFacts(**json.loads(text)) for text in told]
    latency = _seconds(ranks, torch.zeros(1, device=device))
    rates = {}
    for size in _SIZES:
        seconds = _seconds(ranks, torch.ones(size // 4, device=device))
        sent = 2 * (ranks.size - 1) / ranks.size * size
        rates[f"{size >> 20} MiB"] = sent / seconds / 1e9
    skew = _skew(ranks)
    return GroupReport(
        ranks.size,
        len({fact.host for fact in facts}),
        "nccl" if device.type == "cuda" else "gloo",
        facts,
        latency * 1e6,
        rates,
        skew,
        _problems(facts, skew),
    )


def _facts(device: torch.device) -> RankFacts:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE")
    return RankFacts(
        platform.python_version(),
        torch.__version__,
        version(),
        git_commit(),
        name,
        socket.gethostname(),
        torch.get_num_threads(),
        {name: os.environ[name] for name in names if name in os.environ},
    )


def _seconds(ranks: Ranks, x: torch.Tensor) -> float:
    """The median time of a sum of x over all ranks, once all have warmed up."""
    return statistics.median(_timed(lambda: _summed(ranks, x)) for _ in range(_ROUNDS + 1))


def _summed(ranks: Ranks, x: torch.Tensor) -> None:
    ranks.all_reduce(x).wait()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return max(time.perf_counter() - began, 1e-9)


def _skew(ranks: Ranks) -> float:
    """The largest difference between clocks, less what the time of the message explains."""
    best = float("inf")
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        times = gathered(ranks, torch.tensor(time.time(), dtype=torch.float64))
        spread = float(times.max() - times.min())
        best = min(best, max(0.0, spread - (time.perf_counter() - began)))
    return best


def _problems(facts: list[RankFacts], skew: float) -> list[str]:
    """What differs between processes and must not."""
    problems = []
    for name in ("engine", "commit", "torch", "python", "device"):
        values: dict[Any, list[int]] = {}
        for rank, fact in enumerate(facts):
            values.setdefault(getattr(fact, name), []).append(rank)
        if len(values) > 1:
            told = "; ".join(f"{value} on rank {_few(who)}" for value, who in values.items())
            problems.append(f"{name} differs: {told}.")
    if skew > MOST_SKEW:
        problems.append(f"clocks are {skew:.1f} s apart: let a time service set them.")
    return problems


def _few(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return ", ".join(map(str, ranks[:4])) + more
