"""SwiGLU against float64 truth, on the reference and on the Triton kernels."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.elementwise import swiglu

Accurate = Callable[[Tensor, Tensor, Tensor], None]
Mutant = Callable[[ModuleType, str, str], ModuleType]


def plain(gate: Tensor, up: Tensor, dh: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """h, dgate, dup by autograd in `dtype`."""
    g, u = (x.to(dtype).detach().requires_grad_(True) for x in (gate, up))
    h = F.silu(g) * u
    return [h.detach(), *torch.autograd.grad(h, (g, u), dh.to(dtype))]


def check(
    module: ModuleType,
    accurate: Accurate,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    scale: float = 3.0,
) -> None:
    rows, width = shape
    joined = (torch.randn(rows, 2 * width + 3, device=device) * scale).to(dtype)
    dh = torch.randn(rows, width, device=device).to(dtype)
    gate, up = joined[:, :width], joined[:, width : 2 * width]
    wanted = zip(plain(gate, up, dh, dtype), plain(gate, up, dh, torch.float64), strict=True)
    rest = joined[:, 2 * width :].clone()
    h = module.swiglu_forward(gate, up)
    assert h.is_contiguous()
    scratch = dh.clone()
    dgate, dup = module.swiglu_backward_(scratch, gate, up, keep_h=True)
    assert dgate.data_ptr() == gate.data_ptr()
    assert dup.data_ptr() == up.data_ptr()
    for mine, (other, truth) in zip((h, dgate, dup), wanted, strict=True):
        accurate(mine, other, truth)
    torch.testing.assert_close(scratch, h, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)
    assert torch.equal(joined[:, 2 * width :], rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (63, 63), (3, 257), (2, 2000), (1, 2049)])
def test_values_and_gradients_are_accurate(
    shape: tuple[int, int],
    dtype: torch.dtype,
    way: str,
    device: torch.device,
    accurate: Accurate,
) -> None:
    check(swiglu, accurate, shape, dtype, device)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_large_gates_saturate(way: str, device: torch.device) -> None:
    gate = torch.tensor([[-1e4, -200.0, -90.0, 90.0, 200.0, 1e4]], device=device)
    up = torch.full_like(gate, 2.0)
    h = swiglu.swiglu_forward(gate, up)
    torch.testing.assert_close(h, torch.clamp(gate, min=0.0) * 2.0, rtol=1e-6, atol=1e-30)
    swiglu.swiglu_backward_(torch.ones_like(gate), gate, up)
    torch.testing.assert_close(gate, torch.tensor([[0, 0, 0, 2.0, 2, 2]], device=device))
    assert torch.isfinite(up).all()


def test_dh_survives_unless_h_replaces_it(way: str, device: torch.device) -> None:
    gate, up, dh = (torch.randn(5, 33, device=device) for _ in range(3))
    before = dh.clone()
    swiglu.swiglu_backward_(dh, gate, up)
    assert torch.equal(dh, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 63), (63, 257), (2, 2049)])
def test_everything_may_lie_in_wider_matrices(
    shape: tuple[int, int],
    dtype: torch.dtype,
    way: str,
    device: torch.device,
    accurate: Accurate,
) -> None:
    rows, width = shape
    g, u, d = ((torch.randn(shape, device=device) * 3).to(dtype) for _ in range(3))
    matrices = [
        torch.full((rows, width + 16), torch.nan, device=device, dtype=dtype) for _ in "gudh"
    ]
    gate, up, dh, h = (matrix[:, :width] for matrix in matrices)
    for part, value in zip((gate, up, dh), (g, u, d), strict=True):
        part.copy_(value)
    wanted = zip(plain(g, u, d, dtype), plain(g, u, d, torch.float64), strict=True)
    assert swiglu.swiglu_forward(gate, up, out=h).data_ptr() == h.data_ptr()
    swiglu.swiglu_backward_(dh, gate, up, keep_h=True)
    for mine, (other, truth) in zip((h, gate, up), wanted, strict=True):
        accurate(mine, other, truth)
    torch.testing.assert_close(dh, h, rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)
    for matrix in matrices:
        assert matrix[:, width:].isnan().all()


def test_h_may_be_written_over_gate_or_up(way: str, device: torch.device) -> None:
    gate, up = (torch.randn(5, 33, device=device) for _ in range(2))
    want = swiglu.swiglu_forward(gate, up)
    for index in range(2):
        pair = [gate.clone(), up.clone()]
        swiglu.swiglu_forward(*pair, out=pair[index])
        assert torch.equal(pair[index], want)


def test_the_many_row_blocks_of_the_reference_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, up, dh = (torch.randn(50, 7) for _ in range(3))
    whole = swiglu.swiglu_backward_(dh, gate.clone(), up.clone())
    monkeypatch.setattr(swiglu, "_REFERENCE_ELEMENTS", 30)
    parts = swiglu.swiglu_backward_(dh, gate.clone(), up.clone())
    torch.testing.assert_close(parts, whole)


def test_rows_beyond_two_to_the_31_are_reached(triton_on: None, device: torch.device) -> None:
    stride = 2**30 + 8
    # numpy's memory is not touched until it is written, so these 4 GiB cost three pages.
    memory = torch.from_numpy(np.empty(2 * stride + 64, dtype=np.float16)).to(device)
    gate, up = memory.as_strided((3, 64), (stride, 1)).split(32, 1)
    gate.copy_(torch.randn(3, 32))
    up.copy_(torch.randn(3, 32))
    near = gate.clone(), up.clone()
    assert torch.equal(swiglu.swiglu_forward(gate, up), swiglu.swiglu_forward(*near))
    dh = torch.randn(3, 32, device=device).half()
    swiglu.swiglu_backward_(dh, gate, up)
    swiglu.swiglu_backward_(dh, *near)
    assert torch.equal(gate, near[0])
    assert torch.equal(up, near[1])


def test_columns_apart_are_refused(triton_on: None, device: torch.device) -> None:
    x = torch.ones(4, 8, device=device)
    with pytest.raises(ValueError, match="columns adjacent"):
        swiglu.swiglu_forward(x[:, ::2], x[:, ::2])


def test_reference_passes_gradcheck() -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu.swiglu, (gate, up))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("wide / (1.0 + tl.exp(-wide)) * up", "wide / (1.0 + tl.exp(-wide))"),
        ("(1.0 + gate * (1.0 - sigmoid))", "(1.0 + gate * sigmoid)"),
        ("(dh * silu)", "(silu)"),
        ("(silu * up)", "(silu * dh)"),
        ("cdiv(gate.shape[1], block)", "(gate.shape[1] // block)"),
    ],
)
def test_a_planted_fault_breaks_the_rule(
    old: str, new: str, triton_on: None, device: torch.device, accurate: Accurate, mutant: Mutant
) -> None:
    broken = mutant(swiglu, old, new)
    with pytest.raises(AssertionError):
        check(broken, accurate, (5, 2100), torch.float32, device)
