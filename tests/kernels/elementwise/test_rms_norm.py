"""RMSNorm against float64 truth, on the reference and on the Triton kernels."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.elementwise import rms_norm, rms_norm_triton

EPS = 1e-5
Accurate = Callable[[Tensor, Tensor, Tensor], None]
Mutant = Callable[[ModuleType, str, str], ModuleType]


def formula(x: Tensor, residual: Tensor | None, weight: Tensor, centered: bool) -> list[Tensor]:
    """y and x + residual as Hugging Face's modules compute them in the dtype of x."""
    total = x if residual is None else x + residual
    wide = total if x.dtype == torch.float64 else total.float()
    xhat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    if centered:
        return [(xhat * (1.0 + weight.to(xhat.dtype))).to(x.dtype), total]
    return [weight.to(x.dtype) * xhat.to(x.dtype), total]


def differentiated(
    outputs: list[Tensor], leaves: list[Tensor], above: list[Tensor]
) -> list[Tensor]:
    above = [a.to(o.dtype) for a, o in zip(above, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, leaves, above)
    return [t.detach() for t in (*outputs, *grads)]


def check(
    accurate: Accurate,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    add: bool = False,
    centered: bool = False,
) -> None:
    width = shape[-1]
    values = [torch.randn(shape, device=device).to(dtype) for _ in range(2 if add else 1)]
    values.append(torch.randn(width, device=device).to(dtype))
    above = [torch.randn(shape, device=device).to(dtype) for _ in range(2 if add else 1)]

    def leaves(kind: torch.dtype) -> list[Tensor]:
        return [v.to(kind).detach().requires_grad_(True) for v in values]

    def run(kind: torch.dtype, ours: bool) -> list[Tensor]:
        given = leaves(kind)
        x, weight = given[0], given[-1]
        residual = given[1] if add else None
        if not ours:
            outputs = formula(x, residual, weight, centered)
        elif residual is None:
            outputs = [rms_norm.rms_norm(x, weight, EPS, zero_centered=centered)]
        else:
            outputs = list(rms_norm.add_rms_norm(x, residual, weight, EPS, zero_centered=centered))
        return differentiated(outputs[: len(above)], given, above)

    for mine, plain, true in zip(
        run(dtype, True), run(dtype, False), run(torch.float64, False), strict=True
    ):
        accurate(mine, plain, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(63, 1), (1, 63), (63, 257), (5, 2000), (2, 3, 4, 128)])
def test_values_and_gradients_are_accurate(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    way: str,
    device: torch.device,
    accurate: Accurate,
) -> None:
    check(accurate, shape, dtype, device)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_options_are_accurate(
    add: bool, centered: bool, way: str, device: torch.device, accurate: Accurate
) -> None:
    check(accurate, (17, 96), torch.float16, device, add=add, centered=centered)


def test_widest_rows_are_accurate(
    triton_on: None, device: torch.device, accurate: Accurate
) -> None:
    check(accurate, (2, rms_norm_triton.MAX_WIDTH), torch.float32, device)


def test_wider_rows_are_refused(triton_on: None, device: torch.device) -> None:
    wide = torch.ones(1, rms_norm_triton.MAX_WIDTH + 1, device=device)
    with pytest.raises(ValueError, match="H <= 16384"):
        rms_norm.rms_norm_forward(wide, wide[0], EPS)


@pytest.mark.parametrize("heads", [1, 3, 32])
def test_strided_heads_give_what_contiguous_ones_give(
    heads: int, way: str, device: torch.device
) -> None:
    matrix = torch.randn(7, 2 * heads * 64 + 24, device=device)
    x = matrix[:, : heads * 64].unflatten(1, (heads, 64))
    dy = matrix[:, heads * 64 : 2 * heads * 64].unflatten(1, (heads, 64))
    weight = torch.randn(64, device=device)
    y, rstd = rms_norm.rms_norm_forward(x, weight, EPS)
    want, want_rstd = rms_norm.rms_norm_forward(x.contiguous(), weight, EPS)
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd, want_rstd, rtol=1e-6, atol=1e-6)
    dx, dw = rms_norm.rms_norm_backward(dy, x, weight, rstd, need_dweight=True)
    want_dx, want_dw = rms_norm.rms_norm_backward(
        dy.contiguous(), x.contiguous(), weight, rstd, need_dweight=True
    )
    torch.testing.assert_close(dx, want_dx, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, want_dw, rtol=1e-5, atol=1e-5)


