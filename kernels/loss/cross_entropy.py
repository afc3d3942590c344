"""Cross-entropy of logits, with the gradient written over them.

For rows z (n, V) and targets y (n,):

    m_i = max_j z_ij,   s_i = sum_j exp(z_ij - m_i),   loss_i = log(s_i) + (m_i - z_i[y_i])
    dz_ij = scale * (exp(z_ij - m_i) / s_i - [j = y_i])

With label smoothing e the target is (1 - e) [j = y_i] + e / V (Szegedy et al. 2016, arXiv
1512.00567), and the z-loss c adds c L_i^2 of L_i = m_i + log(s_i) (Chowdhery et al. 2022, arXiv
2204.02311); a row may count w_i times:

    loss_i = w_i (L_i - (1 - e) z_i[y_i] - e mean_j z_ij + c L_i^2)
    dz_ij = scale w_i ((1 + 2 c L_i) exp(z_ij - m_i) / s_i - (1 - e) [j = y_i] - e / V)

Arithmetic is fp32 (fp64 for fp64) between load and store. The kernel gives a row to one program,
which reads it twice: once with a running maximum and sum (Milakov & Gimelshein 2018, arXiv
1805.02867), once to write the gradient. A target outside the vocabulary yields a NaN loss: nothing
here waits for the device to check it. The reference raises `ValueError` on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.runtime.dispatch import use_triton
from kernels.runtime.simulation import equal_parts
from kernels.runtime.triton_support import jit, launch, on_device, tl

_REFERENCE_ROWS = 16


@dataclass(frozen=True)
class LossTerms:
    """What a loss has beside cross-entropy: `label_smoothing` in [0, 1) and the factor `z_loss`."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0 or self.z_loss < 0.0:
            raise ValueError(
                f"label_smoothing must lie in [0, 1) and z_loss must not be negative, got "
                f"{self.label_smoothing} and {self.z_loss}"
            )

    def __bool__(self) -> bool:
        return self.label_smoothing > 0.0 or self.z_loss > 0.0


PLAIN = LossTerms()


