"""The Triton gated RMSNorm against float64 and the torch reference."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.delta_net import gated_rms_norm, gated_rms_norm_triton

EPS = 1e-6
Accurate = Callable[[Tensor, Tensor, Tensor], None]
Mutant = Callable[[ModuleType, str, str], ModuleType]

pytestmark = pytest.mark.usefixtures("triton_on")


def plain(o: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """As Hugging Face writes it: fp32 inside, rounded after the norm and at the end."""
    wide = torch.promote_types(o.dtype, torch.float32)
    hidden = o.to(wide)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    hidden = weight * hidden.to(o.dtype)
    return (hidden * F.silu(z.to(wide))).to(o.dtype)


def check(
    accurate: Accurate,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    scale: float = 1.0,
) -> None:
    o, z, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    o.mul_(scale)
    weight = torch.randn(shape[-1], device=device).to(dtype)

    def run(kind: torch.dtype, ours: bool) -> list[Tensor]:
        leaves = [t.to(kind).detach().requires_grad_(True) for t in (o, z, weight)]
        a, b, c = leaves
        y = gated_rms_norm.gated_rms_norm(a, b, c, EPS) if ours else plain(a, b, c)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(kind))]

    for mine, theirs, true in zip(
        run(dtype, True), run(dtype, False), run(torch.float64, False), strict=True
    ):
        assert mine.dtype == dtype
        accurate(mine, theirs, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 3, 16), (63, 3, 40), (257, 5), (7, 128), (2, 3, 4, 1)])
def test_values_and_gradients_are_accurate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, accurate: Accurate
) -> None:
    check(accurate, shape, dtype, device)


@pytest.mark.parametrize("heads", [17, 33])
def test_heads_that_fill_no_whole_tile_are_accurate(
    heads: int, device: torch.device, accurate: Accurate
) -> None:
    check(accurate, (3, heads, 128), torch.float32, device)


def test_small_rows_feel_eps(device: torch.device, accurate: Accurate) -> None:
    check(accurate, (5, 3, 24), torch.float32, device, scale=1e-3)


def test_widest_rows_are_accurate_and_wider_ones_refused(
    device: torch.device, accurate: Accurate
) -> None:
    width = gated_rms_norm_triton.MAX_WIDTH
    check(accurate, (2, 3, width), torch.float32, device)
    wide = torch.ones(1, width + 1, device=device)
    with pytest.raises(ValueError, match="V <= 1024"):
        gated_rms_norm.gated_rms_norm_forward(wide, wide, wide[0], EPS)


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    o, weight = torch.ones(4, 2, 8, device=device), torch.ones(8, device=device)
    _, rstd = gated_rms_norm.gated_rms_norm_forward(o, o, weight, EPS)
    with pytest.raises(ValueError, match="do not fit"):
        gated_rms_norm.gated_rms_norm_forward(o, o[:3], weight, EPS)
    with pytest.raises(ValueError, match="do not fit"):
        gated_rms_norm.gated_rms_norm_backward(o, o, o, weight[:7], rstd)
    with pytest.raises(ValueError, match="do not fit"):
        gated_rms_norm.gated_rms_norm_backward(o[:3], o, o, weight, rstd)


def test_the_kernel_is_what_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    o, weight = torch.ones(2, 3, 4, device=device), torch.ones(4, device=device)
    monkeypatch.setattr(gated_rms_norm_triton, "forward", lambda *given: "forward")
    monkeypatch.setattr(gated_rms_norm_triton, "backward", lambda *given: "backward")
    outcome: list[object] = [
        gated_rms_norm.gated_rms_norm_forward(o, o, weight, EPS),
        gated_rms_norm.gated_rms_norm_backward(o, o, o, weight, o[..., :1]),
    ]
    assert outcome == ["forward", "backward"]
    wide = o.double()
    assert gated_rms_norm.gated_rms_norm_forward(wide, wide, wide[0, 0], EPS)[0].dtype == wide.dtype


def test_rounds_where_the_reference_rounds(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding after the norm and after the weight decides the last bit of many elements."""
    o, z = (torch.randn(64, 3, 16, device=device).half() for _ in range(2))
    weight = torch.randn(16, device=device).half()
    y, _ = gated_rms_norm.gated_rms_norm_forward(o, z, weight, EPS)
    monkeypatch.setenv("ENGINE_REFERENCE", "1")
    want, _ = gated_rms_norm.gated_rms_norm_forward(o, z, weight, EPS)
    assert float((y != want).float().mean()) < 0.01


@pytest.mark.parametrize("heads", [1, 3, 32])
def test_column_blocks_give_what_contiguous_tensors_give(heads: int, device: torch.device) -> None:
    matrix = torch.randn(5, 3 * heads * 64 + 24, device=device)
    o, z, dy = (
        matrix[:, part * heads * 64 : (part + 1) * heads * 64].unflatten(1, (heads, 64))
        for part in range(3)
    )
    weight = torch.randn(64, device=device)
    y, rstd = gated_rms_norm.gated_rms_norm_forward(o, z, weight, EPS)
    outcome = gated_rms_norm.gated_rms_norm_backward(dy, o, z, weight, rstd, need_dweight=True)
    for apart in (torch.Tensor.contiguous, lambda x: x.mT.contiguous().mT):
        one, two, above = (apart(x) for x in (o, z, dy))
        want, want_rstd = gated_rms_norm.gated_rms_norm_forward(one, two, weight, EPS)
        wanted = gated_rms_norm.gated_rms_norm_backward(
            above, one, two, weight, want_rstd, need_dweight=True
        )
        for ours, theirs in zip((y, rstd, *outcome), (want, want_rstd, *wanted), strict=True):
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours, theirs)


