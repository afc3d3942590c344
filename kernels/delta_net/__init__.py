"""Gated delta rule over packed documents, as in Qwen3-Next and Qwen3.5.

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
product form of (I + A)^-1 loses every digit where keys repeat. Only T need be saved for backward; S
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

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention import AttentionPlan
from kernels.delta_net import backward_triton, forward_triton, reference
from kernels.delta_net.gates import (
    gates_backward,
    gates_forward,
    l2norm_backward,
    l2norm_forward,
)
from kernels.delta_net.operands import (
    CHUNK,
    GatedDeltaGradients,
    GatedDeltaInputs,
    GatedDeltaSaved,
)
from kernels.delta_net.reference import gated_delta_step
from kernels.runtime.dispatch import use_triton

__all__ = [
    "GatedDeltaGradients",
    "GatedDeltaInputs",
    "GatedDeltaSaved",
    "gated_delta",
    "gated_delta_backward",
    "gated_delta_forward",
    "gated_delta_step",
    "gates_backward",
    "gates_forward",
    "l2norm_backward",
    "l2norm_forward",
]


def _use_triton(x: GatedDeltaInputs) -> bool:
    """fp32 on a GPU takes the reference: no tensor core multiplies it, and libraries do it best."""
    if not use_triton(x.q) or (x.q.is_cuda and x.q.dtype == torch.float32):
        return False
    if x.chunk != CHUNK:
        raise ValueError(f"the Triton kernels take chunks of {CHUNK}, not {x.chunk}")
    return True


def gated_delta_forward(x: GatedDeltaInputs) -> tuple[Tensor, Tensor, GatedDeltaSaved]:
    """o (N, Hv, V) in the dtype of v, the state after every document, and what backward reads.

    States and arithmetic are fp32 or wider.
    """
    return forward_triton.forward(x) if _use_triton(x) else reference.forward(x)


def gated_delta_backward(
    do: Tensor, x: GatedDeltaInputs, saved: GatedDeltaSaved, d_final_state: Tensor | None = None
) -> GatedDeltaGradients:
    """Gradients of every input of `gated_delta_forward` for do (N, Hv, V).

    `d_final_state` (D, Hv, K, V) is the gradient of the final state, None where nothing reads it.
    """
    backward = backward_triton.backward if _use_triton(x) else reference.backward
    return backward(do, x, saved, d_final_state)


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
        x = GatedDeltaInputs(q, k, v, g, beta, bounds, initial_state, chunk)
        out, final_state, saved = gated_delta_forward(x)
        ctx.save_for_backward(q, k, v, g, beta, initial_state, saved.inverse)
        ctx.bounds, ctx.chunk = bounds, chunk
        return out, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor, d_final_state: Tensor):  # type: ignore[no-untyped-def]
        q, k, v, g, beta, initial_state, inverse = ctx.saved_tensors
        x = GatedDeltaInputs(q, k, v, g, beta, ctx.bounds, initial_state, ctx.chunk)
        grads = gated_delta_backward(do, x, GatedDeltaSaved(inverse), d_final_state)
        d_state = None if initial_state is None else grads.d_initial_state.to(initial_state.dtype)
        gates = grads.dg.to(g.dtype), grads.dbeta.to(beta.dtype)
        return grads.dq, grads.dk, grads.dv, *gates, d_state, None, None


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

    Arguments as in `GatedDeltaInputs`. Saves the inputs and T for backward.
    """
    outputs: tuple[Tensor, Tensor] = _GatedDelta.apply(
        q, k, v, g, beta, initial_state, plan.bounds, chunk
    )
    return outputs