def _cross_entropy_reference_(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    gradient: bool,
    weights: Tensor | None,
    terms: LossTerms,
) -> Tensor:
    """A few rows at a time, so that the passes over them stay in the processor's cache."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    for start in equal_parts(range(0, logits.shape[0], _REFERENCE_ROWS)):
        rows = slice(start, start + _REFERENCE_ROWS)
        z, target = logits[rows].to(dtype), targets[rows].unsqueeze(1)
        peak, picked = z.amax(1, keepdim=True), _target_logits(z, target)
        if terms or weights is not None:
            weight = torch.ones_like(peak) if weights is None else weights[rows].to(dtype)[:, None]
            losses[rows] = _with_terms_(z, target, (peak, picked), weight, scale, terms)
            if gradient:
                logits[rows] = z
            continue
        total = z.sub_(peak).exp_().sum(1, keepdim=True)
        losses[rows] = total.log().add_(peak - picked).squeeze(1)
        if gradient:
            z.mul_(scale / total).scatter_add_(1, target, torch.full_like(picked, -scale))
            if z.dtype != logits.dtype:
                logits[rows] = z
    return losses


def _with_terms_(
    z: Tensor,
    target: Tensor,
    known: tuple[Tensor, Tensor],
    weight: Tensor,
    scale: float,
    terms: LossTerms,
) -> Tensor:
    """The losses (n,) of rows z (n, V), which become their gradient.

    `known` are the largest logit of every row and its target's, both (n, 1), as is `weight`.
    """
    (peak, picked), smoothing, vocabulary = known, terms.label_smoothing, z.shape[1]
    mean = z.sub_(peak).mean(1, keepdim=True)
    total = z.exp_().sum(1, keepdim=True)
    log_total = total.log()
    level = log_total + peak
    losses = (1.0 - smoothing) * (log_total + (peak - picked)) + terms.z_loss * level * level
    if smoothing > 0.0:
        losses += smoothing * (log_total - mean)
    factor = scale * weight
    z.mul_(factor * (1.0 + 2.0 * terms.z_loss * level) / total)
    z.sub_(factor * (smoothing / vocabulary))
    z.scatter_add_(1, target, factor * (smoothing - 1.0))
    return (losses * weight).squeeze(1)


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
    weights_ptr,
    rows,
    vocabulary,
    logits_row,
    scale,
    smoothing,
    z_loss,
    GRADIENT: tl.constexpr,
    TERMS: tl.constexpr,
    WEIGHTED: tl.constexpr,
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
    summed = 0.0
    for start in range(0, vocabulary, BLOCK):
        inside = start + column < vocabulary
        z = tl.load(z_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        top = tl.maximum(peak, tl.max(z, axis=0))
        # A row may begin with logits that are all -inf, and -inf - -inf is not a number.
        base = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(z - base), axis=0)
        if TERMS:
            summed += tl.sum(tl.where(inside, z, 0.0), axis=0)
        peak = top
    loss = tl.log(total) + (peak - picked)
    level = tl.log(total) + peak
    if TERMS:
        # A mean of -inf logits is not multiplied by a smoothing of 0, which is no number.
        mean = tl.where(smoothing > 0.0, summed / vocabulary, 0.0)
        smoothed = smoothing * (tl.log(total) + (peak - mean))
        loss = (1.0 - smoothing) * loss + z_loss * level * level
        loss += tl.where(smoothing > 0.0, smoothed, 0.0)
    if WEIGHTED:
        weight = tl.load(weights_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
        loss *= weight
        scale *= weight
    tl.store(losses_ptr + row, loss, mask=row < rows)
    if GRADIENT:
        factor = scale / total
        floor = 0.0
        if TERMS:
            factor *= 1.0 + 2.0 * z_loss * level
            floor = scale * smoothing / vocabulary
            scale *= 1.0 - smoothing
        for start in range(0, vocabulary, BLOCK):
            inside = start + column < vocabulary
            z = tl.load(z_ptr + start + column, mask=inside, other=float("-inf"))
            dz = tl.exp(z.to(tl.float32) - peak) * factor
            dz -= tl.where(start + column == target, scale, 0.0)
            if TERMS:
                dz -= floor
            tl.store(z_ptr + start + column, dz.to(z.dtype), mask=inside)


def tile(vocabulary: int) -> tuple[int, int]:
    """Columns of one step of a program (a power of two) and its warps."""
    return (4096, 8) if vocabulary > 4096 else (1024, 4)


def _cross_entropy_triton_(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    gradient: bool,
    weights: Tensor | None,
    terms: LossTerms,
) -> Tensor:
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block, warps = tile(vocabulary)
    if rows:
        with on_device(logits):
            launch(cross_entropy_kernel, (rows,))(
                logits, targets, losses, losses if weights is None else weights,
                rows, vocabulary, logits.stride(0), scale, terms.label_smoothing, terms.z_loss,
                GRADIENT=gradient, TERMS=bool(terms), WEIGHTED=weights is not None,
                BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return losses


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    *,
    gradient: bool = True,
    weights: Tensor | None = None,
    terms: LossTerms = PLAIN,
) -> Tensor:
    """The loss of every row (n,), fp32 or wider; logits (n, V) become `scale` times its gradient.

    targets (n,) int64 in [0, V); weights (n,) fp32 multiply the losses. Without `gradient` the
    logits are scratch afterwards. Raises `ValueError` where the shapes do not fit or the logits of
    a row are not adjacent.
    """
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"{tuple(weights.shape)} weights for {tuple(targets.shape)} targets")
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or logits.stride(1) != 1:
        raise ValueError(
            f"logits {tuple(logits.shape)} with strides {logits.stride()} and targets "
            f"{tuple(targets.shape)} do not fit; expected (n, V) with adjacent columns, and (n,)"
        )
    targets = targets.contiguous()
    weights = None if weights is None else weights.contiguous()
    if use_triton(logits):
        return _cross_entropy_triton_(logits, targets, scale, gradient, weights, terms)
    return _cross_entropy_reference_(logits, targets, scale, gradient, weights, terms)
