"""The gated delta rule: chunks against the recurrence, gradients, packed documents, steps."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.delta_net import (
    GatedDeltaInputs,
    GatedDeltaSaved,
    gated_delta,
    gated_delta_backward,
    gated_delta_forward,
    gated_delta_step,
    gates_backward,
    gates_forward,
    l2norm_backward,
    l2norm_forward,
)

LENGTHS = (1, 63, 64, 65, 257)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor

    def rows(self, first: int, last: int) -> "Inputs":
        return Inputs(*(t[first:last] for t in self))


def inputs(
    tokens: int, *, heads: int = 2, group: int = 2, key: int = 6, value: int = 5, decay: float = 0.3
) -> Inputs:
    """Random fp64 inputs; `decay` is the largest |g|."""
    values = heads * group
    return Inputs(
        torch.randn(tokens, heads, key, dtype=torch.float64),
        torch.randn(tokens, heads, key, dtype=torch.float64),
        torch.randn(tokens, values, value, dtype=torch.float64),
        -decay * torch.rand(tokens, values, dtype=torch.float64),
        torch.rand(tokens, values, dtype=torch.float64),
    )


def plan_of(*lengths: int) -> AttentionPlan:
    bounds = torch.tensor((0, *lengths)).cumsum(0)
    return AttentionPlan.from_cu_seqlens(bounds, int(bounds[-1]))


def recurrent(
    x: Inputs, bounds: tuple[int, ...], initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token by token as the rule is written, differentiable; in the dtype of the inputs."""
    group = x.v.shape[1] // x.q.shape[1]
    q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (x.q, x.k))
    q, k = (t.repeat_interleave(group, 1) for t in (q * x.q.shape[-1] ** -0.5, k))
    outs, states = [], []
    for document, (start, end) in enumerate(pairwise(bounds)):
        state = x.v.new_zeros(x.v.shape[1], q.shape[-1], x.v.shape[-1])
        if initial is not None:
            state = initial[document]
        for t in range(start, end):
            state = state * x.g[t].exp()[:, None, None]
            error = x.beta[t][:, None] * (x.v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
            state = state + k[t][:, :, None] * error[:, None, :]
            outs.append(torch.einsum("hkv,hk->hv", state, q[t]))
        states.append(state)
    return torch.stack(outs), torch.stack(states)


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_equal_the_recurrence_in_fp64(length: int) -> None:
    x = inputs(length)
    initial = torch.randn(1, 4, 6, 5, dtype=torch.float64)
    want, want_state = recurrent(x, (0, length), initial)
    out, state, _ = gated_delta_forward(GatedDeltaInputs(*x, (0, length), initial))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, want_state, rtol=0, atol=1e-10)


def test_packed_documents_equal_the_recurrence_of_each_in_fp64() -> None:
    plan = plan_of(*LENGTHS)
    x = inputs(plan.bounds[-1])
    initial = torch.randn(len(LENGTHS), 4, 6, 5, dtype=torch.float64)
    for start in (None, initial):
        want, want_state = recurrent(x, plan.bounds, start)
        out, state, _ = gated_delta_forward(GatedDeltaInputs(*x, plan.bounds, start))
        torch.testing.assert_close(out, want, rtol=0, atol=1e-10)
        torch.testing.assert_close(state, want_state, rtol=0, atol=1e-10)


def repeated(tokens: int) -> Inputs:
    """One key and one query throughout, written with full strength and hardly any decay."""
    x = inputs(tokens, decay=1e-3)
    return x._replace(
        q=x.q[:1].expand_as(x.q).clone(),
        k=x.k[:1].expand_as(x.k).clone(),
        beta=torch.ones_like(x.beta),
    )


def test_repeated_tokens_keep_fp64_accuracy() -> None:
    x = repeated(130)
    want, _ = recurrent(x, (0, 130))
    out, _, _ = gated_delta_forward(GatedDeltaInputs(*x, (0, 130)))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-10)


def worst(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).abs().max())


Form = Callable[[Inputs, tuple[int, ...], Tensor], tuple[Tensor, Tensor]]


def gradients(
    form: Form, x: Inputs, bounds: tuple[int, ...], do: Tensor, d_state: Tensor, initial: Tensor
) -> tuple[Tensor, ...]:
    """Output and gradients of all inputs by autograd through `form`."""
    leaves = [t.detach().clone().requires_grad_() for t in (*x, initial)]
    out, state = form(Inputs(*leaves[:5]), bounds, leaves[5])
    loss = (out * do).sum() + (state * d_state).sum()
    return out.detach(), *torch.autograd.grad(loss, leaves)


