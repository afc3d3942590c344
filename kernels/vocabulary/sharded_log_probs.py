"""Log-probabilities of sequences over a vocabulary that is divided among ranks.

The maths are those of `kernels.loss.linear_preference`, the division that of
`kernels.vocabulary.sharded_cross_entropy`: with the normaliser L_i and the target's logit joined
from all ranks,

    l_i = z_i[y_i] - L_i,   dz_i = g_i (onehot(y_i) - exp(z_i - L_i)),   dh = sum_r dz_r W_r

where g_i, the gradient of the sequence of token i, is known on its own rank in backward alone. So
backward gathers these factors and, chunk by chunk, the hidden states once more, makes each chunk's
logits again, and sums dh by a reduce-scatter in fp32 or wider; dW_r = dz_r^T h has the tokens of
all ranks. The normalisers of all tokens are kept, so nothing is joined twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.loss.cross_entropy import PLAIN
from kernels.loss.linear_cross_entropy import (
    Head,
    add_outer_,
    chunk_tokens,
    dense_head,
    head_logits,
    logits_buffer,
)
from kernels.loss.linear_preference import check_sequences, sequence_sums
from kernels.runtime.ranks import gathered
from kernels.vocabulary.divided_logits import (
    TokensOfRanks,
    become_gradient_,
    hidden_gradient,
    joined_logits,
    own_share,
)
from kernels.vocabulary.shard import VocabularyShard


class _ShardedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Head,
        shard: VocabularyShard,
        tokens: TokensOfRanks,
        slots: Tensor,
        shape: tuple[int, int],
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        own, rank, size = hidden.shape[0], shard.ranks.rank, tokens.rows
        of_tokens = torch.zeros(own, dtype=wide, device=hidden.device)
        levels = torch.zeros(
            tokens.chunks, shard.ranks.size * size, dtype=wide, device=hidden.device
        )
        head = dense_head(weight, hidden)
        buffer = logits_buffer(shard.ranks.size * size, weight.shape[0], hidden)
        for chunk in range(tokens.chunks):
            x = tokens.gathered(hidden, chunk)
            targets, counted = tokens.of_chunk(chunk)
            logits = head_logits(x, head, buffer) if len(buffer[0]) else buffer
            known = joined_logits(shard, logits, targets, counted)
            levels[chunk] = known.level.squeeze(1)
            part = slice(chunk * size, min(own, (chunk + 1) * size))
            count = max(0, part.stop - part.start)
            if count:
                mine = slice(rank * size, rank * size + count)
                of_tokens[part] = (known.picked - known.level)[mine].squeeze(1)
        ctx.shard, ctx.tokens, ctx.shape = shard, tokens, shape
        ctx.save_for_backward(hidden, slots, levels, *([weight] if shard.trained else []))
        return sequence_sums(of_tokens, slots, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, slots, levels, *_ = ctx.saved_tensors
        need_dhidden, need_dweight = ctx.needs_input_grad[:2]
        shard, tokens = ctx.shard, ctx.tokens
        wide, own, size = levels.dtype, hidden.shape[0], tokens.rows
        factors = tokens.padded(grad.index_select(0, slots // max(1, ctx.shape[1])))
        every = gathered(shard.ranks, factors)
        dhidden = torch.empty_like(hidden) if need_dhidden else None
        dweight = (
            torch.zeros(shard.weight.shape, dtype=wide, device=hidden.device)
            if need_dweight
            else None
        )
        head = dense_head(shard.weight, hidden)
        buffer = logits_buffer(shard.ranks.size * size, shard.weight.shape[0], hidden)
        for chunk in range(tokens.chunks):
            x = tokens.gathered(hidden, chunk)
            targets, counted = tokens.of_chunk(chunk)
            logits = head_logits(x, head, buffer) if len(buffer[0]) else buffer
            level, factor = levels[chunk].unsqueeze(1), every[:, chunk].reshape(-1, 1)
            counted = counted.to(wide).unsqueeze(1)
            become_gradient_(shard, logits, targets, level, counted, PLAIN)
            if dhidden is not None:
                partial = hidden_gradient(logits, head, -1.0, wide).mul_(factor)
                share = own_share(shard, partial)
                part = slice(min(own, chunk * size), min(own, (chunk + 1) * size))
                dhidden[part] = share[: part.stop - part.start]
            if dweight is not None and len(dweight):
                # The factor goes to the smaller operand: fp16 could lose it in the logits.
                add_outer_(dweight, logits, (x.to(wide) * factor).to(x.dtype), -1.0)
        if dweight is not None:
            dweight = dweight.to(shard.weight.dtype)
        return dhidden, dweight, *(None,) * 4


def sharded_log_probs(
    hidden: Tensor,
    shard: VocabularyShard,
    targets: Tensor,
    slots: Tensor,
    shape: tuple[int, int],
    tokens_per_chunk: int | None = None,
) -> Tensor:
    """`sequence_log_probs` with the rows of the head divided among ranks.

    hidden (n, H), targets (n,) and slots (n,) are of this rank's tokens, of which it may have none,
    and so are the sequences (S,). All ranks call it together, and run backward together or not at
    all; a trained head gets its gradient of all ranks' tokens. Each rank adds `tokens_per_chunk` to
    a chunk. A target outside the vocabulary makes its sequence NaN.
    """
    weight = shard.weight
    check_sequences(hidden, weight, targets, slots)
    gpu = hidden.is_cuda
    rows = tokens_per_chunk or chunk_tokens(shard.vocab_size, hidden.itemsize, gpu=gpu)
    tokens = TokensOfRanks.of(shard, targets, None, rows)
    result: Tensor = _ShardedLogProbs.apply(hidden, weight, shard, tokens, slots, shape)
    return result
