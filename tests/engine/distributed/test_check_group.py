"""A group is looked at before it trains: what differs is named, what is timed is a number."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from cli import main as cli
from engine.distributed.check_group import GroupReport, check_group
from engine.distributed.group import Group
from kernels.runtime.ranks import Ranks
from tests.support.processes.rank_threads import run_ranks

CPU = torch.device("cpu")


def check(ranks: Ranks) -> GroupReport:
    return check_group(Group(ranks, ranks.rank), CPU)


def test_a_group_of_one_machine_has_no_problem() -> None:
    reports = run_ranks(3, check)
    for report in reports:
        assert (report.processes, report.machines, report.problems) == (3, 1, [])
        assert report.latency_us > 0 and min(report.gigabytes_per_second.values()) > 0
        assert report.skew < 0.5
    told = "\n".join(reports[0].lines())
    assert "3 on 1 machine(s), over gloo" in told and "GB/s at 32 MiB" in told


def test_what_differs_between_processes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.distributed import check_group as module

    real, rank_of = module._facts, threading.local()

    def facts(device: torch.device) -> Any:
        rank = rank_of.number
        return replace(real(device), torch=f"2.{9 + min(rank, 1)}.0", host=f"host{rank}")

    def work(ranks: Ranks) -> GroupReport:
        rank_of.number = ranks.rank
        return check(ranks)

    monkeypatch.setattr(module, "_facts", facts)
    report = run_ranks(3, work)[0]
    assert report.machines == 3
    assert report.problems == ["torch differs: 2.9.0 on rank 0; 2.10.0 on rank 1, 2."]


def test_clocks_apart_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[int] = []

    class Clock:
        perf_counter = staticmethod(time.perf_counter)

        @staticmethod
        def time() -> float:
            mine = threading.get_ident()
            if not first:
                first.append(mine)
            return time.time() + (1000.0 if mine == first[0] else 0.0)

    monkeypatch.setattr("engine.distributed.check_group.time", Clock)
    report = run_ranks(2, check)[0]
    assert 900 < report.skew < 1001  # less the time of the message
    assert report.problems == [
        f"clocks are {report.skew:.1f} s apart: let a time service set them."
    ]


def test_one_process_is_told_how_to_start_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--distributed"]) == 2
    told = capsys.readouterr().err
    assert "nobody to train with" in told and "--nproc-per-node" in told
