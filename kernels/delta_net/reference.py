"""The gated delta rule in chunks, in plain torch.

Everything is batched over chunks, key heads and value heads of a key head; only the two scans loop,
over the chunks of the longest document, with all documents side by side. The symbols are those of
`kernels.delta_net`; queries and keys come normalised.

Two things are done for accuracy in fp32. G is summed and its differences are taken in fp64: after
a few fast decays G is large, and e^(G_i - G_j) of two neighbours would inherit its rounding. And dg
is summed directly, not as a running sum of dG, whose terms cancel: with Y = dP * P + dA * A,

    dg_i = sum_{a >= i > b} Y_ab + sum_{j >= i} (terms of Gamma_j) + sum_{j < i} (terms of k~_j)
           + Gamma_C <S, dS+>
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.delta_net.gates import l2norm_backward, l2norm_forward
from kernels.delta_net.operands import (
    GatedDeltaGradients,
    GatedDeltaInputs,
    GatedDeltaSaved,
    wide,
)


@dataclass(frozen=True)
class ChunkLayout:
    """Where the tokens of packed documents lie in chunks that restart at every document.

    Documents are ordered by length, longest first, and chunks by their number in the document, so
    that step s of the scan over chunks is the contiguous range `steps[s]` and touches the first
    rows of the state. `slots` (N,) is the chunk row of every token; `order` (D,) is the document
    in each row of the state.
    """

    chunk: int
    chunks: int
    steps: tuple[tuple[int, int], ...]
    slots: Tensor
    order: Tensor


@lru_cache(maxsize=16)
def chunk_layout(bounds: tuple[int, ...], chunk: int, device: torch.device) -> ChunkLayout:
    """The layout for documents between consecutive `bounds`; the same for every layer."""
    lengths = [end - start for start, end in pairwise(bounds)]
    order = sorted(range(len(lengths)), key=lambda document: -lengths[document])
    counts = [-(-lengths[document] // chunk) for document in order]
    steps, first = [], 0
    for step in range(counts[0]):
        active = sum(count > step for count in counts)
        steps.append((first, first + active))
        first += active
    rank = torch.empty(len(order), dtype=torch.int64)
    rank[torch.tensor(order)] = torch.arange(len(order))
    document = torch.repeat_interleave(torch.tensor(lengths), output_size=bounds[-1])
    within = torch.arange(bounds[-1]) - torch.tensor(bounds)[document]
    starts = torch.tensor([start for start, _ in steps])
    slots = (starts[within // chunk] + rank[document]) * chunk + within % chunk
    return ChunkLayout(
        chunk, first, tuple(steps), slots.to(device), torch.tensor(order, device=device)
    )


def to_chunks(x: Tensor, layout: ChunkLayout, heads: int) -> Tensor:
    """x (N, heads * r, D) -> (chunks, heads, r, C, D) fp32 or wider, zero where no token is."""
    values = wide(x)
    padded = values.new_zeros(layout.chunks * layout.chunk, *x.shape[1:])
    padded.index_copy_(0, layout.slots, values)
    split = padded.view(layout.chunks, layout.chunk, heads, -1, x.shape[2])
    return split.permute(0, 2, 3, 1, 4).contiguous()


def from_chunks(y: Tensor, layout: ChunkLayout) -> Tensor:
    """The inverse of `to_chunks`: (chunks, heads, r, C, D) -> (N, heads * r, D)."""
    rows = y.permute(0, 3, 1, 2, 4).reshape(layout.chunks * layout.chunk, -1, y.shape[-1])
    return rows.index_select(0, layout.slots)


class Chunks(NamedTuple):
    """Inputs in chunks. q, k (n, Hk, 1, C, K); v (n, Hk, r, C, V); the rest (n, Hk, r, C, 1).

    `log` is G in fp64, `gamma` e^G and `to_end` e^(G_C - G).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log: Tensor
    gamma: Tensor
    to_end: Tensor

    @property
    def end(self) -> Tensor:
        """Gamma_C (n, Hk, r, 1, 1): the decay of a state over the chunk."""
        return self.gamma[..., -1:, :]


