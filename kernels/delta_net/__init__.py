"""Gated delta rule over packed documents: the mixer of Qwen3-Next and Qwen3.5 layers.

One value head with keys k_t and queries q_t of size K, values v_t of size V, log decay g_t <= 0
and write strength beta_t, state S (K, V), zero at the start of every document:

    q = K^-1/2 l2(q),  k = l2(k),  l2(x) = x / sqrt(sum x^2 + 1e-6)
    S <- e^g_t S;   e = beta_t (v_t - S^T k_t);   S <- S + k_t e^T;   o_t = S^T q_t

Value head j reads key head j // r, r = Hv / Hk. In chunks of C tokens, with G the running sum of
g in the chunk, Gamma = e^G and D_ij = e^(G_i - G_j) for i >= j (masked before the exponential):

    A = strict_lower(beta_i (k_i . k_j) D_ij),   T = (I + A)^-1
    v' = T beta (v - (Gamma k) S),   S+ = Gamma_C S + k~^T v',   k~_i = e^(G_C - G_i) k_i   (scan)
    o = (Gamma q) S + P v',   P = lower(q k^T * D)

The rows of v' are the errors e of the recurrence. T is a triangular solve in fp32 or wider; the
product form of (I + A)^-1 loses every digit where keys repeat. Only T need be kept for backward; S
and v' come again from one more scan. With X the gradient of e, and y the gradient of k_i through
the read of e_i, less its factor -beta:

    X = T^T (P^T do + k~ dS+),   dS = Gamma_C dS+ + (Gamma q)^T do - (beta Gamma k)^T X   (scan)
    dP = lower(do v'^T),   M = dP * D,   dA = -strict_lower(X v'^T),   N = dA * D
    y = Gamma (X S^T) - N k,   dv = beta X,   dbeta = X . v - k . y
    dq = M k + Gamma (do S^T),   dk = M^T q + e^(G_C - G) (v' dS+^T) + N^T (beta k) - beta y

and dg as `kernels.delta_net.reference` says. dq and dk are summed over the r value heads.

Source: Yang et al. 2024 (Gated Delta Networks, arXiv 2412.06464); the backward pass is derived
from the forward one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.attention import AttentionPlan
from kernels.delta_net import backward_triton as gated_delta_triton_backward
from kernels.delta_net import forward_triton as gated_delta_triton
from kernels.delta_net.reference import (
    chunk_layout,
    decay_matrix,
    from_chunks,
    in_chunks,
    initial_states,
    intra_backward,
    original_order,
    reverse_scan,
    scan,
    to_chunks,
    triangular_inverse,
    wide,
)
from kernels.delta_net.tiles import CHUNK, prepare
from kernels.runtime.dispatch import use_triton

L2_EPS = 1e-6


def gates_forward(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """g = -e^a_log softplus(a + dt_bias) and beta = sigmoid(b), fp32 or wider.

    a, b (N, Hv) are projections of the layer input; a_log, dt_bias (Hv,) are parameters.
    """
    shifted = wide(a) + wide(dt_bias)
    return F.softplus(shifted).mul_(-wide(a_log).exp()), torch.sigmoid(wide(b))


def gates_backward(
    dg: Tensor, dbeta: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b (N, Hv) in their dtypes and of a_log, dt_bias (Hv,) in theirs."""
    g, beta = gates_forward(a, b, a_log, dt_bias)
    da = torch.sigmoid(wide(a) + wide(dt_bias)).mul_(dg).mul_(-wide(a_log).exp())
    db = dbeta * beta * (1 - beta)
    da_log = (dg * g).sum(0)
    d_dt_bias = da.sum(0).to(dt_bias.dtype)
    return da.to(a.dtype), db.to(b.dtype), da_log.to(a_log.dtype), d_dt_bias


def l2norm_forward(x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """scale * x / sqrt(sum x^2 + 1e-6) over the last dimension, fp32 or wider, and rstd."""
    values = wide(x)
    rstd = torch.rsqrt(values.square().sum(-1, keepdim=True).add_(L2_EPS))
    return values * (rstd * scale), rstd


def l2norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, scale: float = 1.0) -> Tensor:
    """Gradient of x, in its dtype, for dy of `l2norm_forward(x, scale)`."""
    unit = wide(x) * rstd
    along = (unit * dy).sum(-1, keepdim=True)
    return (dy - unit * along).mul_(rstd * scale).to(x.dtype)


