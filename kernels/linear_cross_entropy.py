"""Output head and cross-entropy in one op, in chunks: the logits never exist whole.

For trained rows h (n, H) and a head W (V, H), with y the target of each row:

    z = h W^T,   loss = sum_i (logsumexp(z_i) - z_i[y_i]) / num_items
    dz = (softmax(z) - onehot(y)) / num_items,   dh = dz W,   dW = dz^T h

The gradient is formed in the forward pass, in the memory of the logits, one chunk of rows at a
time, so a frozen head costs two matrix products a chunk and nothing is recomputed. Rows without a
target are dropped before the first product. Source: the chunked form follows Hsu et al. 2024
(Liger-Kernel, arXiv 2410.10989); the maths is the softmax's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DEFAULT_CHUNK_BYTES = 64 * 2**20


def chunk_rows(vocab_size: int, itemsize: int, budget: int = DEFAULT_CHUNK_BYTES) -> int:
    """Rows per chunk such that one chunk of logits stays within `budget` bytes."""
    return max(64, budget // (vocab_size * itemsize))


def _chunk_loss_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Sum of the chunk's losses; `logits` (n, V) becomes scale * (softmax - onehot)."""
    picked = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    lse = torch.logsumexp(logits, dim=-1)
    logits.sub_(lse.unsqueeze(1)).exp_()
    logits.scatter_add_(1, targets.unsqueeze(1), -torch.ones_like(picked).unsqueeze(1))
    logits.mul_(scale)
    return (lse - picked).sum()


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float,
    rows: int,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """loss (fp32 or wider scalar), d loss / d hidden (n, H), d loss / d weight (V, H)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    dhidden = torch.empty_like(hidden) if need_dhidden else None
    dweight = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if need_dweight else None
    head = weight if weight.dtype == hidden.dtype else weight.to(hidden.dtype)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, min(start + rows, hidden.shape[0]))
        logits = (hidden[part] @ head.T).to(wide)
        if not (need_dhidden or need_dweight):
            picked = logits.gather(1, targets[part].unsqueeze(1)).squeeze(1)
            loss += (torch.logsumexp(logits, dim=-1) - picked).sum()
            continue
        loss += _chunk_loss_(logits, targets[part], scale)
        dlogits = logits.to(hidden.dtype)
        if dhidden is not None:
            torch.mm(dlogits, head, out=dhidden[part])
        if dweight is not None:
            dweight.addmm_(dlogits.T.to(wide), hidden[part].to(wide))
    return loss * scale, dhidden, dweight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, num_items: float, rows: int
    ) -> Tensor:
        trained = torch.nonzero(labels >= 0).squeeze(1)
        chosen = hidden.index_select(0, trained)
        loss, dchosen, dweight = _forward(
            chosen,
            weight,
            labels.index_select(0, trained),
            1.0 / num_items,
            rows,
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1],
        )
        ctx.save_for_backward(trained, dchosen, dweight)
        ctx.shape, ctx.dtype, ctx.weight_dtype = hidden.shape, hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        trained, dchosen, dweight = ctx.saved_tensors
        dhidden = None
        if dchosen is not None:
            dhidden = torch.zeros(ctx.shape, dtype=ctx.dtype, device=dloss.device)
            dhidden.index_copy_(0, trained, dchosen * dloss.to(ctx.dtype))
        if dweight is not None:
            dweight = (dweight * dloss).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: float | None = None,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against `labels`, summed and divided by `num_items`.

    hidden (N, H); weight (V, H); labels (N,) int64, already shifted, negative where the row is not
    trained. `num_items` is the number of trained tokens of the whole accumulated batch; by default
    that of these rows. Returns a scalar in fp32 or wider; 0 where no row is trained.

    Raises `ValueError` for a label outside the vocabulary or mismatching shapes.
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1] or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels "
            f"{tuple(labels.shape)} do not fit; expected (N, H), (V, H), (N,)"
        )
    if not labels.is_cuda and labels.numel() and int(labels.max()) >= weight.shape[0]:
        raise ValueError(f"label {int(labels.max())} is outside a vocabulary of {weight.shape[0]}")
    if num_items is None:
        num_items = max(1, int((labels >= 0).sum()))
    rows = rows_per_chunk or chunk_rows(weight.shape[0], 4)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, num_items, rows)
    return loss
