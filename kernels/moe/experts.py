"""A mixture of SwiGLU experts, with an optional shared expert.

For each token x, with the k experts i and weights w_i that its router chose (`kernels.moe.router`):

    y = sum_i w_i down_i(silu(gate_i x) * up_i x)  [+ sigmoid(s . x) shared(x)]

The weight w scales the inner activation h, not the output of down: the two are equal as down is
linear, and then backward has dw = <down^T dy, h> without down's output. With a = down^T dy:

    dw = a . h,   dh = w a,   and from h to x as in SwiGLU and the grouped product

The shared expert's gate sigmoid(s . x) scales its inner activation alike, in
`kernels.linear.swiglu_mlp`. Source: Shazeer et al. 2017 (arXiv
1701.06538); the shared expert as in Qwen2-MoE (arXiv 2407.10671).

Experts may be divided over processes: `kernels.moe.expert_rows` brings rows to them and back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.elementwise.dropout import Seed
from kernels.elementwise.swiglu import swiglu_backward_, swiglu_forward
from kernels.linear.adapters import Gradients
from kernels.linear.lora import project
from kernels.linear.lora_backward import project_backward
from kernels.linear.projection import Projection
from kernels.linear.swiglu_mlp import (
    MLPActivations,
    SwiGLUMLP,
    mlp_backward,
    mlp_forward,
    mlp_inner,
)
from kernels.moe.expert_rows import ExpertRows, OwnRows, rows_of
from kernels.moe.grouped_matmul import ExpertProjection, grouped_project, grouped_project_backward
from kernels.moe.router import Routing, route, route_backward
from kernels.runtime.ranks import ONE_RANK, Ranks

SITES = 4
"""Consecutive dropout sites of one mixture: experts' and shared expert's two each."""


@dataclass(frozen=True)
class SharedExpert:
    """A SwiGLU expert that sees every token; `weight` (1, H), if any, gates its output."""

    gate: Projection
    up: Projection
    down: Projection
    weight: Projection | None = None

    def mlp(self, seed: Seed | None) -> SwiGLUMLP:
        seeds = (None, None) if seed is None else (seed.at(2), seed.at(3))
        return SwiGLUMLP(self.gate, self.up, self.down, seeds)

    def projections(self) -> list[Projection]:
        return [p for p in (self.gate, self.up, self.down, self.weight) if p is not None]


@dataclass(frozen=True)
class MixtureOfExperts:
    """The weights of one layer's mixture.

    `inner` is one projection (E, 2 I, H), rows of gate then of up, or a pair (E, I, H) of them;
    `down` is (E, H, I); `router` (E, H). `renormalise` divides the k weights by their sum. Where
    the experts are divided over `ranks`, `inner` and `down` are those of this one's.
    """

    router: Projection
    inner: tuple[ExpertProjection, ...]
    down: ExpertProjection
    top_k: int
    renormalise: bool
    shared: SharedExpert | None = None
    ranks: Ranks = ONE_RANK

    def trainable(self) -> list[Tensor]:
        """The tensors that want a gradient, in a fixed order."""
        shared = [] if self.shared is None else self.shared.projections()
        parts: list[Projection | ExpertProjection]
        parts = [self.router, *self.inner, self.down, *shared]
        return [tensor for part in parts for tensor in part.trainable()]


@dataclass(frozen=True)
class ExpertsSaved:
    """What backward reads besides x; once trimmed, the inner activations are computed again.

    `rows` are those of the choice that this process's experts compute. `counts` (E,) are rows per
    expert and `prob_sum` (E,) the sum of p over tokens, both fp32 or wider, for
    `load_balancing_loss`. Backward overwrites `inner` and `shared`.
    """

    routing: Routing
    counts: Tensor
    prob_sum: Tensor
    rows: ExpertRows
    inner: Tensor | None = None
    shared: MLPActivations | None = None

    @classmethod
    def of(
        cls,
        routing: Routing,
        rows: ExpertRows,
        inner: Tensor | None = None,
        shared: MLPActivations | None = None,
    ) -> ExpertsSaved:
        """With what is counted over all tokens of an untrimmed choice."""
        assert routing.probabilities is not None
        counts = routing.groups.offsets.diff().to(routing.weights.dtype)
        return cls(routing, counts, routing.probabilities.sum(0), rows, inner, shared)

    def part(self, tokens: slice) -> ExpertsSaved:
        """What backward reads of some consecutive tokens, trimmed; their experts are all here."""
        routing = self.routing.part(tokens)
        return ExpertsSaved(routing, self.counts, self.prob_sum, OwnRows(routing))

    def trim(self) -> ExpertsSaved:
        """Only the choice of experts, which backward must not make again."""
        routing = self.routing.trim()
        rows = replace(self.rows, routing=routing)
        return replace(self, routing=routing, rows=rows, inner=None, shared=None)


def _expert_seeds(seed: Seed | None, rows: ExpertRows) -> tuple[Seed | None, Seed | None]:
    """Of the rows' two projections."""
    return (None, None) if seed is None else (rows.seed(seed), rows.seed(seed.at(1)))


