"""The Triton grouped products against float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels.moe import grouped_matmul_triton
from kernels.moe.gathered import Gathered
from kernels.moe.grouped_matmul import (
    ExpertWeights,
    Groups,
    expert_weight,
    grouped_matmul,
    grouped_outer,
    planar_experts,
)
from kernels.nf4 import quantize

pytestmark = pytest.mark.usefixtures("triton_on")

Accurate = Callable[[Tensor, Tensor, Tensor], None]
SIZES = ([3, 0, 70, 1, 0, 64, 9], [0, 0, 5], [129])
"""Rows per expert: none, one, a tile, one more than a tile, experts without rows at either end."""


def groups_of(sizes: list[int], device: torch.device) -> Groups:
    experts = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return Groups.from_sorted(experts.to(device), len(sizes))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def truth(x: Tensor, weight: ExpertWeights, groups: Groups, transpose: bool) -> Tensor:
    out = []
    for expert, part in groups.filled:
        dense = expert_weight(weight, expert, torch.float32).double()
        out.append(x[part].double() @ (dense if transpose else dense.T))
    return torch.cat(out)


def plain(x: Tensor, weight: ExpertWeights, groups: Groups, transpose: bool) -> Tensor:
    """What plain torch makes of it in the dtype of x."""
    out = []
    for expert, part in groups.filled:
        dense = expert_weight(weight, expert, x.dtype)
        out.append(x[part] @ (dense if transpose else dense.T))
    return torch.cat(out)


def nf4(dense: Tensor, double_quant: bool) -> ExpertWeights:
    return planar_experts(quantize(dense, double_quant=double_quant))


@pytest.fixture(params=["dense", "nf4", "nf4 single scales"])
def weights(request: pytest.FixtureRequest, device: torch.device) -> Callable[..., ExpertWeights]:
    def make(experts: int, out: int, size: int, dtype: torch.dtype) -> ExpertWeights:
        dense = randn(experts, out, size, dtype=dtype).to(device)
        return dense if request.param == "dense" else nf4(dense, request.param == "nf4")

    return make


def poison(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("transpose", [False, True])
def test_products_obey_the_accuracy_rule(
    sizes: list[int],
    transpose: bool,
    dtype: torch.dtype,
    weights: Callable[..., ExpertWeights],
    device: torch.device,
    accurate: Accurate,
) -> None:
    if device.type == "cuda" and dtype == torch.float32:
        dtype = torch.bfloat16  # which the interpreter cannot multiply
    groups, weight = groups_of(sizes, device), weights(len(sizes), 40, 128, dtype)
    width, depth = (128, 40) if transpose else (40, 128)
    x = randn(groups.rows, depth, dtype=dtype).to(device)
    # Rows of the result lie apart, as column blocks of a wider matrix do.
    wide = poison((groups.rows, width + 8), dtype, device)
    got = grouped_matmul(x, weight, groups, transpose=transpose, out=wide[:, :width])
    want = truth(x, weight, groups, transpose)
    accurate(got, plain(x, weight, groups, transpose), want)
    assert bool(wide[:, width:].isnan().all())


def test_rows_are_gathered_scaled_and_added(
    weights: Callable[..., ExpertWeights], device: torch.device
) -> None:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    groups = groups_of([5, 0, 66, 2], device)
    weight, tokens = weights(4, 48, 64, dtype), randn(30, 64, dtype=dtype).to(device)
    rows = torch.randint(0, 30, (groups.rows,), generator=torch.Generator().manual_seed(1))
    rows = rows.to(device)
    start = randn(groups.rows, 48, dtype=dtype, seed=5).to(device)
    gathered = Gathered(tokens, rows)
    got = grouped_matmul(gathered, weight, groups, out=start.clone(), accumulate=True, scale=0.5)
    want = start.double() + 0.5 * truth(tokens[rows], weight, groups, False)
    torch.testing.assert_close(got.double(), want, rtol=3e-3, atol=3e-3)
    fresh = grouped_matmul(gathered, weight, groups, scale=0.5)
    torch.testing.assert_close(fresh.double(), want - start.double(), rtol=3e-3, atol=6e-3)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("gathered", [False, True])
def test_outer_sums_and_experts_without_rows(
    sizes: list[int], gathered: bool, device: torch.device
) -> None:
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    groups = groups_of(sizes, device)
    a, b = (randn(groups.rows, width, dtype=dtype).to(device) for width in (5, 70))
    order = torch.randperm(groups.rows, generator=torch.Generator().manual_seed(2)).to(device)
    rows = order if gathered else None
    got = grouped_outer(Gathered(a, rows), Gathered(b, rows), groups, scale=0.25)
    assert got.shape == (len(sizes), 5, 70)
    left, right = (a[order], b[order]) if gathered else (a, b)
    for expert, (first, last) in enumerate(zip(groups.bounds[:-1], groups.bounds[1:], strict=True)):
        want = 0.25 * left[first:last].double().T @ right[first:last].double()
        torch.testing.assert_close(got[expert].double(), want, rtol=3e-3, atol=3e-3)
        assert first < last or not bool(got[expert].any())


def test_the_table_of_tiles_covers_every_row_once(device: torch.device) -> None:
    for sizes in SIZES:
        groups = groups_of(sizes, device)
        expert, first = (part.tolist() for part in groups.tiles)
        covered = []
        for e, start in zip(expert, first, strict=True):
            if e < len(sizes):
                assert groups.bounds[e] <= start < groups.bounds[e + 1]
                stop = min(start + grouped_matmul_triton.BLOCK_M, groups.bounds[e + 1])
                covered += list(range(start, stop))
        assert covered == list(range(groups.rows))


def test_a_result_without_adjacent_columns_is_refused(device: torch.device) -> None:
    groups = groups_of([4], device)
    dtype = torch.float16
    out = torch.zeros(40, 4, dtype=dtype, device=device).T
    with pytest.raises(ValueError, match="adjacent"):
        grouped_matmul(
            randn(4, 64, dtype=dtype).to(device),
            randn(1, 40, 64, dtype=dtype).to(device),
            groups,
            out=out,
        )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("row < tl.load(offsets + expert + 1)", "row < tl.load(offsets + expert)"),
        ("line = expert * width + column", "line = column"),
        ("at, line * blocks + block, there", "at, line, there"),
        ("x_at + 48", "x_at + 47"),
        ("acc *= scale\n    if ACCUMULATE", "if ACCUMULATE"),
    ],
)
def test_planted_faults_break_the_result(
    old: str,
    new: str,
    mutant: Callable[[ModuleType, str, str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    broken = mutant(grouped_matmul_triton, old, new)
    monkeypatch.setattr("kernels.moe.grouped_matmul.grouped_matmul_triton", broken)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    groups, weight = groups_of([5, 0, 66, 2], device), randn(4, 48, 128, dtype=dtype).to(device)
    x = randn(groups.rows, 128, dtype=dtype).to(device)
    planar = nf4(weight, True)
    out = torch.zeros(groups.rows + 64, 48, dtype=dtype, device=device)
    got = grouped_matmul(x, planar, groups, out=out[: groups.rows], scale=2.0)
    want = 2.0 * truth(x, planar, groups, False)
    wrong = not torch.allclose(got.double(), want, rtol=1e-2, atol=1e-2)
    assert wrong or bool(out[groups.rows :].any())
