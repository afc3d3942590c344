"""Top-k routing: expert ids, weights and their gradients.

With router logits z (E,) of a token and k experts chosen by the largest p:

    p = softmax(z),   w_i = p_i, or p_i / sum of the chosen p where the family renormalises
    dp_i = (dw_i - sum_j dw_j w_j) / sum of the chosen p  (or dw_i),   dz = p (dp - sum p dp)

The N k chosen pairs are sorted by expert, so that every expert sees its rows as one matrix.

The auxiliary loss of a model is E sum_e f_e P_e, f_e the share of rows sent to e (they sum to k)
and P_e the mean p_e, both over all tokens of all layers before the product; a layer's part of its
gradient comes back as the gradient of its `prob_sum`. Source: Shazeer et al. 2017 (arXiv
1701.06538); Fedus et al. 2021 (Switch Transformers, arXiv 2101.03961), equations 4 to 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.moe.grouped_matmul import Groups


@dataclass(frozen=True)
class Routing:
    """The choice of experts for N tokens.

    experts (N, k) and their weights (N, k) fp32 or wider; probabilities (N, E), None once trimmed.
    Sorted row m is the pair order[m] of the flat (N k), and `groups` its expert.
    """

    experts: Tensor
    weights: Tensor
    order: Tensor
    groups: Groups
    probabilities: Tensor | None

    def trim(self) -> Routing:
        """Without the probabilities, which `with_logits` gives back."""
        return replace(self, probabilities=None)

    def with_logits(self, logits: Tensor) -> Routing:
        """The same choice, with the probabilities of the same logits (N, E) computed again."""
        return replace(self, probabilities=_probabilities(logits))

    @property
    def tokens(self) -> Tensor:
        """The token (M,) of every sorted row."""
        return self.order // self.experts.shape[1]

    def part(self, tokens: slice) -> Routing:
        """The choice for some consecutive tokens, trimmed."""
        experts, weights = self.experts[tokens], self.weights[tokens]
        return _by_expert(experts, weights, self.groups.count, None)

    def sorted_weights(self) -> Tensor:
        """(M, 1)."""
        return self.weights.reshape(-1).index_select(0, self.order).unsqueeze(1)

    def combine(self, rows: Tensor) -> Tensor:
        """Sum of the k rows (M, H) of every token, (N, H); no atomic addition."""
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(back.shape[0], device=back.device)
        return rows.index_select(0, back).view(*self.experts.shape, rows.shape[1]).sum(1)


def _by_expert(
    experts: Tensor, weights: Tensor, count: int, probabilities: Tensor | None
) -> Routing:
    ordered, order = experts.reshape(-1).sort(stable=True)
    return Routing(experts, weights, order, Groups.from_sorted(ordered, count), probabilities)


def _probabilities(logits: Tensor) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits, -1, dtype=wide)


def route(logits: Tensor, top_k: int, renormalise: bool) -> Routing:
    """Choose `top_k` experts for every row of logits (N, E).

    Raises `ValueError` if there are fewer experts than that.
    """
    count = logits.shape[1]
    if not 1 <= top_k <= count:
        raise ValueError(f"{top_k} experts a token asked of {count}")
    probabilities = _probabilities(logits)
    weights, experts = probabilities.topk(top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return _by_expert(experts, weights, count, probabilities)


def route_backward(
    d_weights: Tensor, routing: Routing, renormalise: bool, d_prob_sum: Tensor | None = None
) -> Tensor:
    """dlogits (N, E), fp32 or wider, for d_weights (N, k) and, if any, d_prob_sum (E,)."""
    p = routing.probabilities
    assert p is not None
    if renormalise:
        total = p.gather(1, routing.experts).sum(-1, keepdim=True)
        inner = (d_weights * routing.weights).sum(-1, keepdim=True)
        d_weights = (d_weights - inner) / total
    dp = torch.zeros_like(p) if d_prob_sum is None else d_prob_sum.to(p.dtype).expand_as(p).clone()
    dp.scatter_add_(1, routing.experts, d_weights.to(p.dtype))
    return p * (dp - (p * dp).sum(-1, keepdim=True))


def load_balancing_loss(
    counts: Sequence[Tensor], prob_sums: Sequence[Tensor], tokens: int
) -> Tensor:
    """E sum_e f_e P_e over all layers, from each layer's counts and prob_sum (E,).

    `tokens` is the number of tokens, the same in every layer. Not yet scaled by the family's
    `router_aux_loss_coef`. Differentiable in `prob_sums`.
    """
    rows = tokens * len(counts)
    shares, means = torch.stack(list(counts)).sum(0), torch.stack(list(prob_sums)).sum(0)
    return (shares * means).sum() * (shares.shape[0] / rows**2)
