"""The fused NF4 product is as accurate as torch's own."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels.nf4 import decode_ptx as nf4_decode
from kernels.nf4 import matmul as nf4_matmul
from kernels.nf4 import quantize
from kernels.nf4 import tiles as tiling
from kernels.nf4.dequantize_triton import dequantize_reference
from kernels.nf4.matmul import nf4_linear, nf4_linear_backward_input
from kernels.nf4.planar import AnyNF4, PlanarNF4Weight, to_planar
from kernels.nf4.tiles import MatmulPlan, MatmulTile
from kernels.runtime.device import architecture

pytestmark = pytest.mark.usefixtures("triton_on")

# The interpreter multiplies bf16 by bf16 wrongly, and rounds to bf16 by cutting off.
DTYPE = torch.float16 if nf4_decode.INTERPRETED else torch.bfloat16
TILE = MatmulTile(block_n=64, block_m=16, warps=4, stages=2)


def weight_of(
    rows: int, columns: int, device: torch.device, *, double_quant: bool = True
) -> PlanarNF4Weight:
    weight = torch.randn(rows, columns, device=device) / columns**0.5
    return to_planar(quantize(weight, double_quant=double_quant))


def decoded(weight: AnyNF4, dtype: torch.dtype) -> Tensor:
    return dequantize_reference(weight, dtype)


def check(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The one accuracy rule: at most twice torch's own error, and an ulp."""
    assert bool(torch.isfinite(ours).all())
    assert ours.shape == plain.shape
    ulp = torch.finfo(ours.dtype).eps * truth.abs().max()
    allowed = 2 * (plain.double() - truth).abs().max() + ulp
    assert (ours.double() - truth).abs().max() <= allowed


def within(ours: Tensor, plain: Tensor, truth: Tensor) -> bool:
    """Whether the rule holds."""
    try:
        check(ours, plain, truth)
    except AssertionError:
        return False
    return True