def in_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, layout: ChunkLayout
) -> Chunks:
    heads = q.shape[1]
    log = to_chunks(g.double().unsqueeze(-1), layout, heads).cumsum_(-2)
    values = to_chunks(v, layout, heads)
    return Chunks(
        to_chunks(q, layout, heads),
        to_chunks(k, layout, heads),
        values,
        to_chunks(beta.unsqueeze(-1), layout, heads),
        log,
        log.exp().to(values.dtype),
        (log[..., -1:, :] - log).exp_().to(values.dtype),
    )


def forward(x: GatedDeltaInputs) -> tuple[Tensor, Tensor, GatedDeltaSaved]:
    """As `kernels.delta_net.gated_delta_forward`."""
    layout = chunk_layout(x.bounds, x.chunk, x.q.device)
    q_unit, _ = l2norm_forward(x.q, x.q_scale)
    k_unit, _ = l2norm_forward(x.k)
    c = in_chunks(q_unit, k_unit, x.v, x.g, x.beta, layout)
    decay = decay_matrix(c)
    inverse = triangular_inverse(c, decay)
    state = initial_states(c, x.initial_state, x.documents, layout)
    states, writes = scan(c, inverse, state, layout)
    out = (c.q * c.gamma) @ states
    out += ((c.q @ c.k.mT) * decay) @ writes
    final_state = original_order(state, layout)
    saved = GatedDeltaSaved(inverse, states, writes)
    return from_chunks(out, layout).to(x.v.dtype), final_state, saved


def backward(
    do: Tensor, x: GatedDeltaInputs, saved: GatedDeltaSaved, d_final_state: Tensor | None
) -> GatedDeltaGradients:
    """As `kernels.delta_net.gated_delta_backward`."""
    layout = chunk_layout(x.bounds, x.chunk, x.q.device)
    q_unit, q_rstd = l2norm_forward(x.q, x.q_scale)
    k_unit, k_rstd = l2norm_forward(x.k)
    c = in_chunks(q_unit, k_unit, x.v, x.g, x.beta, layout)
    d_out = to_chunks(do, layout, x.q.shape[1])
    decay = decay_matrix(c)
    states, writes = saved.states, saved.writes
    if states is None or writes is None:
        state = initial_states(c, x.initial_state, x.documents, layout)
        states, writes = scan(c, saved.inverse, state, layout)
    scores = (c.q @ c.k.mT) * decay
    d_state = initial_states(c, d_final_state, x.documents, layout)
    d_errors = scores.mT @ d_out
    d_ends = reverse_scan(c, saved.inverse, d_out, d_errors, d_state, layout)
    inside = intra_backward(c, decay, scores, states, writes, d_out, d_errors, d_ends)
    dq, dk, dv, dg, dbeta = (from_chunks(t, layout) for t in inside)
    return GatedDeltaGradients(
        l2norm_backward(dq, x.q, q_rstd, x.q_scale),
        l2norm_backward(dk, x.k, k_rstd),
        dv.to(x.v.dtype),
        dg.squeeze(-1),
        dbeta.squeeze(-1),
        original_order(d_state, layout),
    )


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


def decay_matrix(c: Chunks) -> Tensor:
    """D (n, Hk, r, C, C): e^(G_i - G_j) for i >= j, else 0."""
    size = c.log.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=c.log.device).triu_(1)
    exponent = (c.log - c.log.mT).to(c.v.dtype)
    return exponent.masked_fill_(later, float("-inf")).exp_()


def triangular_inverse(c: Chunks, decay: Tensor) -> Tensor:
    """T = (I + A)^-1 (n, Hk, r, C, C)."""
    lower = (c.k @ c.k.mT) * decay * c.beta
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(
        lower, eye.expand_as(lower), upper=False, unitriangular=True
    )
    return inverse


def scan(c: Chunks, inverse: Tensor, state: Tensor, layout: ChunkLayout) -> tuple[Tensor, Tensor]:
    """S at the start of every chunk (n, Hk, r, K, V) and v' (n, Hk, r, C, V).

    `state` (D, Hk, r, K, V), in the order of the layout, becomes the state after each document.
    """
    starts = c.v.new_empty(*c.v.shape[:3], c.k.shape[-1], c.v.shape[-1])
    writes = torch.empty_like(c.v)
    decayed_k, reading_k, end = c.k * c.to_end, c.k * c.gamma, c.end
    for first, last in layout.steps:
        at, live = slice(first, last), state[: last - first]
        starts[at] = live
        error = (c.v[at] - reading_k[at] @ live).mul_(c.beta[at])
        torch.matmul(inverse[at], error, out=writes[at])
        live.mul_(end[at]).add_(decayed_k[at].mT @ writes[at])
    return starts, writes


