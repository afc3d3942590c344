"""The gated RMSNorm: values, rounding and gradients."""

import pytest
import torch
from torch import Tensor

from kernels.delta_net.gated_rms_norm import (
    gated_rms_norm,
    gated_rms_norm_backward,
    gated_rms_norm_forward,
)

EPS = 1e-6


def plain(o: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """As Hugging Face writes it: fp32 inside, rounded after the norm and at the end."""
    wide = torch.promote_types(o.dtype, torch.float32)
    hidden = o.to(wide)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + EPS)
    hidden = weight * hidden.to(o.dtype)
    return (hidden * torch.nn.functional.silu(z.to(wide))).to(o.dtype)


def case(dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, z, dy = (torch.randn(rows, 3, 16).to(dtype) for _ in range(3))
    return o, z, torch.randn(16).to(dtype), dy


@pytest.mark.parametrize("rows", [1, 63, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_as_accurate_as_plain_torch(dtype: torch.dtype, rows: int) -> None:
    o, z, weight, dy = case(dtype, rows)

    def with_gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (o, z, weight)]
        y = plain(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))

    y, rstd = gated_rms_norm_forward(o, z, weight, EPS)
    results = (y, *gated_rms_norm_backward(dy, o, z, weight, rstd, need_dweight=True))
    truths, theirs = with_gradients(torch.float64), with_gradients(dtype)
    for ours, truth, their in zip(results, truths, theirs, strict=True):
        assert ours is not None
        assert ours.dtype == dtype
        ulp = float(truth.abs().max()) * torch.finfo(dtype).eps
        error, allowed = (ours.double() - truth).abs().max(), (their.double() - truth).abs().max()
        assert float(error) <= 2 * float(allowed) + ulp


def test_rounds_where_hugging_face_rounds() -> None:
    o, z, weight, _ = case(torch.bfloat16, 64)
    y, _ = gated_rms_norm_forward(o, z, weight, EPS)
    assert torch.equal(y, plain(o, z, weight))


def test_gradcheck() -> None:
    leaves = [t.requires_grad_() for t in case(torch.float64, 2)[:3]]
    assert torch.autograd.gradcheck(gated_rms_norm, leaves)


def test_the_weight_gradient_is_only_formed_where_wanted() -> None:
    o, z, weight, dy = case(torch.float32, 2)
    _, rstd = gated_rms_norm_forward(o, z, weight, EPS)
    assert gated_rms_norm_backward(dy, o, z, weight, rstd)[2] is None