def linear_pair(x: Tensor, weight: AnyNF4, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain torch in the same dtype and in float64, from the same rounded inputs."""
    dense = decoded(weight, x.dtype)
    wide = None if bias is None else bias.double()
    plain = torch.nn.functional.linear(x, dense, bias)
    return plain, torch.nn.functional.linear(x.double(), dense.double(), wide)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 63, 64), (16, 64, 320), (17, 257, 128), (3, 1, 192), (40, 130, 64)]
)
def test_every_form_of_the_fused_product_is_accurate(
    m: int, n: int, k: int, double_quant: bool, parts: int, device: torch.device
) -> None:
    x = torch.randn(m, k, dtype=DTYPE, device=device)
    weight = weight_of(n, k, device, double_quant=double_quant)
    bias = torch.randn(n, dtype=DTYPE, device=device)
    for b in (None, bias):
        out = torch.empty(m, n, dtype=DTYPE, device=device)
        nf4_matmul.nf4_matmul(x, weight, b, out, MatmulPlan(TILE, parts))
        check(out, *linear_pair(x, weight, b))


@pytest.mark.parametrize("parts", [1, 4])
def test_what_out_holds_is_added_before_the_only_rounding(parts: int, device: torch.device) -> None:
    """Addends far below a unit in the last place of the product survive on the average."""
    x, weight = torch.randn(40, 320, dtype=DTYPE, device=device), weight_of(130, 320, device)
    _, base = linear_pair(x, weight, None)
    small = torch.randn_like(base) * torch.finfo(DTYPE).eps / 8
    for addend, least in ((torch.randn_like(base), None), (small, 0.5)):
        out = addend.to(DTYPE)
        truth = base + out.double()
        plain = torch.addmm(out, x, decoded(weight, DTYPE).T)
        nf4_matmul.nf4_matmul(x, weight, None, out, MatmulPlan(TILE, parts), accumulate=True)
        check(out, plain, truth)
        share = ((out.double() - base) * addend).sum() / addend.square().sum()
        assert least is None or share > least


@pytest.mark.parametrize("wide", [False, True])
def test_the_op_accumulates_however_it_multiplies(wide: bool, device: torch.device) -> None:
    """Fused, and through scratch, which a reduction of 100 columns takes."""
    x = torch.randn(5, 128, dtype=DTYPE, device=device)
    weight: AnyNF4 = weight_of(48, 128, device)
    if wide:
        x, weight = x[:, :100].contiguous(), quantize(torch.randn(48, 100, device=device))
    plain, truth = linear_pair(x, weight, None)
    out = torch.ones(5, 48, dtype=DTYPE, device=device)
    assert nf4_linear(x, weight, out=out, accumulate=True) is out
    check(out, plain + 1, truth + 1)
    with pytest.raises(ValueError, match="accumulates into an `out`"):
        nf4_linear(x, weight, accumulate=True)


def test_a_split_product_repeats_bit_for_bit(device: torch.device) -> None:
    x = torch.randn(5, 512, dtype=DTYPE, device=device)
    weight = weight_of(70, 512, device)
    outs = [torch.empty(5, 70, dtype=DTYPE, device=device) for _ in range(3)]
    for out in outs:
        nf4_matmul.nf4_matmul(x, weight, None, out, MatmulPlan(TILE, 4))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_split_counters_are_left_at_zero(device: torch.device) -> None:
    x = torch.randn(17, 256, dtype=DTYPE, device=device)
    out = torch.empty(17, 70, dtype=DTYPE, device=device)
    nf4_matmul.nf4_matmul(x, weight_of(70, 256, device), None, out, MatmulPlan(TILE, 4))
    assert not bool(nf4_matmul._counters(x.device).any())


def test_blocks_of_more_than_64_elements_may_straddle_rows(device: torch.device) -> None:
    weight = to_planar(quantize(torch.randn(37, 192, device=device), block_size=128))
    x = torch.randn(4, 192, dtype=DTYPE, device=device)
    out = torch.empty(4, 37, dtype=DTYPE, device=device)
    nf4_matmul.nf4_matmul(x, weight, None, out, MatmulPlan(TILE))
    check(out, *linear_pair(x, weight, None))


def test_rows_may_be_apart_and_out_may_be_columns_of_a_wider_matrix(device: torch.device) -> None:
    weight = weight_of(48, 128, device)
    x = torch.randn(6, 200, dtype=DTYPE, device=device)[:, :128]
    wide = torch.full((6, 100), 7.0, dtype=DTYPE, device=device)
    result = nf4_linear(x, weight, out=wide[:, 30:78])
    assert result.data_ptr() == wide[:, 30:78].data_ptr()
    check(wide[:, 30:78], *linear_pair(x, weight, None))
    assert bool((wide[:, :30] == 7.0).all())
    assert bool((wide[:, 78:] == 7.0).all())


@pytest.mark.parametrize("k", [128, 100])
def test_the_op_gives_value_and_gradients(k: int, device: torch.device) -> None:
    """K = 100 has no planar order, so that weight goes through scratch."""
    plain_weight = quantize(torch.randn(60, k, device=device) / k**0.5)
    weight: AnyNF4 = to_planar(plain_weight) if k % 64 == 0 else plain_weight
    x = torch.randn(2, 9, k, dtype=DTYPE, device=device, requires_grad=True)
    bias = torch.randn(60, dtype=DTYPE, device=device, requires_grad=True)
    dy = torch.randn(2, 9, 60, dtype=DTYPE, device=device)
    y = nf4_linear(x, weight, bias)
    dx, db = torch.autograd.grad(y, (x, bias), dy)
    dense = decoded(weight, DTYPE)
    check(y.detach(), *(t.detach() for t in linear_pair(x, weight, bias)))
    check(dx, dy @ dense, dy.double() @ dense.double())
    check(db, dy.flatten(0, 1).sum(0), dy.double().flatten(0, 1).sum(0))


def test_no_decoded_weight_is_saved_for_backward(device: torch.device) -> None:
    weight = weight_of(256, 256, device)
    x = torch.randn(1, 256, dtype=DTYPE, device=device, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nf4_linear(x, weight)
    assert sum(tensor.nbytes for tensor in saved) == 0


@pytest.mark.parametrize("limit", [None, 64 * 128 * 2])
def test_scratch_whole_or_in_slabs_gives_the_same_product(
    limit: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = architecture(device)
    weight = weight_of(130, 192, device)
    x = torch.randn(7, 192, dtype=DTYPE, device=device)
    dy = torch.randn(7, 130, dtype=DTYPE, device=device)
    if limit is not None:
        monkeypatch.setitem(tiling.SLAB_BYTES, arch, limit)
    dense = decoded(weight, DTYPE)
    with tiling.override({(arch, 1 << 30, 130, 192): None}):
        check(nf4_linear(x, weight), *linear_pair(x, weight, None))
    dx = nf4_linear_backward_input(dy, weight)
    check(dx, dy @ dense, dy.double() @ dense.double())


@pytest.mark.parametrize("fault", ["scale", "code", "column"])
def test_a_planted_fault_breaks_the_accuracy_rule(fault: str, device: torch.device) -> None:
    x = torch.randn(8, 256, dtype=DTYPE, device=device)
    weight = weight_of(64, 256, device)
    plain, truth = linear_pair(x, weight, None)
    check(nf4_linear(x, weight), plain, truth)
    if fault == "scale":
        weight.absmax[2] = weight.absmax[1]
    elif fault == "code":
        weight.codes[2, 5, 3] ^= 0x0700
    else:
        x = x.roll(1, 1)
    with pytest.raises(AssertionError):
        check(nf4_linear(x, weight), plain, truth)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x_at + 32", "x_at + 31"),
        ("scale = next_scale", "scale = scale"),
        ("scale_index = row * blocks + first", "scale_index = row * 0 + first"),
        ("codes_at += rows * 16", "codes_at += rows * 8"),
        ("last = tl.minimum(first + share, blocks)", "last = first + share - 1"),
        ("for _ in range(parts)", "for _ in range(parts - 1)"),
        ("acc += tl.load(bias + row", "acc += 2 * tl.load(bias + row"),
        ("total += tl.load(bias + row", "total += 2 * tl.load(bias + row"),
        ("acc += tl.load(target", "acc += 2 * tl.load(target"),
        ("total += tl.load(target", "total += 2 * tl.load(target"),
        ("row_inside = row < rows", "row_inside = row < rows - 1"),
        ("token_inside = token < m", "token_inside = token < m - 1"),
        ("tl.store(counters + tile, 0)", "tl.store(counters + tile, 1)"),
    ],
)
def test_a_planted_fault_in_the_kernel_breaks_the_accuracy_rule(
    old: str,
    new: str,
    device: torch.device,
    mutant: Callable[[ModuleType, str, str], ModuleType],
) -> None:
    changed = mutant(nf4_matmul, old, new)
    weight = weight_of(70, 256, device)
    bias = torch.randn(70, dtype=DTYPE, device=device)
    adds = "target" in old
    for module, right in ((nf4_matmul, True), (changed, False)):
        results = []
        # Split twice, for what a launch leaves to the next.
        for parts in (1, 4, 4):
            x = torch.randn(5, 256, dtype=DTYPE, device=device)
            out = torch.full((5, 70), 1.0 if adds else torch.nan, dtype=DTYPE, device=device)
            plain, truth = linear_pair(x, weight, bias)
            if adds:
                plain, truth = plain + 1, truth + 1
            module.nf4_matmul(x, weight, bias, out, MatmulPlan(TILE, parts), accumulate=adds)
            results.append(within(out, plain, truth))
        assert all(results) == right


def test_arguments_that_do_not_go_together_are_refused(device: torch.device) -> None:
    weight = weight_of(64, 128, device)
    x = torch.randn(3, 128, dtype=DTYPE, device=device)
    with pytest.raises(ValueError, match="does not fit an NF4 weight"):
        nf4_linear(x[:, :64], weight)
    with pytest.raises(ValueError, match="does not fit an NF4 weight"):
        nf4_linear_backward_input(x, weight)
    with pytest.raises(ValueError, match="bias"):
        nf4_linear(x, weight, torch.randn(63, dtype=DTYPE, device=device))
    with pytest.raises(ValueError, match="float64"):
        nf4_linear(x.double(), weight)
    with pytest.raises(ValueError, match="expected"):
        nf4_linear(x, weight, out=torch.empty(3, 65, dtype=DTYPE, device=device))
    with pytest.raises(ValueError, match="record a gradient"):
        nf4_linear(x.requires_grad_(), weight, out=torch.empty(3, 64, dtype=DTYPE, device=device))
    tall = torch.empty((1 << 16) * 16 + 1, 128, dtype=DTYPE, device="meta")
    with pytest.raises(ValueError, match="counters"):
        nf4_matmul.nf4_matmul(tall, weight, None, tall, MatmulPlan(TILE, 2))


def test_codes_off_a_16_byte_boundary_are_refused(device: torch.device) -> None:
    weight = weight_of(64, 128, device)
    shifted = torch.empty(weight.codes.numel() + 1, dtype=torch.int16, device=device)[1:]
    moved = replace(weight, codes=shifted.view_as(weight.codes).copy_(weight.codes))
    x = torch.randn(3, 128, dtype=DTYPE, device=device)
    with pytest.raises(ValueError, match="aligned"):
        nf4_linear(x, moved)


def test_no_rows_give_no_rows(device: torch.device) -> None:
    weight = weight_of(64, 128, device)
    x = torch.empty(0, 128, dtype=DTYPE, device=device)
    assert nf4_linear(x, weight).shape == (0, 64)
    dy = torch.empty(0, 64, dtype=DTYPE, device=device)
    assert nf4_linear_backward_input(dy, weight).shape == (0, 128)


@pytest.mark.skipif(not nf4_decode.INTERPRETED, reason="needs sparse memory, which a GPU lacks")
def test_offsets_beyond_32_bits_reach_the_right_elements(device: torch.device) -> None:
    """Rows of x and of the result lie more than 2^31 elements apart."""
    m, n, k, ldx = 3, 64, 64, (1 << 30) + 64
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # 0x4000: MAP_NORESERVE
    space = [mmap.mmap(-1, m * ldx * 2, flags=flags) for _ in range(2)]
    x, out = (torch.frombuffer(part, dtype=DTYPE).view(m, ldx)[:, :k] for part in space)
    x.copy_(torch.randn(m, k))
    weight = weight_of(n, k, device)
    nf4_matmul.nf4_matmul(x, weight, None, out, MatmulPlan(TILE))
    check(out.clone(), *linear_pair(x.clone(), weight, None))
