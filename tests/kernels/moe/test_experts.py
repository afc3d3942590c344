"""The mixture of experts against a naive loop."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.elementwise.dropout import Seed
from kernels.linear.adapters import Gradients
from kernels.linear.projection import Projection
from kernels.moe.experts import (
    MixtureOfExperts,
    SharedExpert,
    mixture_of_experts,
    moe_backward,
    moe_forward,
)
from kernels.moe.grouped_matmul import ExpertProjection, expert_weight
from kernels.moe.router import load_balancing_loss, route, route_backward
from kernels.nf4 import dequantize, quantize

HIDDEN, INNER, COUNT, TOP, RANK = 12, 6, 5, 2, 2


def parameter(*shape: int) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) / math.sqrt(shape[-1])).requires_grad_()


def experts(out: int, size: int, adapter: bool) -> ExpertProjection:
    if not adapter:
        return ExpertProjection(parameter(COUNT, out, size))
    return ExpertProjection(
        parameter(COUNT, out, size),
        parameter(COUNT, RANK, size),
        parameter(COUNT, out, RANK),
        0.5,
    )


def linear(out: int, size: int, adapter: bool) -> Projection:
    if not adapter:
        return Projection(parameter(out, size))
    return Projection(
        parameter(out, size), None, parameter(RANK, size), parameter(out, RANK), scale=0.5
    )


def mixture(
    *, fused: bool = False, adapter: bool = True, shared: bool = True, renormalise: bool = True
) -> MixtureOfExperts:
    if fused:
        inner: tuple[ExpertProjection, ...] = (experts(2 * INNER, HIDDEN, adapter),)
    else:
        inner = (experts(INNER, HIDDEN, adapter), experts(INNER, HIDDEN, adapter))
    always = SharedExpert(
        linear(8, HIDDEN, adapter),
        linear(8, HIDDEN, adapter),
        linear(HIDDEN, 8, adapter),
        linear(1, HIDDEN, False),
    )
    return MixtureOfExperts(
        linear(COUNT, HIDDEN, False),
        inner,
        experts(HIDDEN, INNER, adapter),
        TOP,
        renormalise,
        always if shared else None,
    )


def apply(x: Tensor, p: Projection) -> Tensor:
    assert isinstance(p.weight, Tensor)
    y = x @ p.weight.T
    if p.lora_a is not None and p.lora_b is not None:
        y = y + p.scale * (x @ p.lora_a.T) @ p.lora_b.T
    return y


def apply_expert(x: Tensor, p: ExpertProjection, expert: int) -> Tensor:
    a, b = (None if t is None else t[expert] for t in (p.lora_a, p.lora_b))
    dense = expert_weight(p.weight, expert, x.dtype)
    return apply(x, Projection(dense, None, a, b, scale=p.scale))


def naive(x: Tensor, moe: MixtureOfExperts) -> tuple[Tensor, Tensor, Tensor]:
    """One token and one expert at a time: y, chosen experts (N, k), probabilities (N, E)."""
    probabilities = torch.softmax(apply(x, moe.router), -1)
    outs, chosen = [], []
    for row, p in zip(x, probabilities, strict=True):
        top = torch.topk(p, moe.top_k)
        weights = top.values / top.values.sum() if moe.renormalise else top.values
        y = torch.zeros_like(row)
        for weight, expert in zip(weights, top.indices.tolist(), strict=True):
            inner = torch.cat([apply_expert(row, part, expert) for part in moe.inner])
            gate, up = inner.chunk(2)
            y = y + weight * apply_expert(F.silu(gate) * up, moe.down, expert)
        if moe.shared is not None:
            s = moe.shared
            always = apply(F.silu(apply(row, s.gate)) * apply(row, s.up), s.down)
            strength = 1.0 if s.weight is None else torch.sigmoid(apply(row, s.weight))
            y = y + strength * always
        outs.append(y)
        chosen.append(top.indices)
    return torch.stack(outs), torch.stack(chosen), probabilities


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(("shared", "renormalise"), [(True, True), (False, True), (True, False)])
def test_equals_a_naive_loop_in_values_and_every_gradient(
    fused: bool, adapter: bool, shared: bool, renormalise: bool
) -> None:
    moe = mixture(fused=fused, adapter=adapter, shared=shared, renormalise=renormalise)
    x = parameter(9, HIDDEN)
    want, chosen, probabilities = naive(x, moe)
    y, counts, prob_sum = mixture_of_experts(x, moe)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(prob_sum, probabilities.sum(0))
    assert counts.tolist() == torch.bincount(chosen.flatten(), minlength=COUNT).tolist()
    dy, dp = torch.randn_like(y), torch.randn_like(prob_sum)
    leaves = [x, *moe.trainable()]
    wanted = torch.autograd.grad((want * dy).sum() + (probabilities * dp).sum(), leaves)
    outcome = torch.autograd.grad((y * dy).sum() + (prob_sum * dp).sum(), leaves)
    for ours, theirs in zip(outcome, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck() -> None:
    moe = mixture()
    x = parameter(3, HIDDEN)
    leaves = [x, *moe.trainable()]

    def run(*_: Tensor) -> tuple[Tensor, Tensor]:
        y, _counts, prob_sum = mixture_of_experts(x, moe)
        return y, prob_sum

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_what_is_trimmed_is_computed_again() -> None:
    moe, x, dy = mixture(), parameter(7, HIDDEN), torch.randn(7, HIDDEN, dtype=torch.float64)
    outcome = []
    for trim in (False, True):
        with torch.no_grad():
            _, saved = moe_forward(x, moe, seed=Seed(3))
            grads: Gradients = {}
            remaining = saved.trim() if trim else saved
            dx = moe_backward(dy, x, moe, remaining, grads, seed=Seed(3))
        assert dx is not None
        outcome.append([dx, *(grads[id(t)] for t in moe.trainable())])
    for one, two in zip(*outcome, strict=True):
        assert torch.equal(one, two)
    assert saved.trim().routing.probabilities is None
    assert saved.trim().inner is None


def test_parameter_gradients_do_not_depend_on_whether_dx_is_wanted() -> None:
    moe, x, dy = mixture(), parameter(7, HIDDEN), torch.randn(7, HIDDEN, dtype=torch.float64)
    outcome = []
    for need_dx in (True, False):
        with torch.no_grad():
            _, saved = moe_forward(x, moe)
            grads: Gradients = {}
            dx = moe_backward(dy, x, moe, saved, grads, need_dx=need_dx)
        assert (dx is not None) == need_dx
        outcome.append([grads[id(t)] for t in moe.trainable()])
    for one, two in zip(*outcome, strict=True):
        assert torch.equal(one, two)


def test_frozen_weights_get_no_gradient() -> None:
    moe, x = mixture(), parameter(4, HIDDEN)
    for part in (*moe.inner, moe.down):
        assert isinstance(part.weight, Tensor)
        part.weight.requires_grad_(False)
    moe.router.trainable()[0].requires_grad_(False)
    grads: Gradients = {}
    with torch.no_grad():
        y, saved = moe_forward(x, moe)
        moe_backward(torch.ones_like(y), x, moe, saved, grads)
    assert set(grads) == {id(t) for t in moe.trainable()}


def with_dropout(moe: MixtureOfExperts, p: float) -> MixtureOfExperts:
    assert moe.shared is not None
    return replace(
        moe,
        inner=tuple(replace(part, dropout=p) for part in moe.inner),
        down=replace(moe.down, dropout=p),
        shared=replace(moe.shared, down=replace(moe.shared.down, dropout=p)),
    )


def test_gradients_with_dropout_are_those_of_the_masked_forward_pass() -> None:
    moe, x = with_dropout(mixture(), 0.3), parameter(3, HIDDEN)
    leaves = [x, *moe.trainable()]
    assert torch.autograd.gradcheck(
        lambda *_: mixture_of_experts(x, moe, seed=Seed(11))[0], leaves, fast_mode=True
    )
    with torch.no_grad():
        first, again, other, plain = (
            mixture_of_experts(x, moe, seed=None if key is None else Seed(key))[0]
            for key in (11, 11, 12, None)
        )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, plain)


def test_experts_in_nf4_train_their_adapters() -> None:
    hidden, inner = 64, 64
    dense = mixture(shared=False)
    parts = []
    for out, size in ((inner, hidden), (inner, hidden), (hidden, inner)):
        quantized = quantize(torch.randn(COUNT, out, size) * size**-0.5)
        pair = torch.randn(COUNT, RANK, size) * 0.1, torch.randn(COUNT, out, RANK) * 0.1
        a, b = (t.requires_grad_() for t in pair)
        parts.append((quantized, a, b))
    router = Projection(torch.randn(COUNT, hidden) * 0.1)
    gate, up, down = (ExpertProjection(q, a, b, 0.5) for q, a, b in parts)
    moe = replace(dense, router=router, inner=(gate, up), down=down)
    gate, up, down = (ExpertProjection(dequantize(q), a, b, 0.5) for q, a, b in parts)
    decoded = replace(moe, inner=(gate, up), down=down)
    x = torch.randn(33, hidden).requires_grad_()
    leaves = [x, *(t for _, a, b in parts for t in (a, b))]
    results = []
    for one in (moe, decoded):
        y, _, _ = mixture_of_experts(x, one)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("renormalise", [False, True])
def test_router_gradient_equals_autograd(renormalise: bool) -> None:
    logits = parameter(6, COUNT)
    probabilities = torch.softmax(logits, -1)
    top = probabilities.topk(TOP)
    weights = top.values / top.values.sum(-1, keepdim=True) if renormalise else top.values
    dw, dp = torch.randn_like(weights), torch.randn(COUNT, dtype=torch.float64)
    loss = (weights * dw).sum() + (probabilities * dp).sum()
    (want,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        routing = route(logits, TOP, renormalise)
        outcome = route_backward(dw, routing, renormalise, dp)
    torch.testing.assert_close(routing.weights, weights)
    torch.testing.assert_close(outcome, want)


def test_sorted_rows_cover_every_chosen_pair_once() -> None:
    routing = route(torch.randn(50, COUNT), TOP, True)
    assert sorted(routing.order.tolist()) == list(range(50 * TOP))
    for expert, part in routing.groups.filled:
        tokens = routing.tokens[part]
        assert (routing.experts[tokens] == expert).any(1).all()
    rows = torch.randn(50 * TOP, 3)
    want = torch.zeros(50, 3).index_add_(0, routing.tokens, rows)
    torch.testing.assert_close(routing.combine(rows), want)


def test_router_weights_stay_fp32_for_half_precision_logits() -> None:
    routing = route(torch.randn(4, COUNT).bfloat16(), TOP, True)
    assert routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(4))


def test_asking_for_more_experts_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="6 experts a token asked of 5"):
        route(torch.randn(4, 5), 6, True)


def test_balancing_loss_pools_all_layers_before_the_product() -> None:
    layers, tokens = 3, 20
    logits = [parameter(tokens, COUNT) for _ in range(layers)]
    counts, sums = [], []
    for z in logits:
        routing = route(z, TOP, False)
        counts.append(routing.groups.offsets.diff().double())
        sums.append(torch.softmax(z, -1).sum(0))
    joined = torch.cat([torch.softmax(z, -1) for z in logits])
    hot = F.one_hot(joined.topk(TOP).indices, COUNT).double()
    want = COUNT * (hot.mean(0).sum(0) * joined.mean(0)).sum()
    outcome = load_balancing_loss(counts, sums, tokens)
    torch.testing.assert_close(outcome, want)
    for ours, theirs in zip(
        torch.autograd.grad(outcome, logits, retain_graph=True),
        torch.autograd.grad(want, logits),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_even_routing_has_a_balancing_loss_of_top_k() -> None:
    counts, sums = torch.full((4,), 10.0), torch.full((4,), 5.0)
    assert float(load_balancing_loss([counts], [sums], 20)) == pytest.approx(2.0)


def test_balancing_gradient_reaches_the_router_through_the_layer() -> None:
    moe, x = mixture(), parameter(8, HIDDEN)
    _, counts, prob_sum = mixture_of_experts(x, moe)
    (outcome,) = torch.autograd.grad(
        load_balancing_loss([counts], [prob_sum], 8), moe.router.trainable()
    )
    _, chosen, probabilities = naive(x, moe)
    share = torch.bincount(chosen.flatten(), minlength=COUNT) / 8
    loss = COUNT * (share * probabilities.mean(0)).sum()
    (want,) = torch.autograd.grad(loss, moe.router.trainable())
    torch.testing.assert_close(outcome, want)