def moe_forward(
    x: Tensor, moe: MixtureOfExperts, seed: Seed | None = None
) -> tuple[Tensor, ExpertsSaved]:
    """y (N, H) for x (N, H). `seed` None means no dropout.

    With one its site and the next SITES - 1 are used.
    """
    routing = choose(x, moe)
    rows = rows_of(routing, moe.ranks)
    y, inner, shared = moe_output(x, moe, rows, seed)
    return y, ExpertsSaved.of(routing, rows, inner, shared)


def choose(x: Tensor, moe: MixtureOfExperts) -> Routing:
    """The router's choice for x (N, H)."""
    (logits,), _ = project(x, (moe.router,))
    return route(logits, moe.top_k, moe.renormalise)


def moe_output(
    x: Tensor, moe: MixtureOfExperts, rows: ExpertRows, seed: Seed | None = None
) -> tuple[Tensor, Tensor, MLPActivations | None]:
    """y (N, H) for x (N, H) by a choice that is made, and the inner activations to be saved."""
    groups, seeds = rows.groups, _expert_seeds(seed, rows)
    (given,) = rows.of(x)
    tokens = given.rows
    inner, _ = grouped_project(given, moe.inner, groups, seed=seeds[0], tokens=tokens)
    h = _halves_swiglu(inner).mul_(rows.weights.to(x.dtype))
    out, _ = grouped_project(h, (moe.down,), groups, seed=seeds[1], tokens=tokens)
    y = rows.routing.combine(rows.back(out))
    if moe.shared is None:
        return y, inner, None
    addend, saved = mlp_forward(x, moe.shared.mlp(seed), _strength(x, moe.shared))
    return y.add_(addend), inner, saved


def _halves(inner: Tensor) -> tuple[Tensor, Tensor]:
    half = inner.shape[1] // 2
    return inner[:, :half], inner[:, half:]


def _halves_swiglu(inner: Tensor) -> Tensor:
    gate, up = _halves(inner)
    return swiglu_forward(gate, up)


def _strength(x: Tensor, shared: SharedExpert) -> Tensor | None:
    """sigmoid(s . x) (N, 1), fp32 or wider, or None."""
    if shared.weight is None:
        return None
    (logit,), _ = project(x, (shared.weight,))
    return torch.sigmoid(logit.to(torch.promote_types(logit.dtype, torch.float32)))


def moe_backward(
    dy: Tensor,
    x: Tensor,
    moe: MixtureOfExperts,
    saved: ExpertsSaved,
    grads: Gradients,
    *,
    seed: Seed | None = None,
    d_prob_sum: Tensor | None = None,
    need_dx: bool = True,
) -> Tensor | None:
    """Adds every wanted parameter gradient to `grads` and returns dx (N, H), or None.

    `d_prob_sum` (E,) is the gradient of `saved.prob_sum`. Without `need_dx` the products that only
    dx reads are left out.
    """
    routing = saved.routing
    if routing.probabilities is None:
        (logits,), _ = project(x, (moe.router,))
        routing = routing.with_logits(logits)
    d_weights, dx = _experts_backward(dy, x, moe, saved, grads, seed, need_dx)
    d_logits = route_backward(d_weights, routing, moe.renormalise, d_prob_sum).to(x.dtype)
    d_router = project_backward((d_logits,), x, (moe.router,), grads, need_dx=need_dx)
    addends = [d_router]
    if moe.shared is not None:
        addends += _shared_backward(dy, x, moe.shared, saved.shared, grads, seed, need_dx)
    if dx is None:
        return None
    for addend in addends:
        if addend is not None:
            dx += addend
    return dx


