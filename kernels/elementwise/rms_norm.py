"""RMSNorm over the last dimension.

    rstd = 1 / sqrt(mean_j x_j^2 + eps),   x^ = x * rstd,   y = w * x^
    dx   = rstd * (w dy - x^ * mean_j(w_j dy_j x^_j)),   dw = sum over rows of dy * x^

Arithmetic is fp32 between load and store; x^ is rounded to the dtype of x before the product with
w, as Hugging Face's Llama and Qwen norms do. With `zero_centered` the factor is 1 + w and the
product is rounded once, as their Gemma and Qwen3-Next norms do. With a residual r the norm reads
x + r rounded to the dtype of x, and hands that sum out too: y = norm(x + r), s = x + r.
Source: Zhang & Sennrich 2019, arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.elementwise import rms_norm_triton
from kernels.elementwise.rms_norm_compiled import norm_gradient_rows, norm_rows
from kernels.runtime.dispatch import use_triton
from kernels.runtime.lanes import takes_lanes


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _factor(weight: Tensor, dtype: torch.dtype, zero_centered: bool) -> Tensor:
    return weight.to(dtype) + 1.0 if zero_centered else weight.to(dtype)


def _forward_reference(
    x: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    # The squares' memory becomes that of x^; a norm squared again would be two roundings worse.
    xhat = wide.square()
    rstd = xhat.mean(-1, keepdim=True).add_(eps).rsqrt_()
    torch.mul(wide, rstd, out=xhat)
    if zero_centered:
        return xhat.mul_(_factor(weight, wide.dtype, True)).to(x.dtype), rstd
    return xhat.to(x.dtype).mul_(weight.to(x.dtype)), rstd


def _backward_reference(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_dweight: bool,
    zero_centered: bool,
    dresidual: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One temporary of the size of x: it holds dy x, then dx."""
    wide, dy_wide = _wide(x), _wide(dy)
    factor = _factor(weight, wide.dtype, zero_centered)
    work = dy_wide * wide
    dweight = None
    if need_dweight:
        dweight = torch.mv(work.flatten(0, -2).T, rstd.flatten()).to(weight.dtype)
    mean = torch.matmul(work, factor).unsqueeze(-1).mul_(rstd.square()).div_(x.shape[-1])
    torch.mul(dy_wide, factor, out=work)
    work.addcmul_(wide, mean, value=-1).mul_(rstd)
    if dresidual is not None:
        work.add_(dresidual)
    return work.to(x.dtype), dweight


def rms_norm_forward(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    zero_centered: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (..., H), weight (H,) -> y (..., H) in the dtype of x, rstd (..., 1) in fp32 or wider.

    `out` receives y and may be x itself; its rows may be those of a wider matrix, whose other
    columns stay as they are. Raises `ValueError` on a GPU where H does not fit the weight or
    `rms_norm_triton.MAX_WIDTH`, or where `out` does not fit x.
    """
    if use_triton(x):
        y, _, rstd = rms_norm_triton.forward(x, None, weight, eps, zero_centered, out)
        return y, rstd
    if _in_lanes(zero_centered, x, out):
        return _forward_lanes(x, None, weight, eps, out)
    y, rstd = _forward_reference(x, weight, eps, zero_centered)
    return _into(out, y), rstd


def add_rms_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    zero_centered: bool = False,
    out: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x + residual), the sum itself (both (..., H), dtype of x), and rstd (..., 1).

    One launch: the sum is read from registers. `out` receives the norm and `total` the sum; `total`
    may be x or residual itself, and the rows of either may be those of a wider matrix. Raises
    `ValueError` as `rms_norm_forward` does.
    """
    if use_triton(x):
        return rms_norm_triton.forward(x, residual, weight, eps, zero_centered, out, total)
    if _in_lanes(zero_centered, x, residual, out, total):
        total = torch.empty_like(x) if total is None else total
        addend = x
        if total is not residual:
            total.copy_(residual)
        y, rstd = _forward_lanes(total, addend, weight, eps, out)
        return y, total, rstd
    if total is None:
        total = (x + residual).to(x.dtype)
    else:
        torch.add(x, residual, out=total)
    y, rstd = _forward_reference(total, weight, eps, zero_centered)
    return _into(out, y), total, rstd


def _in_lanes(zero_centered: bool, x: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled loop over rows serves these."""
    given = [other for other in others if other is not None]
    return not zero_centered and x.dim() == 2 and takes_lanes(x, *given)


def _forward_lanes(
    x: Tensor, addend: Tensor | None, weight: Tensor, eps: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """norm(x) and rstd; x becomes x + addend first, where there is one."""
    y = torch.empty_like(x) if out is None else out
    rstd = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    if not y.is_meta:
        norm_rows(x, addend, weight.detach().to(x.dtype).contiguous(), eps, y, rstd.view(-1))
    return y, rstd


def _into(out: Tensor | None, value: Tensor) -> Tensor:
    return value if out is None else out.copy_(value)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    need_dweight: bool = False,
    zero_centered: bool = False,
    dresidual: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients with respect to x (shape and dtype of x) and, if asked for, weight (H,).

    `dresidual` (..., H), the gradient that reaches x past the norm, is added to dx before it is
    rounded, in the same launch. `out` receives dx and may be dy or dresidual itself; the rows of
    any of them may be strided.
    """
    if use_triton(x):
        return rms_norm_triton.backward(
            dy, x, weight, rstd, need_dweight, zero_centered, dresidual, out
        )
    if not need_dweight and _in_lanes(zero_centered, x, dy, dresidual, out):
        dx = torch.empty_like(x) if out is None else out
        if not dx.is_meta:
            factor = weight.to(x.dtype).contiguous()
            norm_gradient_rows(dy, x, factor, rstd.flatten(), dresidual, dx)
        return dx, None
    dx, dweight = _backward_reference(dy, x, weight, rstd, need_dweight, zero_centered, dresidual)
    return _into(out, dx), dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, zero_centered: bool
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            y, rstd = rms_norm_forward(x, weight, eps, zero_centered=zero_centered)
            total = x
        else:
            y, total, rstd = add_rms_norm_forward(
                x, residual, weight, eps, zero_centered=zero_centered
            )
        ctx.save_for_backward(total, weight, rstd)
        ctx.zero_centered, ctx.added = zero_centered, residual is not None
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, dtotal: Tensor):  # type: ignore[no-untyped-def]
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(
            dy,
            total,
            weight,
            rstd,
            need_dweight=ctx.needs_input_grad[2],
            zero_centered=ctx.zero_centered,
            dresidual=dtotal if ctx.added else None,
        )
        return dx, dx if ctx.added else None, dweight, None, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, zero_centered: bool = False
) -> Tensor:
    """RMSNorm with gradients for x (..., H) and weight (H,); returns the dtype of x."""
    y: Tensor = _RMSNorm.apply(x, None, weight, eps, zero_centered)[0]
    return y


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """norm(x + residual) and x + residual, with gradients for all three tensors."""
    y, total = _RMSNorm.apply(x, residual, weight, eps, zero_centered)
    return y, total