def plain_chunks(x: Inputs, bounds: tuple[int, ...], initial: Tensor) -> tuple[Tensor, Tensor]:
    """The textbook chunked form (u, w, one document and chunk after another), differentiable."""
    group = x.v.shape[1] // x.q.shape[1]
    q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (x.q, x.k))
    q, k = (t.repeat_interleave(group, 1) for t in (q * x.q.shape[-1] ** -0.5, k))
    outs, states = [], []
    for document, (start, end) in enumerate(pairwise(bounds)):
        state = initial[document]
        for first in range(start, end, 64):
            at = slice(first, min(first + 64, end))
            qc, kc, vc = (t[at].transpose(0, 1) for t in (q, k, x.v))
            beta, log = x.beta[at].T[..., None], x.g[at].cumsum(0).T[..., None]
            decay = (log - log.mT).tril().exp().tril()
            eye = torch.eye(decay.shape[-1], dtype=log.dtype)
            lower = (kc @ kc.mT * beta * decay).tril(-1)
            inverse = torch.linalg.solve_triangular(eye + lower, eye, upper=False)
            writes = inverse @ (vc * beta) - inverse @ (kc * beta * log.exp()) @ state
            outs.append(((qc * log.exp()) @ state + (qc @ kc.mT * decay) @ writes).transpose(0, 1))
            ending = log[:, -1:]
            state = ending.exp() * state + (kc * (ending - log).exp()).mT @ writes
        states.append(state)
    return torch.cat(outs), torch.stack(states)


@pytest.mark.parametrize("make", [inputs, repeated])
def test_values_and_gradients_are_as_accurate_as_plain_chunks_in_fp32(
    make: Callable[[int], Inputs],
) -> None:
    bounds = (0, 65, 165)
    rounded = Inputs(*(t.float() for t in make(165)))
    do, initial, d_state = torch.randn(165, 4, 5), torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    given = [t.double() for t in (do, d_state, initial)]
    truth = gradients(recurrent, Inputs(*(t.double() for t in rounded)), bounds, *given)
    plain = gradients(plain_chunks, rounded, bounds, do, d_state, initial)
    out, _, saved = gated_delta_forward(GatedDeltaInputs(*rounded, bounds, initial))
    result = gated_delta_backward(do, GatedDeltaInputs(*rounded, bounds, initial), saved, d_state)
    for ours, theirs, exact in zip((out, *result), plain, truth, strict=True):
        ulp = float(exact.abs().max()) * torch.finfo(torch.float32).eps
        assert worst(ours, exact) <= 2 * worst(theirs, exact) + ulp


def test_half_precision_inputs_lose_nothing_but_the_last_rounding() -> None:
    bounds = (0, 65, 165)
    rounded = Inputs(*(t.bfloat16() for t in inputs(165)))
    do, zero = torch.randn(165, 4, 5).bfloat16(), torch.zeros(2, 4, 6, 5, dtype=torch.float64)
    wide = Inputs(*(t.double() for t in rounded))
    truth = gradients(recurrent, wide, bounds, do.double(), zero, zero)
    out, _, saved = gated_delta_forward(GatedDeltaInputs(*rounded, bounds))
    result = gated_delta_backward(do, GatedDeltaInputs(*rounded, bounds), saved)
    for ours, exact in zip((out, *result[:5]), truth[:6], strict=True):
        ulp = float(exact.abs().max()) * torch.finfo(ours.dtype).eps
        assert worst(ours, exact) <= ulp + 1e-5 * float(exact.abs().max())


def test_gradcheck_through_chunks_documents_and_states() -> None:
    plan = plan_of(5, 1, 3)
    x = inputs(9, heads=1, key=3, value=2)
    initial = torch.randn(3, 2, 3, 2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*x, initial)]

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        *tensors, state = args
        return gated_delta(*Inputs(*tensors), plan, initial_state=state, chunk=2)

    assert torch.autograd.gradcheck(run, leaves)


