"""Which product NF4 experts take: by measurement and by rule."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.moe import grouped_choice
from kernels.moe.gathered import Gathered
from kernels.moe.grouped_choice import LIBRARY_ROWS, kind_of, multiply_nf4
from kernels.moe.grouped_library import ExpertProduct, library_matmul
from kernels.moe.grouped_matmul import (
    ExpertProjection,
    Groups,
    expert_weight,
    grouped_project,
    grouped_project_backward,
    planar_experts,
)
from kernels.nf4 import quantize
from kernels.nf4.planar import PlanarNF4Weight
from kernels.runtime import device as device_seam

Accurate = Callable[[Tensor, Tensor, Tensor], None]
COUNT, OUT, IN = 2, 64, 128
TRIAL = 4
"""Runs of each product in a trial: one to warm up, three that are timed."""


class Runs:
    """Products that only note that they ran; `slow` names the one that takes longer."""

    def __init__(self, slow: str) -> None:
        self.slow, self.names = slow, list[str]()

    def run(self, name: str) -> None:
        self.names.append(name)
        time.sleep(0.004 if name == self.slow else 0.0)

    def fused(self) -> None:
        self.run("fused")

    def library(self, product: ExpertProduct) -> None:
        self.run("library")

    def since(self) -> list[str]:
        names, self.names = self.names, []
        return names


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Runs]:
    """Makes products, on a device that has the library's, of which nothing is remembered."""

    def make(slow: str) -> Runs:
        runs = Runs(slow)
        monkeypatch.setattr(grouped_choice, "library_matmul", runs.library)
        return runs

    monkeypatch.setattr(grouped_choice, "suits", lambda product: True)
    monkeypatch.setattr(grouped_choice, "_library_wins", {})
    return make


def weight_of(dtype: torch.dtype = torch.bfloat16) -> PlanarNF4Weight:
    return planar_experts(quantize(torch.ones(COUNT, OUT, IN, dtype=dtype)))


def product(per_expert: int, **changes: Any) -> ExpertProduct:
    x = torch.zeros(COUNT * per_expert, IN, dtype=torch.bfloat16)
    offsets = torch.tensor([0, per_expert, COUNT * per_expert], dtype=torch.int32)
    out = torch.empty(COUNT * per_expert, OUT, dtype=torch.bfloat16)
    made = ExpertProduct(Gathered(x), weight_of(), offsets, out)
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("slow", ["fused", "library"])
def test_the_faster_product_is_timed_once_and_remembered(
    slow: str, fresh: Callable[[str], Runs]
) -> None:
    runs, faster = fresh(slow), "library" if slow == "fused" else "fused"
    multiply_nf4(product(300), runs.fused)
    assert runs.since() == ["fused"] * TRIAL + ["library"] * TRIAL + [faster]
    multiply_nf4(product(511), runs.fused)
    multiply_nf4(product(300, accumulate=True), runs.fused)
    assert runs.since() == [faster] * 2
    multiply_nf4(product(512), runs.fused)
    assert len(runs.since()) == 2 * TRIAL + 1


def test_few_rows_are_decoded_on_the_way_without_a_trial(fresh: Callable[[str], Runs]) -> None:
    runs = fresh("fused")
    multiply_nf4(product(LIBRARY_ROWS - 1), runs.fused)
    assert runs.since() == ["fused"]


def test_a_product_that_adds_is_not_tried(fresh: Callable[[str], Runs]) -> None:
    """A trial would add more than once."""
    runs = fresh("fused")
    multiply_nf4(product(300, accumulate=True), runs.fused)
    assert runs.since() == ["fused"]


