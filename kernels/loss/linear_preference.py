"""Output head and log-probabilities of whole sequences, never all logits.

For hidden states h (n, H) of trained tokens, a head W (V, H), targets y (n,), and s(i) the sequence
of token i:

    z = h W^T,   l_i = z_i[y_i] - logsumexp(z_i),   L_s = sum of l_i over the tokens with s(i) = s
    dz_i = g_s(i) * (onehot(y_i) - softmax(z_i)),   dh = dz W,   dW = dz^T h

for the gradient g = d loss / d L (S,) of any loss over sequences. That gradient is known only when
all of L is, yet it is a single factor per token: with a frozen head the forward pass forms
u_i = (onehot(y_i) - softmax(z_i)) W in the memory of the logits, one chunk of tokens at a time, and
backward multiplies row i by g_s(i), so nothing is recomputed. With a head that is trained, backward
makes each chunk's logits again, and the forward pass saves the hidden states alone.

`slots` says where token i stands in a padded (S, T) matrix, T the longest sequence's tokens: the
sums go over its rows, in an order that never changes. Sums are fp32 (fp64 for fp64), the logits'
passes those of `kernels.loss.cross_entropy`, as Triton kernels on a GPU. Source: the chunked form
follows `kernels.loss.linear_cross_entropy`; the sums are those of Rafailov et al. 2023, arXiv
2305.18290.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.loss.cross_entropy import cross_entropy_
from kernels.loss.linear_cross_entropy import (
    Head,
    add_outer_,
    chunk_tokens,
    chunks,
    dense_head,
    head_gradient,
    head_logits,
    logits_buffer,
)


def sequence_log_probs_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, slots: Tensor, shape: tuple[int, int]
) -> Tensor:
    """The log-probabilities (S,) by autograd over whole logits."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ weight.to(hidden.dtype).T).to(wide)
    of_tokens = logits.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return sequence_sums(of_tokens, slots, shape)


def sequence_sums(of_tokens: Tensor, slots: Tensor, shape: tuple[int, int]) -> Tensor:
    """of_tokens (n,) summed by sequence: (S,)."""
    padded = of_tokens.new_zeros(shape[0] * shape[1])
    return padded.index_copy(0, slots, of_tokens).view(shape).sum(1)


def _forward(
    hidden: Tensor, weight: Head, targets: Tensor, rows: int, need_dhidden: bool
) -> tuple[Tensor, Tensor | None]:
    """l (n,) in fp32 or wider, and u (n, H), the gradient of each l_i for its own hidden state."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    count = hidden.shape[0]
    losses = torch.empty(count, dtype=wide, device=hidden.device)
    directions = torch.empty_like(hidden) if need_dhidden else None
    head = dense_head(weight, hidden)
    buffer = logits_buffer(min(rows, count), weight.shape[0], hidden)
    for part in chunks(count, rows):
        logits = head_logits(hidden[part], head, buffer[: part.stop - part.start])
        losses[part] = cross_entropy_(logits, targets[part], gradient=need_dhidden)
        if directions is not None:
            head_gradient(logits, head, -1.0, directions[part])
    return losses.neg_(), directions


def _backward_both(
    hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, rows: int, need_dhidden: bool
) -> tuple[Tensor | None, Tensor]:
    """d hidden (n, H) and d weight (V, H) for factors (n,), from logits that are made again."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    count = hidden.shape[0]
    dhidden = torch.empty_like(hidden) if need_dhidden else None
    dweight = torch.zeros(weight.shape, dtype=wide, device=hidden.device)
    head = dense_head(weight, hidden)
    buffer = logits_buffer(min(rows, count), weight.shape[0], hidden)
    for part in chunks(count, rows):
        logits = head_logits(hidden[part], head, buffer[: part.stop - part.start])
        cross_entropy_(logits, targets[part])
        if dhidden is not None:
            head_gradient(logits, head, -1.0, dhidden[part])
            dhidden[part] *= factors[part].unsqueeze(1).to(dhidden.dtype)
        # The factor goes to the smaller operand, in fp32: fp16 could lose it in the logits.
        scaled = (hidden[part].to(wide) * factors[part].unsqueeze(1)).to(hidden.dtype)
        add_outer_(dweight, logits, scaled, -1.0)
    return dhidden, dweight.to(weight.dtype)


class _SequenceLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Head,
        targets: Tensor,
        slots: Tensor,
        shape: tuple[int, int],
        rows: int,
    ) -> Tensor:
        need_dhidden, need_dweight = ctx.needs_input_grad[:2]
        of_tokens, directions = _forward(
            hidden, weight, targets, rows, need_dhidden and not need_dweight
        )
        ctx.shape, ctx.rows = shape, rows
        if need_dweight:
            ctx.save_for_backward(slots, hidden, weight, targets)
        else:
            ctx.save_for_backward(slots, directions)
        return sequence_sums(of_tokens, slots, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        slots, *saved = ctx.saved_tensors
        factors = grad.index_select(0, slots // max(1, ctx.shape[1]))
        if len(saved) == 1:
            (directions,) = saved
            if directions is None:
                return (None,) * 6
            dhidden = torch.empty_like(directions)
            torch.mul(directions, factors.unsqueeze(1), out=dhidden)
            return dhidden, *(None,) * 5
        hidden, weight, targets = saved
        need_dhidden: bool = ctx.needs_input_grad[0]
        both = _backward_both(hidden, weight, targets, factors, ctx.rows, need_dhidden)
        return *both, *(None,) * 4


def check_sequences(hidden: Tensor, weight: Head, targets: Tensor, slots: Tensor) -> None:
    """Raises `ValueError` where these do not fit together (`sequence_log_probs`)."""
    if (
        hidden.dim() != 2
        or targets.shape != hidden.shape[:1]
        or slots.shape != targets.shape
        or weight.shape[1] != hidden.shape[1]
    ):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets "
            f"{tuple(targets.shape)}, slots {tuple(slots.shape)} do not fit; expected (n, H), "
            "(V, H), (n,), (n,)"
        )


def sequence_log_probs(
    hidden: Tensor,
    weight: Head,
    targets: Tensor,
    slots: Tensor,
    shape: tuple[int, int],
    tokens_per_chunk: int | None = None,
) -> Tensor:
    """log p of every sequence's trained tokens (S,), fp32 or wider, with gradients.

    hidden (n, H) and targets (n,) int64 are those of the trained tokens of all sequences; weight
    (V, H) is dense, or frozen in 8-bit rows. slots (n,) int64 are different places in a matrix of
    `shape` (S, T): row slots[i] // T is the sequence of token i. A sequence without tokens has 0.
    `tokens_per_chunk` is by default that of `linear_cross_entropy`.

    Raises `ValueError` for mismatching shapes and, in the reference on a CPU, for a target outside
    the vocabulary; on a GPU such a target makes its sequence's value NaN.
    """
    check_sequences(hidden, weight, targets, slots)
    rows = tokens_per_chunk or chunk_tokens(weight.shape[0], hidden.itemsize, gpu=hidden.is_cuda)
    result: Tensor = _SequenceLogProbs.apply(hidden, weight, targets, slots, shape, rows)
    return result
