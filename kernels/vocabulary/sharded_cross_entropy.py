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

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.loss.cross_entropy import PLAIN, LossTerms
from kernels.loss.linear_cross_entropy import (
    Head,
    add_outer_,
    chunk_tokens,
    dense_head,
    head_logits,
    logits_buffer,
)
from kernels.runtime.ranks import gathered
from kernels.vocabulary.divided_logits import (
    TokensOfRanks,
    become_gradient_,
    hidden_gradient,
    joined_logits,
    own_share,
)
from kernels.vocabulary.shard import VocabularyShard


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Head,
        shard: VocabularyShard,
        tokens: TokensOfRanks,
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
            targets, weights = tokens.of_chunk(chunk)
            logits = head_logits(x, head, buffer) if len(buffer[0]) else buffer
            known = joined_logits(shard, logits, targets, weights)
            part = slice(chunk * size, min(own, (chunk + 1) * size))
            count = max(0, part.stop - part.start)
            if count:
                losses[part] = known.losses(terms)[rank * size : rank * size + count]
            if need_dhidden or need_dweight:
                become_gradient_(shard, logits, targets, known.level, known.weights, terms)
            if dhidden is not None:
                share = own_share(shard, hidden_gradient(logits, head, scale, wide))
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
    tokens = TokensOfRanks.of(shard, targets, weights, rows)
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