def test_nothing_is_timed_while_launches_are_recorded(
    fresh: Callable[[str], Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fresh("fused")
    monkeypatch.setattr(grouped_choice, "recording", lambda device: True)
    multiply_nf4(product(300), runs.fused)
    assert runs.since() == ["fused"]


@pytest.mark.parametrize("slow", ["fused", "library"])
def test_deterministic_runs_choose_by_rule(
    slow: str, fresh: Callable[[str], Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fresh(slow)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    for per_expert, taken in ((LIBRARY_ROWS - 1, "fused"), (LIBRARY_ROWS, "library")):
        multiply_nf4(product(per_expert), runs.fused)
        assert runs.since() == [taken]


def test_what_does_not_suit_is_decoded_on_the_way(
    fresh: Callable[[str], Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fresh("fused")
    monkeypatch.setattr(grouped_choice, "suits", lambda product: False)
    multiply_nf4(product(300), runs.fused)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    multiply_nf4(product(300), runs.fused)
    assert runs.since() == ["fused", "fused"]


def test_kinds_differ_by_what_changes_the_time() -> None:
    rows = torch.arange(COUNT * 300)
    plain = product(300)
    others = [
        product(600),
        product(300, transpose=True),
        product(300, rows=Gathered(plain.rows.matrix, rows)),
        product(300, rows=Gathered(plain.rows.matrix.half())),
        product(300, weight=planar_experts(quantize(torch.ones(COUNT, 2 * OUT, IN)))),
    ]
    assert kind_of(plain).rows == 256
    assert kind_of(plain) == kind_of(product(400, scale=0.5))
    assert len({kind_of(plain), *map(kind_of, others)}) == 6


def test_seconds_are_those_of_one_run() -> None:
    runs: list[int] = []

    def run() -> None:
        runs.append(1)
        time.sleep(0.02)

    taken = device_seam.seconds(run, torch.device("cpu"), repeats=2)
    assert len(runs) == 3
    assert 0.02 <= taken < 0.2
    assert not device_seam.recording(torch.device("cpu"))


@pytest.mark.usefixtures("triton_on")
@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no _grouped_mm")
def test_a_projection_and_its_input_gradient_are_the_same_by_both_products(
    device: torch.device, accurate: Accurate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of a trial leave nothing behind; the second projection adds to dx."""
    if device.type != "cpu":
        pytest.skip("forces the library's product, which not every GPU survives")
    generator = torch.Generator().manual_seed(0)
    groups = Groups(torch.tensor([0, 3, 3, 40, 45], dtype=torch.int32), 45)
    dense = [torch.randn(4, OUT, 64, generator=generator) for _ in range(2)]
    maps = tuple(ExpertProjection(planar_experts(quantize(one))) for one in dense)
    x = Gathered(torch.randn(20, 64, generator=generator), torch.arange(45) % 20)
    dy = torch.randn(45, 2 * OUT, generator=generator)

    def products() -> list[Tensor]:
        y, _ = grouped_project(x, maps, groups)
        dx = grouped_project_backward(dy, x, maps, groups, {})
        assert dx is not None
        return [y, dx]

    fused = products()
    library: list[ExpertProduct] = []

    def counted(product: ExpertProduct) -> None:
        library.append(product)
        library_matmul(product)

    monkeypatch.setattr(grouped_choice, "suits", lambda product: True)
    monkeypatch.setattr(grouped_choice, "LIBRARY_ROWS", 1)
    monkeypatch.setattr(grouped_choice, "library_matmul", counted)
    monkeypatch.setattr(grouped_choice, "_library_wins", {})
    answers = itertools.cycle([1.0, 0.0])

    def library_is_faster(run: Callable[[], None], device: torch.device) -> float:
        run()
        return next(answers)

    monkeypatch.setattr(grouped_choice, "seconds", library_is_faster)
    got = products()
    # Two kinds are tried, forward and transposed, and then each of four products is made.
    assert len(library) == 2 + 4
    weights = [
        torch.stack([expert_weight(one.weight, e, torch.float32).clone() for e in range(4)])
        for one in maps
    ]
    rows, owner = x.all(), torch.repeat_interleave(torch.arange(4), groups.offsets.diff())
    joint = torch.cat(weights, 1)[owner].double()
    exact = [
        torch.einsum("moi,mi->mo", joint, rows.double()),
        torch.einsum("moi,mo->mi", joint, dy.double()),
    ]
    for ours, plain, truth in zip(got, fused, exact, strict=True):
        accurate(ours, plain, truth)
