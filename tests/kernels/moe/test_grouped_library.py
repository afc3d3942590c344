"""torch's grouped product of decoded experts: values, what it refuses, and its trial."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.moe import grouped_library
from kernels.moe.gathered import Gathered
from kernels.moe.grouped_library import ExpertProduct, library_matmul, solves, strides_suit, suits
from kernels.moe.grouped_matmul import Groups, expert_weight, planar_experts
from kernels.nf4 import quantize
from kernels.nf4.planar import PlanarNF4Weight

grouped_mm = getattr(torch, "_grouped_mm", None)
needs_grouped_mm = pytest.mark.skipif(grouped_mm is None, reason="this torch has no _grouped_mm")

Accurate = Callable[[Tensor, Tensor, Tensor], None]
SIZES = [3, 0, 70, 1, 0, 64, 9, 0]
OUT, IN, ROWS = 40, 128, sum(SIZES)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def groups() -> Groups:
    experts = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    return Groups.from_sorted(experts, len(SIZES))


def weights(double_quant: bool = True) -> PlanarNF4Weight:
    dense = randn(len(SIZES), OUT, IN).bfloat16()
    return planar_experts(quantize(dense, double_quant=double_quant))


def one_by_one(x: Tensor, weight: PlanarNF4Weight, transpose: bool, dtype: torch.dtype) -> Tensor:
    """The product of every expert, from its decoded weight in bf16, computed in `dtype`."""
    parts = []
    for expert, part in groups().filled:
        dense = expert_weight(weight, expert, torch.bfloat16).to(dtype)
        parts.append(x[part].to(dtype) @ (dense if transpose else dense.T))
    return torch.cat(parts)


@needs_grouped_mm
@pytest.mark.parametrize("way", ["reference", "triton"], indirect=True)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_product_is_that_of_every_expert_by_the_accuracy_rule(
    transpose: bool, double_quant: bool, way: str, device: torch.device, accurate: Accurate
) -> None:
    if device.type != "cpu":
        pytest.skip("a statement about the function's CPU build; GPUs have their trial")
    weight = weights(double_quant)
    width, depth = (IN, OUT) if transpose else (OUT, IN)
    x = randn(ROWS, depth + 16).bfloat16()[:, 8:-8]
    wide = torch.full((ROWS, width + 8), torch.nan, dtype=torch.bfloat16)
    library_matmul(ExpertProduct(Gathered(x), weight, groups().offsets, wide[:, :width], transpose))
    plain = one_by_one(x, weight, transpose, torch.bfloat16)
    accurate(wide[:, :width], plain, one_by_one(x, weight, transpose, torch.float64))
    assert bool(wide[:, width:].isnan().all())


@needs_grouped_mm
@pytest.mark.parametrize("transpose", [False, True])
def test_rows_are_gathered_scaled_and_added(transpose: bool, accurate: Accurate) -> None:
    weight, depth, width = weights(), *((OUT, IN) if transpose else (IN, OUT))
    tokens = randn(30, depth).bfloat16()
    rows = torch.randint(0, 30, (ROWS,), generator=torch.Generator().manual_seed(1))
    start, given = randn(ROWS, width).bfloat16(), (weight, groups().offsets)
    exact = one_by_one(tokens[rows], weight, transpose, torch.float64)
    plain = one_by_one(tokens[rows], weight, transpose, torch.bfloat16)
    added = start.clone()
    library_matmul(ExpertProduct(Gathered(tokens, rows), *given, added, transpose, True, 0.5))
    accurate(added, start + 0.5 * plain, start.double() + 0.5 * exact)
    scaled = torch.empty_like(start)
    library_matmul(ExpertProduct(Gathered(tokens, rows), *given, scaled, transpose, False, 0.3))
    accurate(scaled, 0.3 * plain, 0.3 * exact)


@needs_grouped_mm
@pytest.mark.parametrize("transpose", [False, True])
def test_strides_that_torch_refuses_are_not_offered(transpose: bool) -> None:
    assert grouped_mm is not None
    offsets = torch.tensor([3, 7], dtype=torch.int32)
    offered, refused = 0, 0
    for height, width, pitch in itertools.product([8, 20, 24, 36], [64, 68, 72], [0, 4, 8]):
        weight = torch.ones(2, height, width, dtype=torch.bfloat16)
        right, depth = (weight, height) if transpose else (weight.mT, width)
        x = torch.ones(7, depth + pitch, dtype=torch.bfloat16)[:, :depth]
        if strides_suit(Gathered(x), (height, width)):
            offered += 1
            assert torch.equal(grouped_mm(x, right, offs=offsets), x @ right[0])
            continue
        try:
            grouped_mm(x, right, offs=offsets)
        except RuntimeError:
            refused += 1
    # Heights and widths of 8, 24 and 64, 72 with pitches that are 0 or 8 more.
    assert offered == 2 * 2 * 2
    assert refused >= 4 * 3


def test_rows_that_begin_between_16_bytes_or_lie_in_columns_are_not_offered() -> None:
    x = torch.ones(7, 80, dtype=torch.bfloat16)
    assert strides_suit(Gathered(x[:, 8:72]), (64, 64))
    assert not strides_suit(Gathered(x[:, 4:68]), (64, 64))
    assert not strides_suit(Gathered(torch.ones(64, 8, dtype=torch.bfloat16).T), (64, 64))
    assert strides_suit(Gathered(x[:, 4:68], torch.arange(7)), (64, 64))


@pytest.mark.usefixtures("triton_on")
def test_a_device_that_is_no_hopper_keeps_decoding_on_the_way(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("a statement about the interpreter's CPU, which says sm_80")
    out = torch.empty(ROWS, OUT, dtype=torch.bfloat16)
    x = Gathered(randn(ROWS, IN).bfloat16())
    assert not suits(ExpertProduct(x, weights(), groups().offsets, out))


@needs_grouped_mm
def test_the_trial_solves_a_small_problem_on_the_device() -> None:
    assert solves(torch.device("cpu")) == "ok"


def refusing(x: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    raise RuntimeError("grouped gemm is not supported on this device\nand more")


def misled(x: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """Every row by the first expert's matrix."""
    return x @ right[0]


def only_forward(x: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    first, _, last = offs.tolist()
    other = right[2] if right.is_contiguous() is False else right[1]
    return torch.cat([x[:first] @ right[0], x[first:last] @ other])


@pytest.mark.parametrize(
    ("function", "answer"),
    [
        (None, "this torch does not have it"),
        (refusing, "RuntimeError: grouped gemm is not supported on this device"),
        (misled, "its product is wrong by"),
        (only_forward, "its product is wrong by"),
    ],
)
def test_what_is_absent_refused_or_wrong_is_not_used(
    function: Any, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_library, "_grouped_mm", function)
    assert grouped_library._tried(torch.device("cpu")).startswith(answer)