def _experts_backward(
    dy: Tensor,
    x: Tensor,
    moe: MixtureOfExperts,
    saved: ExpertsSaved,
    grads: Gradients,
    seed: Seed | None,
    need_dx: bool,
) -> tuple[Tensor, Tensor | None]:
    """d_weights (N, k), fp32 or wider, and dx (N, H) of the experts."""
    rows, routing = saved.rows, saved.routing
    groups, weights, inner = rows.groups, rows.weights, saved.inner
    seeds = _expert_seeds(seed, rows)
    given, given_dy = rows.of(x, dy)
    if inner is None:
        inner, _ = grouped_project(given, moe.inner, groups, seed=seeds[0])
    h = _halves_swiglu(inner)
    adjoint = grouped_project_backward(
        given_dy, h * weights.to(h.dtype), (moe.down,), groups, grads, seed=seeds[1]
    )
    assert adjoint is not None
    d_rows = rows.back((adjoint.to(weights.dtype) * h).sum(1, keepdim=True))
    d_weights = torch.empty_like(d_rows[:, 0])
    d_weights[routing.order] = d_rows[:, 0]
    swiglu_backward_(adjoint.mul_(weights.to(adjoint.dtype)), *_halves(inner))
    dx = grouped_project_backward(
        inner, given, moe.inner, groups, grads, seed=seeds[0], need_dx=need_dx
    )
    combined = None if dx is None else routing.combine(rows.back(dx))
    return d_weights.view_as(routing.weights), combined


def _shared_backward(
    dy: Tensor,
    x: Tensor,
    shared: SharedExpert,
    saved: MLPActivations | None,
    grads: Gradients,
    seed: Seed | None,
    need_dx: bool,
) -> list[Tensor | None]:
    """The two addends of dx (N, H): through the shared expert and through its gate."""
    mlp = shared.mlp(seed)
    inner = saved or mlp_inner(x, mlp, strength=_strength(x, shared))
    dx, d_strength = mlp_backward(dy, x, mlp, inner, grads, need_dx=need_dx)
    strength = inner.strength
    if strength is None or d_strength is None or shared.weight is None:
        return [dx, None]
    d_logit = (d_strength * strength * (1 - strength)).to(x.dtype)
    return [dx, project_backward((d_logit,), x, (shared.weight,), grads, need_dx=need_dx)]


class _MixtureOfExperts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, moe: MixtureOfExperts, seed: Seed | None, *params: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, saved = moe_forward(x, moe, seed)
        ctx.save_for_backward(x, saved.inner)
        ctx.moe, ctx.seed, ctx.params = moe, seed, params
        ctx.routing, ctx.rows = saved.routing, saved.rows
        ctx.mark_non_differentiable(saved.counts)
        return y, saved.counts, saved.prob_sum

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[no-untyped-def]
        ctx, dy: Tensor, d_counts: Tensor, d_prob_sum: Tensor
    ):
        x, inner = ctx.saved_tensors
        grads: Gradients = {}
        dx = moe_backward(
            dy,
            x,
            ctx.moe,
            ExpertsSaved(ctx.routing, d_counts, d_prob_sum, ctx.rows, inner.clone()),
            grads,
            seed=ctx.seed,
            d_prob_sum=d_prob_sum,
            need_dx=ctx.needs_input_grad[0],
        )
        return dx, None, None, *(grads.get(id(p)) for p in ctx.params)


def mixture_of_experts(
    x: Tensor, moe: MixtureOfExperts, seed: Seed | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, H), counts (E,) and prob_sum (E,) of x (N, H), with all gradients.

    The last two are what `load_balancing_loss` takes.
    """
    outputs: tuple[Tensor, Tensor, Tensor] = _MixtureOfExperts.apply(x, moe, seed, *moe.trainable())
    return outputs
