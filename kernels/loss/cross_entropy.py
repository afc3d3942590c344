"""Cross-entropy of logits, with the gradient written over them.

For rows z (n, V) and targets y (n,):

    m_i = max_j z_ij,   s_i = sum_j exp(z_ij - m_i),   loss_i = log(s_i) + (m_i - z_i[y_i])
    dz_ij = scale * (exp(z_ij - m_i) / s_i - [j = y_i])

Arithmetic is fp32 (fp64 for fp64) between load and store. The kernel gives a row to one program,
which reads it twice: once with a running maximum and sum (Milakov & Gimelshein 2018, arXiv
1805.02867), once to write the gradient. A target outside the vocabulary yields a NaN loss: nothing
here waits for the device to check it. The reference raises `ValueError` on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.runtime.dispatch import use_triton
from kernels.runtime.simulation import equal_parts
from kernels.runtime.triton_support import jit, launch, on_device, tl

_REFERENCE_ROWS = 16


def _cross_entropy_reference_(
    logits: Tensor, targets: Tensor, scale: float, gradient: bool
) -> Tensor:
    """A few rows at a time, so that the passes over them stay in the processor's cache."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    for start in equal_parts(range(0, logits.shape[0], _REFERENCE_ROWS)):
        rows = slice(start, start + _REFERENCE_ROWS)
        z, target = logits[rows].to(dtype), targets[rows].unsqueeze(1)
        peak, picked = z.amax(1, keepdim=True), _target_logits(z, target)
        total = z.sub_(peak).exp_().sum(1, keepdim=True)
        losses[rows] = total.log().add_(peak - picked).squeeze(1)
        if gradient:
            z.mul_(scale / total).scatter_add_(1, target, torch.full_like(picked, -scale))
            if z.dtype != logits.dtype:
                logits[rows] = z
    return losses


def _target_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """logits[i, targets[i]] (n, 1). On a CPU torch checks the indices as it reads."""
    try:
        return logits.gather(1, targets)
    except RuntimeError as error:
        raise ValueError(
            f"label {int(targets.max())} is outside a vocabulary of {logits.shape[1]}"
        ) from error


@jit
def cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    rows,
    vocabulary,
    logits_row,
    scale,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_ptr = logits_ptr + row * logits_row
    target = tl.load(targets_ptr + row, mask=row < rows, other=-1)
    known = (target >= 0) & (target < vocabulary)
    # Read before the loop, whose reductions are barriers: later warps overwrite this logit.
    picked = tl.load(z_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    column = tl.arange(0, BLOCK)
    peak = float("-inf")
    total = 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + column < vocabulary
        z = tl.load(z_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        top = tl.maximum(peak, tl.max(z, axis=0))
        # A row may begin with logits that are all -inf, and -inf - -inf is not a number.
        base = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(z - base), axis=0)
        peak = top
    tl.store(losses_ptr + row, tl.log(total) + (peak - picked), mask=row < rows)
    if GRADIENT:
        factor = scale / total
        for start in range(0, vocabulary, BLOCK):
            inside = start + column < vocabulary
            z = tl.load(z_ptr + start + column, mask=inside, other=float("-inf"))
            dz = tl.exp(z.to(tl.float32) - peak) * factor
            dz -= tl.where(start + column == target, scale, 0.0)
            tl.store(z_ptr + start + column, dz.to(z.dtype), mask=inside)


def tile(vocabulary: int) -> tuple[int, int]:
    """Columns of one step of a program (a power of two) and its warps."""
    return (4096, 8) if vocabulary > 4096 else (1024, 4)


def _cross_entropy_triton_(logits: Tensor, targets: Tensor, scale: float, gradient: bool) -> Tensor:
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block, warps = tile(vocabulary)
    if rows:
        with on_device(logits):
            launch(cross_entropy_kernel, (rows,))(
                logits, targets, losses, rows, vocabulary, logits.stride(0), scale,
                GRADIENT=gradient, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return losses


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: float = 1.0, *, gradient: bool = True
) -> Tensor:
    """The loss of every row (n,), fp32 or wider; logits (n, V) become `scale` times its gradient.

    targets (n,) int64 in [0, V). Without `gradient` the logits are scratch afterwards. Raises
    `ValueError` where the shapes do not fit or the logits of a row are not adjacent.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or logits.stride(1) != 1:
        raise ValueError(
            f"logits {tuple(logits.shape)} with strides {logits.stride()} and targets "
            f"{tuple(targets.shape)} do not fit; expected (n, V) with adjacent columns, and (n,)"
        )
    targets = targets.contiguous()
    if use_triton(logits):
        return _cross_entropy_triton_(logits, targets, scale, gradient)
    return _cross_entropy_reference_(logits, targets, scale, gradient)
