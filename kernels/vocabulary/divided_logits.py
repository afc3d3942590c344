"""Logits of which each rank has its part of the vocabulary.

The tokens of all ranks are gathered a chunk at a time. Of the logits of its rows a rank makes for
every token the maximum m_r, s_r = sum_j exp(z_j - m_r), the target's logit where it has that, and
sum_j z_j; these are gathered and joined in the order of the ranks, so all have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear.int8 import Int8Weight
from kernels.loss.cross_entropy import LossTerms
from kernels.loss.linear_cross_entropy import Head, head_gradient, multiplies_into_fp32
from kernels.runtime.ranks import Ranks, gathered
from kernels.vocabulary.shard import VocabularyShard

_CPU_SLAB_BYTES = 1 << 20
_GPU_SLAB_BYTES = 1 << 26


@dataclass(frozen=True)
class TokensOfRanks:
    """Trained tokens of all ranks, padded to chunks of the same number.

    Targets and weights are (R, chunks, rows).
    """

    ranks: Ranks
    rows: int
    targets: Tensor
    weights: Tensor
    chunks: int

    @classmethod
    def of(
        cls, shard: VocabularyShard, targets: Tensor, weights: Tensor | None, rows: int
    ) -> TokensOfRanks:
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

    def of_chunk(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Targets and weights (R rows,) of a chunk."""
        return self.targets[:, chunk].reshape(-1), self.weights[:, chunk].reshape(-1)

    def padded(self, values: Tensor) -> Tensor:
        """Values (n,) of this rank's tokens as (chunks, rows); those of padding are 0."""
        every = values.new_zeros(self.chunks * self.rows)
        every[: values.shape[0]] = values
        return every.view(self.chunks, self.rows)

    def gathered(self, hidden: Tensor, chunk: int) -> Tensor:
        """The hidden states (N rows, H) of a chunk of every rank; padding is 0."""
        part = hidden[chunk * self.rows : (chunk + 1) * self.rows]
        if part.shape[0] < self.rows:
            padded = hidden.new_zeros(self.rows, hidden.shape[1])
            padded[: part.shape[0]] = part
            part = padded
        return gathered(self.ranks, part).flatten(0, 1)


@dataclass(frozen=True)
class KnownOfTokens:
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


def joined_logits(
    shard: VocabularyShard, logits: Tensor, targets: Tensor, weights: Tensor
) -> KnownOfTokens:
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
    return KnownOfTokens(*(x.unsqueeze(1) for x in known))


def become_gradient_(
    shard: VocabularyShard,
    logits: Tensor,
    targets: Tensor,
    levels: Tensor,
    weights: Tensor,
    terms: LossTerms,
) -> None:
    """Logits (n, V_r) become the gradient of weights (n, 1) times their loss; of levels (n, 1)."""
    wide, smoothing = levels.dtype, terms.label_smoothing
    local = (targets - shard.first).unsqueeze(1)
    here = (local >= 0) & (local < logits.shape[1])
    for start in range(0, logits.shape[0] if logits.shape[1] else 0, _slab_rows(logits)):
        rows = slice(start, start + _slab_rows(logits))
        level, weight = levels[rows], weights[rows]
        z = logits[rows].to(wide).sub_(level).exp_()
        z.mul_(weight * (1.0 + 2.0 * terms.z_loss * level))
        if smoothing > 0.0:
            z.sub_(weight * (smoothing / shard.vocab_size))
        taken = torch.where(here[rows], weight * (smoothing - 1.0), 0.0)
        z.scatter_add_(1, local[rows].clamp(0, z.shape[1] - 1), taken)
        logits[rows] = z


def hidden_gradient(dlogits: Tensor, head: Head, scale: float, wide: torch.dtype) -> Tensor:
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


def own_share(shard: VocabularyShard, partial: Tensor) -> Tensor:
    """This rank's rows (rows, H) of partial sums (N rows, H), added up over all ranks."""
    share = partial.new_empty(partial.shape[0] // shard.ranks.size, partial.shape[1])
    shard.ranks.reduce_scatter(share.view(-1), partial.view(-1)).wait()
    return share