def initial_states(
    c: Chunks, initial_state: Tensor | None, documents: int, layout: ChunkLayout
) -> Tensor:
    """A new (D, Hk, r, K, V) in the order of the layout."""
    heads, group = c.v.shape[1:3]
    shape = (documents, heads, group, c.k.shape[-1], c.v.shape[-1])
    if initial_state is None:
        return c.v.new_zeros(shape)
    return initial_state.to(c.v.dtype).reshape(shape).index_select(0, layout.order)


def original_order(state: Tensor, layout: ChunkLayout) -> Tensor:
    """(D, Hk, r, K, V) in the order of the layout -> (D, Hv, K, V) in that of the batch."""
    out = torch.empty_like(state)
    out[layout.order] = state
    return out.flatten(1, 2)


def reverse_scan(
    c: Chunks,
    inverse: Tensor,
    d_out: Tensor,
    d_writes: Tensor,
    d_state: Tensor,
    layout: ChunkLayout,
) -> Tensor:
    """dS+ of every chunk (n, Hk, r, K, V); `d_writes` becomes X = T^T dv', `d_state` dS."""
    d_ends = d_writes.new_empty(*d_writes.shape[:3], c.k.shape[-1], d_writes.shape[-1])
    decayed_k, reading_k, reading_q = c.k * c.to_end, c.k * (c.gamma * c.beta), c.q * c.gamma
    end = c.end
    for first, last in reversed(layout.steps):
        at, live = slice(first, last), d_state[: last - first]
        d_ends[at] = live
        d_writes[at] = inverse[at].mT @ (d_writes[at] + decayed_k[at] @ live)
        live.mul_(end[at]).add_(reading_q[at].mT @ d_out[at])
        live.sub_(reading_k[at].mT @ d_writes[at])
    return d_ends


def intra_backward(
    c: Chunks,
    decay: Tensor,
    scores: Tensor,
    states: Tensor,
    writes: Tensor,
    d_out: Tensor,
    d_errors: Tensor,
    d_ends: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk (summed over the r value heads), dv, dg and dbeta, in chunks, all in parallel.

    `scores` is P and is overwritten; `d_errors` is X, `d_ends` dS+.
    """
    d_scores = d_out @ writes.mT
    through = d_scores * decay
    from_state, to_state = c.gamma * (d_out @ states.mT), c.to_end * (writes @ d_ends.mT)
    dq = through @ c.k + from_state
    dk = through.mT @ c.q + to_state
    leaving = (c.k * to_state).sum(-1, keepdim=True)
    direct = (c.q * from_state).sum(-1, keepdim=True)

    read = c.gamma * (d_errors @ states.mT)
    d_lower = (d_errors @ writes.mT).neg_().tril_(-1).mul_(decay)
    direct -= c.beta * (read * c.k).sum(-1, keepdim=True)
    pairs = scores.mul_(d_scores).addcmul_(d_lower * (c.k @ c.k.mT), c.beta)
    read -= d_lower @ c.k
    dk += d_lower.mT @ (c.beta * c.k) - c.beta * read
    dbeta = (d_errors * c.v).sum(-1, keepdim=True) - (read * c.k).sum(-1, keepdim=True)
    dg = _crossing(pairs) + _from_here(direct) + (leaving.cumsum(-2) - leaving)
    dg += c.end * (states * d_ends).sum((-2, -1), keepdim=True)
    return dq.sum(2, keepdim=True), dk.sum(2, keepdim=True), d_errors * c.beta, dg, dbeta


def _from_here(x: Tensor) -> Tensor:
    """sum_{j >= i} x_j along the rows of a chunk."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _crossing(x: Tensor) -> Tensor:
    """sum_{a >= i > b} x_ab (..., C, 1) of x (..., C, C)."""
    return _from_here(x).tril_(-1).sum(-1, keepdim=True)
