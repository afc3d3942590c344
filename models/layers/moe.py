"""The mixture of experts of a decoder block, with its backward pass.

    y = x1 + sum_i w_i expert_i(h) [+ sigmoid(s . h) shared(h)],   h = norm(x1)

`kernels.moe.experts` has the arithmetic. Every checkpointing policy saves the router's choice, so
that what backward recomputes cannot choose anew; "none" saves the experts' inner activations too.
In tiles of tokens (`models.layers.token_tiles`) nothing else is saved under any policy, and the
choice is made over all tokens: tiles divide it. Where experts are divided over processes, the
router and the shared expert are everywhere (`kernels.moe.expert_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.linear.adapters import Gradients
from kernels.linear.columns import Columns, matrix_of
from kernels.linear.projection import Projection
from kernels.moe.expert_rows import OwnRows
from kernels.moe.experts import (
    ExpertsSaved,
    MixtureOfExperts,
    SharedExpert,
    choose,
    moe_backward,
    moe_forward,
    moe_output,
)
from kernels.moe.router import load_balancing_loss
from kernels.runtime.ranks import Ranks
from models.config.model_config import ModelConfig
from models.layers.context import LayerContext
from models.layers.experts import Experts
from models.layers.linear import Linear, RMSNorm, RowGroups
from models.layers.mlp import MLP
from models.layers.packed_batch import PackedBatch
from models.layers.token_tiles import NormedTiles, TokenTile, backward_in_tiles, forward_in_tiles

Routed = list[tuple[Tensor, Tensor]]
"""Of every mixture its tokens per expert and its sums of probabilities, both (E,)."""


@dataclass
class MoESaved:
    """What backward reads of a mixture, and the gradient of its sum of probabilities, if any."""

    experts: ExpertsSaved
    d_prob_sum: Tensor | None = None

    def trim(self, policy: str) -> MoESaved:
        """Only what `policy` saves."""
        return self if policy == "none" else MoESaved(self.experts.trim())


class MoE(nn.Module):
    """Holds a router, its experts and, where the family has one, a gated shared expert."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        hidden, shared = config.hidden_size, config.shared_expert_intermediate_size
        self.index = index
        self.top_k, self.renormalise = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Linear(hidden, config.num_experts)
        self.experts = Experts(config.num_experts, hidden, config.moe_intermediate_size)
        self.shared_expert = MLP(hidden, shared, index) if shared else None
        self.shared_expert_gate = Linear(hidden, 1) if shared else None

    def output(self) -> tuple[Projection, ...]:
        """None: experts are products of their own."""
        return ()

    def same_input(self) -> tuple[tuple[Linear, ...], ...]:
        """Groups of projections that read the same input."""
        return () if self.shared_expert is None else self.shared_expert.same_input()

    def mixture(self, groups: RowGroups | None = None) -> MixtureOfExperts:
        """What `kernels.moe.experts` computes with; shares memory with this module."""
        shared = None
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            gate, up = self.shared_expert.gate_up(groups)
            down = self.shared_expert.down_proj.projection(groups)
            shared = SharedExpert(gate, up, down, self.shared_expert_gate.projection())
        return MixtureOfExperts(
            self.gate.projection(),
            self.experts.inner(groups),
            self.experts.down(groups),
            self.top_k,
            self.renormalise,
            shared,
            self.experts.share.ranks,
        )

    def forward(
        self, x: Tensor, addend: Tensor, norm: RMSNorm, context: LayerContext
    ) -> tuple[Tensor, MoESaved]:
        """x1 = x + addend (N, H) -> y (N, H) and all that backward could use; `addend` becomes x1.

        Adapters of experts are products of their own, so h needs no spare columns.
        """
        moe, seed = self.mixture(context.groups), context.seed(self.index, 2)
        tile_tokens = context.settings.mlp_tile_tokens
        drop = context.output_dropout(self.index, 1)
        h, x1 = matrix_of(norm.add_forward_for(x, addend, ())), addend
        if tile_tokens is None:
            y, experts = moe_forward(h, moe, seed)
            return drop(y).add_(x1), MoESaved(experts)
        if moe.ranks.size > 1:
            raise ValueError(
                "mlp_tile_tokens is set and experts are divided over processes, which then would "
                "exchange different numbers of tiles; leave one of them out"
            )
        routing = choose(h, moe)
        experts = ExpertsSaved.of(routing, OwnRows(routing)).trim()
        del h

        def forward(h: Tensor | Columns, tile: TokenTile) -> Tensor:
            routing = experts.routing.part(tile.tokens)
            y = moe_output(matrix_of(h), moe, OwnRows(routing), tile.seed(seed))[0]
            return drop.from_row(tile.tokens.start)(y)

        return forward_in_tiles(x1, NormedTiles(norm, tile_tokens), forward), MoESaved(experts)

    def backward(
        self,
        dy: Tensor | Columns,
        x1: Tensor,
        norm: RMSNorm,
        context: LayerContext,
        saved: MoESaved,
        grads: Gradients,
        mixer: tuple[Projection],
    ) -> Tensor | Columns:
        """dy (N, H) -> dx1 (N, H), with spare columns for `mixer` where its adapter joins products.

        Adds the gradient of every trainable parameter.
        """
        moe, seed = self.mixture(), context.seed(self.index, 2)
        tile_tokens = context.settings.mlp_tile_tokens
        experts, d_prob_sum, dy = saved.experts, saved.d_prob_sum, matrix_of(dy)
        drop = context.output_dropout(self.index, 1)
        if tile_tokens is None:
            h, rstd = norm.forward_with_rstd(x1)
            given = drop(dy)
            dh = moe_backward(given, h, moe, experts, grads, seed=seed, d_prob_sum=d_prob_sum)
            assert dh is not None
            return norm.backward_for(dh, x1, rstd, grads, dy, mixer)

        def backward(dy: Tensor, h: Tensor | Columns, tile: TokenTile, grads: Gradients) -> Tensor:
            part, own = experts.part(tile.tokens), tile.seed(seed)
            dy = drop.from_row(tile.tokens.start)(dy)
            dh = moe_backward(dy, matrix_of(h), moe, part, grads, seed=own, d_prob_sum=d_prob_sum)
            assert dh is not None
            return dh

        return backward_in_tiles(dy, x1, NormedTiles(norm, tile_tokens), backward, grads)


def balance_of(routed: Routed, batch: PackedBatch, ranks: Ranks) -> Tensor:
    """The router's balancing loss () of what the mixtures chose for a batch's tokens.

    Of a slice it is a part: the sum over `ranks` is that of the whole batch.
    """
    counts, prob_sums = zip(*routed, strict=True)
    if batch.slices is None:
        return load_balancing_loss(counts, prob_sums, batch.tokens)
    total = torch.stack(counts)
    ranks.all_reduce(total).wait()
    return load_balancing_loss(total.unbind(), prob_sums, batch.slices.tokens)