def test_rows_do_not_feel_each_other(device: torch.device) -> None:
    o, z, dy = (torch.randn(4, 3, 20, device=device) for _ in range(3))
    weight = torch.randn(20, device=device)
    results = []
    for neighbour in (0.0, float("nan")):
        for x in (o, z, dy):
            x[1, 0], x[1, 2] = neighbour, neighbour
        y, rstd = gated_rms_norm.gated_rms_norm_forward(o, z, weight, EPS)
        do, dz, none = gated_rms_norm.gated_rms_norm_backward(dy, o, z, weight, rstd)
        assert none is None
        results.append([x[1, 1].clone() for x in (y, do, dz)])
    for clean, neighbour_nan in zip(*results, strict=True):
        assert torch.isfinite(clean).all()
        assert torch.equal(clean, neighbour_nan)


@pytest.mark.parametrize("programs", [1, 3, 1024])
def test_the_weight_gradient_uses_every_row_once(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_rms_norm_triton, "_DWEIGHT_PROGRAMS", programs)
    x, weight = torch.ones(100, 3, 8, device=device), torch.ones(8, device=device)
    # silu(z) is z itself where z is large.
    _, _, dweight = gated_rms_norm.gated_rms_norm_backward(
        x, x, 128 * x, weight, torch.ones(100, 3, 1, device=device), need_dweight=True
    )
    assert dweight is not None
    assert dweight.tolist() == [300.0 * 128] * 8


def test_nothing_is_computed_for_no_rows(device: torch.device) -> None:
    empty, weight = torch.ones(0, 2, 4, device=device), torch.ones(4, device=device)
    y, rstd = gated_rms_norm.gated_rms_norm_forward(empty, empty, weight, EPS)
    assert y.shape == (0, 2, 4)
    assert rstd.shape == (0, 2, 1)
    outcome = gated_rms_norm.gated_rms_norm_backward(
        empty, empty, empty, weight, rstd, need_dweight=True
    )
    assert outcome[0].shape == outcome[1].shape == (0, 2, 4)
    assert outcome[2] is not None
    assert not outcome[2].any()


def test_rows_beyond_two_to_the_31_are_reached(device: torch.device) -> None:
    stride = 2**30 + 8
    # numpy's memory is not touched until it is written, so these 4 GiB cost three pages.
    memory = torch.from_numpy(np.empty(2 * stride + 64, dtype=np.float16)).to(device)
    z = memory.as_strided((3, 1, 64), (stride, 64, 1))
    z.copy_(torch.randn(3, 1, 64))
    o, weight = torch.randn(3, 1, 64, device=device).half(), torch.ones(64, device=device).half()
    y, rstd = gated_rms_norm.gated_rms_norm_forward(o, z, weight, EPS)
    want, _ = gated_rms_norm.gated_rms_norm_forward(o, z.clone(), weight, EPS)
    assert torch.equal(y, want)
    got = gated_rms_norm.gated_rms_norm_backward(z, o, z, weight, rstd)
    wanted = gated_rms_norm.gated_rms_norm_backward(z.clone(), o, z.clone(), weight, rstd)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("wide * wide, axis=1) * (1.0 / width)", "wide * wide, axis=1) * (1.0 / BLOCK)"),
        ("mean + eps", "mean"),
        ("y = z / (1.0 + tl.exp(-z)) * normed", "y = z * normed"),
        ("(xhat * weight.to(dtype)", "(xhat * 0 + weight.to(dtype)"),
        ("z_ptr + start[:, None] + column", "z_ptr + row[:, None] * width"),
        ("dz = dy * (xhat * weight) * s", "dz = dy * xhat * s"),
        ("(1.0 + gate * (1.0 - s))", "1.0"),
        ("d_normed = dy * (gate * s)", "d_normed = dy * gate"),
        ("d_xhat = d_normed * weight", "d_xhat = d_normed"),
        ("do = (d_xhat - xhat * mean) * rstd", "do = d_xhat * rstd"),
        ("return d_normed * xhat", "return d_normed"),
        ("dweight += tl.sum(share, axis=0)", "dweight = tl.sum(share, axis=0)"),
        ("block = next_power_of_2(width)", "block = next_power_of_2(width) // 2"),
        ("tile // parts", "tile // (2 * parts)"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_planted_fault_breaks_the_rule(
    old: str,
    new: str,
    device: torch.device,
    accurate: Accurate,
    mutant: Mutant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = mutant(gated_rms_norm_triton, old, new)
    monkeypatch.setattr(changed, "_DWEIGHT_PROGRAMS", 2)
    monkeypatch.setattr(gated_rms_norm, "gated_rms_norm_triton", changed)
    with pytest.raises(AssertionError):
        check(accurate, (5, 3, 96), torch.float32, device, scale=1e-3)