@dataclass(frozen=True)
class GatedDeltaSaved:
    """What backward reads beside the inputs: `inverse` (T), and unless trimmed S and v'."""

    inverse: Tensor
    states: Tensor | None = None
    writes: Tensor | None = None

    def trim(self) -> GatedDeltaSaved:
        """Without S and v', which backward then computes again."""
        return replace(self, states=None, writes=None)


def _use_triton(x: Tensor, chunk: int) -> bool:
    """fp32 on a GPU takes the reference: no tensor core multiplies it, and libraries do it best."""
    if not use_triton(x) or (x.is_cuda and x.dtype == torch.float32):
        return False
    if chunk != CHUNK:
        raise ValueError(f"the Triton kernels take chunks of {CHUNK}, not {chunk}")
    return True


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, tokens: int) -> None:
    heads, gates = v.shape[1], (v.shape[0], v.shape[1])
    fits = q.shape == k.shape and q.shape[0] == tokens == v.shape[0] and heads % q.shape[1] == 0
    if not fits or tuple(g.shape) != gates or tuple(beta.shape) != gates:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, g {tuple(g.shape)}, beta "
            f"{tuple(beta.shape)} do not fit {tokens} tokens; expected twice (N, Hk, K), then "
            "(N, Hv, V) with Hk dividing Hv, and twice (N, Hv)"
        )


def gated_delta_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    bounds: tuple[int, ...],
    initial_state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, GatedDeltaSaved]:
    """o (N, Hv, V) in the dtype of v, the state after every document, and what backward reads.

    q, k (N, Hk, K) before their norm; v (N, Hv, V); g, beta (N, Hv) from `gates_forward`; `bounds`
    as `AttentionPlan.bounds`; `initial_state` (D, Hv, K, V) or None for zero. States and arithmetic
    are fp32 or wider. Raises `ValueError` if the shapes do not fit.
    """
    _check(q, k, v, g, beta, bounds[-1])
    if _use_triton(q, chunk):
        x = prepare(q, k, v, g, beta, bounds, L2_EPS)
        inverse = gated_delta_triton.invert(x)
        states, writes, last = gated_delta_triton.scan(x, inverse, initial_state)
        out = gated_delta_triton.output(x, states, writes)
        return out.to(v.dtype), last, GatedDeltaSaved(inverse, states, writes)
    layout = chunk_layout(bounds, chunk, q.device)
    q_unit, _ = l2norm_forward(q, q.shape[-1] ** -0.5)
    k_unit, _ = l2norm_forward(k)
    c = in_chunks(q_unit, k_unit, v, g, beta, layout)
    decay = decay_matrix(c)
    inverse = triangular_inverse(c, decay)
    state = initial_states(c, initial_state, len(bounds) - 1, layout)
    states, writes = scan(c, inverse, state, layout)
    out = (c.q * c.gamma) @ states
    out += ((c.q @ c.k.mT) * decay) @ writes
    final_state = original_order(state, layout)
    saved = GatedDeltaSaved(inverse, states, writes)
    return from_chunks(out, layout).to(v.dtype), final_state, saved