def test_backward_by_hand_equals_autograd_through_the_recurrence() -> None:
    plan = plan_of(*LENGTHS)
    x = inputs(plan.bounds[-1])
    x.k[70:110] = x.k[70].clone()
    initial = torch.randn(len(LENGTHS), 4, 6, 5, dtype=torch.float64)
    do, d_state = torch.randn_like(x.v), torch.randn_like(initial)
    want = gradients(recurrent, x, plan.bounds, do, d_state, initial)[1:]
    _, _, saved = gated_delta_forward(GatedDeltaInputs(*x, plan.bounds, initial))
    for remaining in (saved, saved.trim()):
        result = gated_delta_backward(
            do, GatedDeltaInputs(*x, plan.bounds, initial), remaining, d_state
        )
        for ours, theirs in zip(result, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_three_value_heads_share_a_key_head() -> None:
    x = inputs(70, heads=2, group=3, key=4, value=7)
    do, initial = torch.randn_like(x.v), torch.randn(1, 6, 4, 7, dtype=torch.float64)
    want = gradients(recurrent, x, (0, 70), do, torch.zeros_like(initial), initial)[1:]
    _, _, saved = gated_delta_forward(GatedDeltaInputs(*x, (0, 70), initial))
    result = gated_delta_backward(do, GatedDeltaInputs(*x, (0, 70), initial), saved)
    for ours, theirs in zip(result, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_a_document_does_not_feel_another_at_all() -> None:
    plan = plan_of(70, 130, 3)
    own = slice(70, 200)
    first = Inputs(*(t.float() for t in inputs(203)))
    do = torch.randn(203, 4, 5)
    second = Inputs(*(t.clone() for t in first))
    for tensor in second:
        tensor[:70] = -tensor[:70] * 3 if tensor.dim() == 3 else -0.5
        tensor[200:] = float("nan")
    results = []
    for x in (first, second):
        out, state, saved = gated_delta_forward(GatedDeltaInputs(*x, plan.bounds))
        result = gated_delta_backward(do, GatedDeltaInputs(*x, plan.bounds), saved)
        results.append((out[own], state[1], *(grad[own] for grad in result[:5])))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_steps_continue_what_chunks_began() -> None:
    x = inputs(140)
    want, want_state = recurrent(x, (0, 140))
    _, state, _ = gated_delta_forward(GatedDeltaInputs(*x.rows(0, 100), (0, 100)))
    outs = [gated_delta_step(*x.rows(i, i + 1), state) for i in range(100, 140)]
    torch.testing.assert_close(torch.cat(outs), want[100:], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, want_state, rtol=0, atol=1e-12)


def test_chunks_continue_from_the_state_of_a_cache() -> None:
    x = inputs(140)
    want, want_state = recurrent(x, (0, 140))
    _, state, _ = gated_delta_forward(GatedDeltaInputs(*x.rows(0, 90), (0, 90)))
    out, state, _ = gated_delta_forward(GatedDeltaInputs(*x.rows(90, 140), (0, 50), state))
    torch.testing.assert_close(out, want[90:], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, want_state, rtol=0, atol=1e-12)


def test_a_step_serves_several_sequences() -> None:
    x = inputs(3)
    state = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    want, want_state = recurrent(x, (0, 1, 2, 3), state)
    out = gated_delta_step(*x, state)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(state, want_state)


def test_fast_decay_neither_overflows_nor_leaks_nan() -> None:
    x = Inputs(*(t.float() for t in inputs(200, decay=60.0)))
    do = torch.randn_like(x.v)
    out, _, saved = gated_delta_forward(GatedDeltaInputs(*x, (0, 200)))
    result = gated_delta_backward(do, GatedDeltaInputs(*x, (0, 200)), saved)
    want, _ = recurrent(Inputs(*(t.double() for t in x)), (0, 200))
    assert worst(out, want) < 1e-5
    assert all(torch.isfinite(t).all() for t in result)


def test_gates_pass_gradcheck_and_bound_the_decay() -> None:
    a, b = torch.randn(7, 3, dtype=torch.float64) * 3, torch.randn(7, 3, dtype=torch.float64)
    a_log, dt_bias = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (a, b, a_log, dt_bias)]
    shifted = (a + dt_bias).exp()
    want = -a_log.exp() * torch.log1p(shifted), 1 / (1 + (-b).exp())
    dg, dbeta = torch.randn_like(a), torch.randn_like(b)
    expected = torch.autograd.grad((want[0] * dg).sum() + (want[1] * dbeta).sum(), leaves)
    with torch.no_grad():
        g, beta = gates_forward(a, b, a_log, dt_bias)
        result = gates_backward(dg, dbeta, a, b, a_log, dt_bias)
    torch.testing.assert_close(g, want[0])
    torch.testing.assert_close(beta, want[1])
    assert (g <= 0).all()
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_l2_norm_has_its_epsilon_inside_the_root() -> None:
    x = torch.randn(4, 6, dtype=torch.float64) * 1e-3
    x.requires_grad_()
    want = 0.5 * x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    dy = torch.randn_like(x)
    (expected,) = torch.autograd.grad(want, x, dy)
    with torch.no_grad():
        y, rstd = l2norm_forward(x, 0.5)
        dx = l2norm_backward(dy, x, rstd, 0.5)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(dx, expected)


def test_trimmed_state_holds_only_the_inverse() -> None:
    x = inputs(70)
    _, _, saved = gated_delta_forward(GatedDeltaInputs(*x, (0, 70)))
    assert saved.trim() == GatedDeltaSaved(saved.inverse)
    assert saved.inverse.shape[-2:] == (64, 64)


@pytest.mark.parametrize("wrong", ["tokens", "heads", "gates"])
def test_shapes_that_do_not_fit_are_refused(wrong: str) -> None:
    x = inputs(8)
    bounds = (0, 8)
    if wrong == "tokens":
        bounds = (0, 9)
    elif wrong == "heads":
        x = x._replace(v=x.v[:, :3], g=x.g[:, :3], beta=x.beta[:, :3])
    else:
        x = x._replace(g=x.g[:, :2])
    with pytest.raises(ValueError, match="do not fit"):
        gated_delta_forward(GatedDeltaInputs(*x, bounds))