def test_dx_may_be_written_over_strided_dy(way: str, device: torch.device) -> None:
    matrix = torch.randn(9, 5 * 32, device=device)
    dy = matrix[:, 32:128].unflatten(1, (3, 32))
    around = matrix[:, [*range(32), *range(128, 160)]].clone()
    x, weight = torch.randn(9, 3, 32, device=device), torch.randn(32, device=device)
    _, rstd = rms_norm.rms_norm_forward(x, weight, EPS)
    want, _ = rms_norm.rms_norm_backward(dy.clone(), x, weight, rstd)
    got, _ = rms_norm.rms_norm_backward(dy, x, weight, rstd, out=dy)
    assert got.data_ptr() == dy.data_ptr()
    torch.testing.assert_close(dy, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(matrix[:, [*range(32), *range(128, 160)]], around)


def wider(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A matrix of NaN with 16 spare columns, and its first `width` columns."""
    matrix = torch.full((rows, width + 16), torch.nan, dtype=dtype, device=device)
    return matrix, matrix[:, :width]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 63), (63, 257), (5, 2000)])
@pytest.mark.parametrize("add", [False, True])
def test_a_norm_is_written_into_columns_of_a_wider_matrix(
    shape: tuple[int, int],
    dtype: torch.dtype,
    add: bool,
    way: str,
    device: torch.device,
    accurate: Accurate,
) -> None:
    x, r = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[1], device=device).to(dtype)
    plain = formula(x, r if add else None, weight, False)
    truth = formula(x.double(), r.double() if add else None, weight.double(), False)
    (matrix, out), (summed, total) = (wider(*shape, dtype, device) for _ in range(2))
    if add:
        y, given, _ = rms_norm.add_rms_norm_forward(x, r, weight, EPS, out=out, total=total)
        accurate(total, plain[1], truth[1])
        assert given.data_ptr() == total.data_ptr()
        assert summed[:, shape[1] :].isnan().all()
    else:
        y, _ = rms_norm.rms_norm_forward(x, weight, EPS, out=out)
    assert y.data_ptr() == out.data_ptr()
    accurate(out, plain[0], truth[0])
    assert matrix[:, shape[1] :].isnan().all()


@pytest.mark.parametrize("over", ["x", "residual"])
def test_the_sum_may_be_written_over_an_addend(over: str, way: str, device: torch.device) -> None:
    x, residual, weight = (torch.randn(size, device=device) for size in ((9, 257), (9, 257), 257))
    want = rms_norm.add_rms_norm_forward(x, residual, weight, EPS)
    total = x if over == "x" else residual
    got = rms_norm.add_rms_norm_forward(x, residual, weight, EPS, total=total)
    assert got[1].data_ptr() == total.data_ptr()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_residual_gradient_is_added_before_dx_is_rounded(
    dtype: torch.dtype, way: str, device: torch.device, accurate: Accurate
) -> None:
    x, dy, above = (torch.randn(63, 257, device=device).to(dtype) for _ in range(3))
    weight = torch.randn(257, device=device).to(dtype)

    def plain(kind: torch.dtype) -> Tensor:
        leaf = x.to(kind).detach().requires_grad_(True)
        outputs = formula(leaf, None, weight.to(kind), False)
        return torch.autograd.grad(outputs, leaf, [dy.to(kind), above.to(kind)])[0]

    _, rstd = rms_norm.rms_norm_forward(x, weight, EPS)
    for over in (None, dy, above):
        matrices = [wider(63, 257, dtype, device) for _ in range(2)]
        (_, gradient), (spare, residual) = matrices
        gradient.copy_(dy)
        residual.copy_(above)
        out = {id(dy): gradient, id(above): residual}.get(id(over))
        dx, _ = rms_norm.rms_norm_backward(gradient, x, weight, rstd, dresidual=residual, out=out)
        assert out is None or dx.data_ptr() == out.data_ptr()
        accurate(dx, plain(dtype), plain(torch.float64))
        assert spare[:, 257:].isnan().all()


def test_a_result_that_does_not_fit_is_refused(triton_on: None, device: torch.device) -> None:
    x, weight = torch.randn(4, 8, device=device), torch.ones(8, device=device)
    for out in (x[:3], x.half(), torch.empty(8, 4, device=device).T):
        with pytest.raises(ValueError, match="out is"):
            rms_norm.rms_norm_forward(x, weight, EPS, out=out)
    with pytest.raises(ValueError, match="total is"):
        rms_norm.add_rms_norm_forward(x, x, weight, EPS, total=x[:3])


def test_weight_gradient_of_many_rows_uses_every_row_once(
    way: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rms_norm_triton, "_DWEIGHT_PROGRAMS", 3)
    x = torch.ones(1000, 2, 8, device=device)
    weight = torch.ones(8, device=device)
    for view in (x, x.transpose(0, 1)):
        _, dweight = rms_norm.rms_norm_backward(
            view, view, weight, torch.ones(*view.shape[:-1], 1, device=device), need_dweight=True
        )
        assert dweight is not None
        assert dweight.tolist() == [2000.0] * 8


def test_nothing_is_computed_for_no_rows(way: str, device: torch.device) -> None:
    empty, weight = torch.ones(0, 4, device=device), torch.ones(4, device=device)
    y, rstd = rms_norm.rms_norm_forward(empty, weight, EPS)
    assert y.shape == (0, 4)
    assert rstd.shape == (0, 1)


def test_rows_beyond_two_to_the_31_are_reached(triton_on: None, device: torch.device) -> None:
    stride = 2**30 + 8
    # numpy's memory is not touched until it is written, so these 4 GiB cost three pages.
    memory = torch.from_numpy(np.empty(2 * stride + 64, dtype=np.float16)).to(device)
    x = memory.as_strided((3, 64), (stride, 1))
    x.copy_(torch.randn(3, 64))
    weight = torch.ones(64, device=device, dtype=torch.float16)
    y, rstd = rms_norm.rms_norm_forward(x, weight, EPS)
    want, _ = rms_norm.rms_norm_forward(x.clone(), weight, EPS)
    assert torch.equal(y, want)
    want, _ = rms_norm.rms_norm_backward(y, x.clone(), weight, rstd)
    got, _ = rms_norm.rms_norm_backward(y, x, weight, rstd)
    assert torch.equal(got, want)


@pytest.mark.parametrize("centered", [False, True])
def test_reference_passes_gradcheck(centered: bool) -> None:
    x, r = (torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: rms_norm.rms_norm(x, w, EPS, zero_centered=centered), (x, w)
    )
    assert torch.autograd.gradcheck(
        lambda x, r, w: rms_norm.add_rms_norm(x, r, w, EPS, zero_centered=centered), (x, r, w)
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("wide * wide, axis=1) * (1.0 / width)", "wide * wide, axis=1) * (1.0 / BLOCK)"),
        ("mean + eps", "mean"),
        ("dx = (wdy - xhat * mean) * rstd", "dx = wdy * rstd"),
        ("wdy = dy * factor", "wdy = dy"),
        ("return dy * xhat", "return dy"),
        (
            "tl.store(sum_ptr + start[:, None] + column, x,",
            "tl.store(sum_ptr + start[:, None] + column, r,",
        ),
        ("        dx += above", "        dx += 0 * above"),
        ("block = next_power_of_2(width)", "block = next_power_of_2(width) // 2"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_planted_fault_breaks_the_rule(
    old: str,
    new: str,
    triton_on: None,
    device: torch.device,
    accurate: Accurate,
    mutant: Mutant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rms_norm, "rms_norm_triton", mutant(rms_norm_triton, old, new))
    with pytest.raises(AssertionError):
        check(accurate, (5, 96), torch.float32, device, add=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("start = outer * y_outer + inner * y_inner", "start = outer * groups + inner * width"),
        ("start = outer * sum_outer + inner * sum_inner", "start = outer + inner * width"),
    ],
)
def test_a_planted_fault_of_pitch_breaks_the_rule(
    old: str,
    new: str,
    triton_on: None,
    device: torch.device,
    accurate: Accurate,
    mutant: Mutant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rms_norm, "rms_norm_triton", mutant(rms_norm_triton, old, new))
    with pytest.raises(AssertionError):
        test_a_norm_is_written_into_columns_of_a_wider_matrix(
            (5, 96), torch.float32, True, "triton", device, accurate
        )
