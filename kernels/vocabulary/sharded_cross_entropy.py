"""Output head and cross-entropy over a vocabulary that is divided among ranks.

Each rank has its own trained tokens and its own rows of the head. The tokens of all ranks are
gathered a chunk at a time; every rank makes the logits of all of them for its part of the
vocabulary, and from these, for every token,

    m_r = max_j z_j,   s_r = sum_j exp(z_j - m_r),   p_r = z_y if y is here, else 0,   sum_j z_j

These four numbers are gathered and joined in the order of the ranks: m = max m_r,
s = sum_r s_r exp(m_r - m), so all ranks have the same bits of loss and normaliser. The loss and the
gradient dz are those of `kernels.loss.cross_entropy`, each rank's in the memory of its logits;
dh = sum_r dz_r W_r is summed by a reduce-scatter in fp32 or wider, and dW_r = dz_r^T h needs no
sum: it has the tokens of all ranks. The full logits never exist, nor do those of more tokens than
one chunk of an undivided head has. Source: Shoeybi et al. 2019 (Megatron-LM, arXiv 1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.linear.int8 import Int8Weight
from kernels.loss.cross_entropy import PLAIN, LossTerms
from kernels.loss.linear_cross_entropy import (
    Head,
    add_outer_,
    chunk_tokens,
    dense_head,
    head_gradient,
    head_logits,
    logits_buffer,
    multiplies_into_fp32,
)
from kernels.runtime.ranks import Ranks, gathered
from kernels.vocabulary.shard import VocabularyShard

_CPU_SLAB_BYTES = 1 << 20
_GPU_SLAB_BYTES = 1 << 26


@dataclass(frozen=True)
class _Tokens:
    """Trained tokens of all ranks, padded to chunks of the same number: all are (N, m)."""

    ranks: Ranks
    rows: int
    targets: Tensor
    weights: Tensor
    chunks: int

    @classmethod
    def of(
        cls, shard: VocabularyShard, targets: Tensor, weights: Tensor | None, rows: int
    ) -> _Tokens:
        """Gather targets and weights; those of padding are 0. The host waits for their number."""
        ranks, own = shard.ranks, targets.shape[0]
        most = torch.tensor([own], dtype=torch.int64, device=targets.device)
        ranks.maximum(most).wait()
        longest = int(most)
        rows = max(1, min(rows, longest))
        chunks = -(-longest // rows)
        wide = (
            torch.float32 if weights is None else torch.promote_types(weights.dtype, torch.float32)
        )
        both = (
            targets.new_zeros(chunks * rows),
            torch.zeros(chunks * rows, dtype=wide, device=targets.device),
        )
        both[0][:own] = targets
        both[1][:own] = 1.0 if weights is None else weights
        every, weighed = (gathered(ranks, x.view(chunks, rows)) for x in both)
        return cls(ranks, rows, every, weighed, chunks)

    def gathered(self, hidden: Tensor, chunk: int) -> Tensor:
        """The hidden states (N rows, H) of a chunk of every rank; padding is 0."""
        part = hidden[chunk * self.rows : (chunk + 1) * self.rows]
        if part.shape[0] < self.rows:
            padded = hidden.new_zeros(self.rows, hidden.shape[1])
            padded[: part.shape[0]] = part
            part = padded
        return gathered(self.ranks, part).flatten(0, 1)


@dataclass(frozen=True)
class _Known:
    """What all ranks know of every token of a chunk, all (n, 1) in fp32 or wider.

    `level` is the logarithm of the normaliser, `weights` count each token.
    """

    level: Tensor
    picked: Tensor
    mean: Tensor
    weights: Tensor

    def losses(self, terms: LossTerms) -> Tensor:
        """The loss of every token (n,)."""
        smoothing, level = terms.label_smoothing, self.level
        result = (1.0 - smoothing) * (level - self.picked) + terms.z_loss * level * level
        if smoothing > 0.0:
            result = result + smoothing * (level - self.mean)
        return (result * self.weights).squeeze(1)


def _slab_rows(logits: Tensor) -> int:
    """Rows of logits that are read in fp32 at a time."""
    most = _GPU_SLAB_BYTES if logits.is_cuda else _CPU_SLAB_BYTES
    return max(16, most // (4 * max(1, logits.shape[1])))


def _joined(shard: VocabularyShard, logits: Tensor, targets: Tensor, weights: Tensor) -> _Known:
    """Join what the ranks know of the logits (n, V_r) of the same tokens."""
    wide, count = torch.promote_types(logits.dtype, torch.float32), logits.shape[0]
    own = torch.zeros(4, count, dtype=wide, device=logits.device)
    own[0] = -torch.inf
    local = targets - shard.first
    here = (local >= 0) & (local < logits.shape[1])
    for start in range(0, count if logits.shape[1] else 0, _slab_rows(logits)):
        rows = slice(start, start + _slab_rows(logits))
        z = logits[rows].to(wide)
        own[0, rows] = z.amax(1)
        own[3, rows] = z.sum(1)
        index = local[rows].clamp(0, z.shape[1] - 1).unsqueeze(1)
        own[2, rows] = torch.where(here[rows], z.gather(1, index).squeeze(1), 0.0)
        own[1, rows] = (z - own[0, rows].unsqueeze(1)).exp_().sum(1)
    peaks, totals, picked, sums = gathered(shard.ranks, own).unbind(1)
    peak = peaks.amax(0)
    total = (totals * (peaks - peak).exp()).sum(0)
    outside = (targets < 0) | (targets >= shard.vocab_size)
    target = torch.where(outside, torch.nan, picked.sum(0))
    level = peak + total.log()
    known = (level, target, sums.sum(0) / shard.vocab_size, weights.to(wide))
    return _Known(*(x.unsqueeze(1) for x in known))


def _become_gradient_(
    shard: VocabularyShard, logits: Tensor, targets: Tensor, known: _Known, terms: LossTerms
) -> None:
    """Logits (n, V_r) become their gradient."""
    wide, smoothing = known.level.dtype, terms.label_smoothing
    local = (targets - shard.first).unsqueeze(1)
    here = (local >= 0) & (local < logits.shape[1])
    for start in range(0, logits.shape[0] if logits.shape[1] else 0, _slab_rows(logits)):
        rows = slice(start, start + _slab_rows(logits))
        level, weight = known.level[rows], known.weights[rows]
        z = logits[rows].to(wide).sub_(level).exp_()
        z.mul_(weight * (1.0 + 2.0 * terms.z_loss * level))
        if smoothing > 0.0:
            z.sub_(weight * (smoothing / shard.vocab_size))
        taken = torch.where(here[rows], weight * (smoothing - 1.0), 0.0)
        z.scatter_add_(1, local[rows].clamp(0, z.shape[1] - 1), taken)
        logits[rows] = z


def _hidden_gradient(dlogits: Tensor, head: Head, scale: float, wide: torch.dtype) -> Tensor:
    """scale * dlogits (n, V_r) times the head (V_r, H), in `wide`."""
    count, width = dlogits.shape[0], head.shape[1]
    if dlogits.shape[1] == 0:
        return torch.zeros(count, width, dtype=wide, device=dlogits.device)
    out = torch.empty(count, width, dtype=wide, device=dlogits.device)
    if isinstance(head, Int8Weight) or head.dtype == wide:
        head_gradient(dlogits, head, scale, out)
    elif multiplies_into_fp32(dlogits.device, dlogits.dtype):
        torch.ops.aten.addmm.dtype_out(
            out, dlogits, head, torch.float32, beta=0, alpha=scale, out=out
        )
    else:
        narrow = torch.empty(count, width, dtype=dlogits.dtype, device=dlogits.device)
        head_gradient(dlogits, head, scale, narrow)
        out.copy_(narrow)
    return out


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Head,
        shard: VocabularyShard,
        tokens: _Tokens,
        terms: LossTerms,
        scale: float,
    ) -> Tensor:
        need_dhidden, need_dweight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        own, rank, size = hidden.shape[0], shard.ranks.rank, tokens.rows
        losses = torch.zeros(own, dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if need_dhidden else None
        dweight = (
            torch.zeros(weight.shape, dtype=wide, device=hidden.device) if need_dweight else None
        )
        head = dense_head(weight, hidden)
        buffer = logits_buffer(shard.ranks.size * size, weight.shape[0], hidden)
        for chunk in range(tokens.chunks):
            x = tokens.gathered(hidden, chunk)
            targets = tokens.targets[:, chunk].reshape(-1)
            logits = head_logits(x, head, buffer) if len(buffer[0]) else buffer
            known = _joined(shard, logits, targets, tokens.weights[:, chunk].reshape(-1))
            part = slice(chunk * size, min(own, (chunk + 1) * size))
            count = max(0, part.stop - part.start)
            if count:
                losses[part] = known.losses(terms)[rank * size : rank * size + count]
            if need_dhidden or need_dweight:
                _become_gradient_(shard, logits, targets, known, terms)
            if dhidden is not None:
                share = torch.empty(size, hidden.shape[1], dtype=wide, device=hidden.device)
                partial = _hidden_gradient(logits, head, scale, wide)
                shard.ranks.reduce_scatter(share.view(-1), partial.view(-1)).wait()
                if count:
                    dhidden[part] = share[:count]
            if dweight is not None and len(dweight):
                add_outer_(dweight, logits, x, scale)
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return (losses.sum(dtype=torch.float64) * scale).to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = dhidden * dloss.to(dhidden.dtype)
        if dweight is not None:
            dweight = (dweight * dloss).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None


def sharded_cross_entropy(
    hidden: Tensor,
    shard: VocabularyShard,
    targets: Tensor,
    num_items: float,
    tokens_per_chunk: int | None = None,
    weights: Tensor | None = None,
    terms: LossTerms = PLAIN,
) -> Tensor:
    """`linear_cross_entropy` with the rows of the head divided among ranks.

    hidden (n, H), targets (n,) and weights (n,) are of this rank's tokens, of which it may have
    none; the result is the sum of their losses divided by `num_items`, which all ranks give alike,
    and all of them want gradients or none. Each rank adds `tokens_per_chunk` to a chunk, whose
    logits then take what those of that many tokens take of a whole head. A trained head gets its
    gradient of all ranks' tokens, for a backward pass that begins with the same number on every
    rank. A target outside the vocabulary makes the loss NaN.
    """
    weight = shard.weight
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1] or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets "
            f"{tuple(targets.shape)} do not fit; expected (n, H), (V_r, H), (n,)"
        )
    gpu = hidden.is_cuda
    rows = tokens_per_chunk or chunk_tokens(shard.vocab_size, hidden.itemsize, gpu=gpu)
    tokens = _Tokens.of(shard, targets, weights, rows)
    loss: Tensor = _ShardedCrossEntropy.apply(hidden, weight, shard, tokens, terms, 1.0 / num_items)
    return loss


def sharded_logits(hidden: Tensor, shard: VocabularyShard) -> Tensor:
    """Logits (n, V) of hidden states (n, H) that all ranks have alike; without gradients."""
    per_rank, weight = shard.per_rank, shard.weight
    with torch.no_grad():
        own = hidden.new_zeros(hidden.shape[0], per_rank)
        if weight.shape[0]:
            own[:, : weight.shape[0]] = head_logits(hidden, dense_head(weight, hidden))
        joined = gathered(shard.ranks, own).transpose(0, 1)
        return joined.reshape(hidden.shape[0], -1)[:, : shard.vocab_size]