class GatedDeltaGradients(NamedTuple):
    """dq, dk (N, Hk, K), dv (N, Hv, V) in the dtypes of q, k, v; dg, dbeta (N, Hv) fp32 or wider.

    `d_initial_state` (D, Hv, K, V), fp32 or wider.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor
    dbeta: Tensor
    d_initial_state: Tensor


def gated_delta_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    bounds: tuple[int, ...],
    saved: GatedDeltaSaved,
    initial_state: Tensor | None = None,
    d_final_state: Tensor | None = None,
    chunk: int = CHUNK,
) -> GatedDeltaGradients:
    """Gradients of every input of `gated_delta_forward` for do (N, Hv, V).

    `d_final_state` (D, Hv, K, V) is the gradient of the final state, None where nothing reads it.
    """
    if _use_triton(q, chunk):
        x = prepare(q, k, v, g, beta, bounds, L2_EPS)
        states, writes = saved.states, saved.writes
        if states is None or writes is None:
            states, writes, _ = gated_delta_triton.scan(x, saved.inverse, initial_state)
        dq, dk, dv, *others = gated_delta_triton_backward.backward(
            x, do, saved.inverse, states, writes, d_final_state
        )
        return GatedDeltaGradients(dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *others)
    layout, scale = chunk_layout(bounds, chunk, q.device), q.shape[-1] ** -0.5
    q_unit, q_rstd = l2norm_forward(q, scale)
    k_unit, k_rstd = l2norm_forward(k)
    c = in_chunks(q_unit, k_unit, v, g, beta, layout)
    d_out = to_chunks(do, layout, q.shape[1])
    decay, documents = decay_matrix(c), len(bounds) - 1
    states, writes = saved.states, saved.writes
    if states is None or writes is None:
        state = initial_states(c, initial_state, documents, layout)
        states, writes = scan(c, saved.inverse, state, layout)
    scores = (c.q @ c.k.mT) * decay
    d_state = initial_states(c, d_final_state, documents, layout)
    d_errors = scores.mT @ d_out
    d_ends = reverse_scan(c, saved.inverse, d_out, d_errors, d_state, layout)
    found = intra_backward(c, decay, scores, states, writes, d_out, d_errors, d_ends)
    dq, dk, dv, dg, dbeta = (from_chunks(t, layout) for t in found)
    return GatedDeltaGradients(
        l2norm_backward(dq, q, q_rstd, scale),
        l2norm_backward(dk, k, k_rstd),
        dv.to(v.dtype),
        dg.squeeze(-1),
        dbeta.squeeze(-1),
        original_order(d_state, layout),
    )


class _GatedDelta(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None,
        bounds: tuple[int, ...],
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        out, final_state, saved = gated_delta_forward(
            q, k, v, g, beta, bounds, initial_state, chunk
        )
        ctx.save_for_backward(q, k, v, g, beta, initial_state, saved.inverse)
        ctx.bounds, ctx.chunk = bounds, chunk
        return out, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor, d_final_state: Tensor):  # type: ignore[no-untyped-def]
        q, k, v, g, beta, initial_state, inverse = ctx.saved_tensors
        saved, bounds = GatedDeltaSaved(inverse), ctx.bounds
        found = gated_delta_backward(
            do, q, k, v, g, beta, bounds, saved, initial_state, d_final_state, ctx.chunk
        )
        d_state = None if initial_state is None else found.d_initial_state.to(initial_state.dtype)
        gates = found.dg.to(g.dtype), found.dbeta.to(beta.dtype)
        return found.dq, found.dk, found.dv, *gates, d_state, None, None


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    plan: AttentionPlan,
    *,
    initial_state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """o (N, Hv, V) and the state after every document (D, Hv, K, V), with all gradients.

    Arguments as in `gated_delta_forward`. Keeps the inputs and T for backward.
    """
    out: tuple[Tensor, Tensor] = _GatedDelta.apply(
        q, k, v, g, beta, initial_state, plan.bounds, chunk
    )
    return out


def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """o (B, Hv, V) for the next token of B sequences; `state` (B, Hv, K, V) is updated in place.

    q, k (B, Hk, K) before their norm; v (B, Hv, V); g, beta (B, Hv); the state fp32 or wider.
    """
    group = v.shape[1] // q.shape[1]
    q_unit, _ = l2norm_forward(q, q.shape[-1] ** -0.5)
    k_unit, _ = l2norm_forward(k)
    q_unit, k_unit = (x.to(state.dtype).repeat_interleave(group, 1) for x in (q_unit, k_unit))
    state.mul_(g.to(state.dtype).exp()[..., None, None])
    error = v.to(state.dtype) - (k_unit.unsqueeze(-2) @ state).squeeze(-2)
    state.addcmul_(k_unit.unsqueeze(-1), error.mul_(beta.unsqueeze(-1)).unsqueeze(-2))
    return (q_unit.unsqueeze(-2) @ state).squeeze(-2).to(v.dtype)
