"""Triton kernels of the gated delta rule, backward pass inside chunks.

The symbols are those of `kernels.delta_net`; X, S, dS+ and v' of every chunk are at hand, and all
chunks run in parallel.

    kernel           grid                         reads                    writes
    pairs            chunks, Hv                   the inputs, v', X        M, N, dv
    query            chunks, Hv, K / BLOCK_K      the inputs, S, M         dq of every value head
    key              chunks, Hv, K / BLOCK_K      the inputs, S, dS+, v',  dk of every value head
                                                  X, M, N
    unit_backward    rows, Hk                     q and dq, or k and dk    gradient before the norm

The first three each write shares of dg and dbeta. dg is a running sum of dG: in fp32 the
cancellation of its terms costs nothing compared with the rounding of 16-bit operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.delta_net.operands import CHUNK
from kernels.delta_net.tiles import (
    Launch,
    at_end,
    chunk_tokens,
    decay_matrix,
    load_head,
    load_rows,
    load_scalars,
    log_decay,
    product,
    row_products,
    square,
    store_head,
)
from kernels.runtime.triton_support import cdiv, jit, launch, next_power_of_2, on_device, tl

UNIT_ROWS = 16


@jit
def pairs_kernel(
    q, q_rstd, k, k_rstd, v, g, beta, d_out, writes, d_errors, through, lower, dv, dg, dbeta,
    starts, ends, heads, group, q_row, q_head, k_row, k_head, v_row, v_head, d_row, d_head, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    chunk, head, key_head, row, inside = chunk_tokens(starts, ends, group)
    i = tl.arange(0, 64)
    strength = load_scalars(beta, row, inside, head, heads)
    d_scores = tl.zeros((64, 64), tl.float32)
    d_lower = tl.zeros((64, 64), tl.float32)
    along_values = tl.zeros((64,), tl.float32)
    # dP and dA are sums over V; dv and dbeta's first term come out of the same loads of X and v.
    for at in range(0, VALUE, BLOCK_V):
        column = at + tl.arange(0, BLOCK_V)
        written = load_head(writes, row, inside, head, heads, column, VALUE)
        d_rows = load_rows(d_out + head * d_head, row, inside, d_row, column, VALUE)
        error = load_head(d_errors, row, inside, head, heads, column, VALUE)
        d_scores += product(d_rows.to(written.dtype), tl.trans(written))
        d_lower -= product(error, tl.trans(written))
        values = load_rows(v + head * v_head, row, inside, v_row, column, VALUE)
        wide = error.to(tl.float32)
        along_values += tl.sum(wide * values.to(tl.float32), 1)
        wide *= strength[:, None]
        store_head(dv, row, inside, head, heads, column, VALUE, wide)

    decay = decay_matrix(log_decay(g, row, inside, head, heads), 64)
    d_scores *= decay
    # A has no diagonal, though D has one.
    d_lower = tl.where(i[:, None] > i[None, :], d_lower * decay, 0.0)
    # M and N go through memory in 16 bits: the query and key kernels read them for every part of K.
    matrix = square(i, chunk * heads + head)
    tl.store(through + matrix, d_scores.to(through.dtype.element_ty))
    tl.store(lower + matrix, d_lower.to(lower.dtype.element_ty))

    q_scale = load_scalars(q_rstd, row, inside, key_head, heads // group) * scale
    k_scale = load_scalars(k_rstd, row, inside, key_head, heads // group)
    queries, keys = q + key_head * q_head, k + key_head * k_head
    # Y = dP * P + dA * A: what D_ab = e^(G_a - G_b) passes on to G_a, and with a minus to G_b.
    dots = row_products(queries, q_row, keys, k_row, row, inside, KEY, BLOCK_K)
    both = d_scores * dots * q_scale[:, None]
    dots = row_products(keys, k_row, keys, k_row, row, inside, KEY, BLOCK_K)
    both += d_lower * dots * (strength * k_scale)[:, None]
    both *= k_scale[None, :]
    d_log = tl.sum(both, 1) - tl.sum(both, 0)
    # G is a running sum of g, so dg is one of dG from the chunk's end.
    tl.store(dg + row * heads + head, tl.cumsum(d_log, 0, reverse=True), mask=inside)
    tl.store(dbeta + row * heads + head, along_values, mask=inside)


@jit
def query_kernel(
    q, q_rstd, k, k_rstd, g, d_out, states, through, dq, dg, starts, ends, tokens, heads, group,
    q_row, q_head, k_row, k_head, d_row, d_head, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    chunk, head, key_head, row, inside = chunk_tokens(starts, ends, group)
    part = tl.program_id(2).to(tl.int64)
    column = part * BLOCK_K + tl.arange(0, BLOCK_K)
    at_state = states + (chunk * heads + head) * KEY * VALUE
    d_query = tl.zeros((64, BLOCK_K), tl.float32)
    for at in range(0, VALUE, BLOCK_V):
        along_v = at + tl.arange(0, BLOCK_V)
        state = load_rows(at_state, column, column < KEY, VALUE, along_v, VALUE)
        d_rows = load_rows(d_out + head * d_head, row, inside, d_row, along_v, VALUE)
        d_query += product(d_rows.to(state.dtype), tl.trans(state))
    log = log_decay(g, row, inside, head, heads)
    d_query *= tl.exp(log)[:, None]
    queries = load_rows(q + key_head * q_head, row, inside, q_row, column, KEY)
    q_scale = load_scalars(q_rstd, row, inside, key_head, heads // group) * scale
    # Before M k is added: this term of dG comes of Gamma, which scales the read of S alone. It is a
    # sum over K, of which this program has a part: shares are added up afterwards, without atomics.
    direct = tl.sum(queries.to(tl.float32) * d_query, 1) * q_scale
    share = (part * tokens + row) * heads + head
    tl.store(dg + share, tl.cumsum(direct, 0, reverse=True), mask=inside)
    keys = load_rows(k + key_head * k_head, row, inside, k_row, column, KEY)
    k_scale = load_scalars(k_rstd, row, inside, key_head, heads // group)
    # Here the norm goes into k before the product: k's rows are what the product sums over.
    m = tl.load(through + square(tl.arange(0, 64), chunk * heads + head))
    d_query += product(m, (keys.to(tl.float32) * k_scale[:, None]).to(keys.dtype))
    store_head(dq, row, inside, head, heads, column, KEY, d_query)


@jit
def key_kernel(
    q, q_rstd, k, k_rstd, g, beta, states, writes, d_errors, d_ends, through, lower, dk, dg, dbeta,
    starts, ends, tokens, heads, group, q_row, q_head, k_row, k_head, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    chunk, head, key_head, row, inside = chunk_tokens(starts, ends, group)
    part = tl.program_id(2).to(tl.int64)
    column = part * BLOCK_K + tl.arange(0, BLOCK_K)
    at_state = (chunk * heads + head) * KEY * VALUE
    to_state = tl.zeros((64, BLOCK_K), tl.float32)
    read = tl.zeros((64, BLOCK_K), tl.float32)
    overlap = tl.zeros((BLOCK_K,), tl.float32)
    for at in range(0, VALUE, BLOCK_V):
        along_v = at + tl.arange(0, BLOCK_V)
        state = load_rows(states + at_state, column, column < KEY, VALUE, along_v, VALUE)
        d_end = load_rows(d_ends + at_state, column, column < KEY, VALUE, along_v, VALUE)
        error = load_head(d_errors, row, inside, head, heads, along_v, VALUE)
        read += product(error, tl.trans(state))
        written = load_head(writes, row, inside, head, heads, along_v, VALUE)
        to_state += product(written, tl.trans(d_end))
        overlap += tl.sum(state.to(tl.float32) * d_end.to(tl.float32), 1)

    # The terms of dg, while `to_state` and `read` hold those parts alone that the decays scale.
    strength = load_scalars(beta, row, inside, head, heads)
    k_scale = load_scalars(k_rstd, row, inside, key_head, heads // group)
    log = log_decay(g, row, inside, head, heads)
    total = at_end(log, 64)
    keys = load_rows(k + key_head * k_head, row, inside, k_row, column, KEY)
    unit = keys.to(tl.float32) * k_scale[:, None]
    to_state *= tl.exp(total - log)[:, None]
    read *= tl.exp(log)[:, None]
    leaving = tl.sum(unit * to_state, 1)
    direct = -strength * tl.sum(unit * read, 1)
    # k~_j decays from j + 1 to the end, so g_i collects the j before it; the read of S decays from
    # the start to j, so g_i collects the j from it on.
    d_decay = tl.cumsum(direct, 0, reverse=True) + tl.cumsum(leaving, 0) - leaving
    d_decay += tl.exp(total) * tl.sum(overlap, 0)
    share = (part * tokens + row) * heads + head
    tl.store(dg + share, d_decay, mask=inside)

    matrix = square(tl.arange(0, 64), chunk * heads + head)
    n = tl.load(lower + matrix)
    # Now `read` becomes y of `kernels.delta_net`, and `to_state` dk.
    read -= product(n, unit.to(keys.dtype))
    tl.store(dbeta + share, -tl.sum(unit * read, 1), mask=inside)
    to_state -= strength[:, None] * read
    to_state += product(tl.trans(n), (unit * strength[:, None]).to(keys.dtype))
    queries = load_rows(q + key_head * q_head, row, inside, q_row, column, KEY)
    q_scale = load_scalars(q_rstd, row, inside, key_head, heads // group) * scale
    queries = (queries.to(tl.float32) * q_scale[:, None]).to(keys.dtype)
    to_state += product(tl.trans(tl.load(through + matrix)), queries)
    store_head(dk, row, inside, head, heads, column, KEY, to_state)


@jit
def unit_backward_kernel(
    x, rstd, dy, dx, tokens, heads, group, x_row, x_head, scale,
    KEY: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    key_head = tl.program_id(1).to(tl.int64)
    inside = row < tokens
    column = tl.arange(0, BLOCK_K)
    total = tl.zeros((ROWS, BLOCK_K), tl.float32)
    # The value heads of a key head in a fixed order, in fp32: equal inputs give equal bits.
    for member in range(group):
        head = key_head * group + member
        total += load_head(dy, row, inside, head, heads, column, KEY).to(tl.float32)
    norm = load_scalars(rstd, row, inside, key_head, heads // group)
    unit = load_rows(x + key_head * x_head, row, inside, x_row, column, KEY).to(tl.float32)
    unit *= norm[:, None]
    # A unit vector's gradient has no part along it.
    along = tl.sum(unit * total, 1)
    total = (total - unit * along[:, None]) * (norm * scale)[:, None]
    store_head(dx, row, inside, key_head, heads // group, column, KEY, total)


def inside_chunks(
    x: Launch, d_out: Tensor, states: Tensor, writes: Tensor, d_errors: Tensor, d_ends: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk of every value head (N, Hv, K), dv (N, Hv, V), dg, dbeta (N, Hv) fp32."""
    tokens, chunks, heads = x.k.shape[0], x.table.chunks, x.heads
    dq, dk, dv = x.empty(tokens, heads, x.key), x.empty(tokens, heads, x.key), x.empty(*x.v.shape)
    through, lower = (x.empty(chunks, heads, CHUNK, CHUNK) for _ in range(2))
    pairs, query, key = x.options("pairs"), x.options("query"), x.options("key")
    query_parts, key_parts = (cdiv(x.key, part["BLOCK_K"]) for part in (query, key))
    # Shares from every part of K, of keys and of queries, and one from the pairs of tokens.
    dg = x.empty(key_parts + query_parts + 1, tokens, heads, dtype=torch.float32)
    dbeta = x.empty(key_parts + 1, tokens, heads, dtype=torch.float32)
    head_strides = *x.q.stride()[:2], *x.k.stride()[:2]
    d_strides, table = d_out.stride()[:2], (x.table.starts, x.table.ends)
    with on_device(x.k):
        launch(pairs_kernel, (chunks, heads), x.operations(keys=2, values=2))(
            x.q, x.q_rstd, x.k, x.k_rstd, x.v, x.g, x.beta, d_out, writes, d_errors, through,
            lower, dv, dg[key_parts + query_parts], dbeta[key_parts], *table, heads, x.group,
            *head_strides, *x.v.stride()[:2], *d_strides, x.key**-0.5, **pairs,
        )  # fmt: skip
        launch(
            query_kernel, (chunks, heads, query_parts), x.operations(states=1, keys=1)
        )(
            x.q, x.q_rstd, x.k, x.k_rstd, x.g, d_out, states, through, dq, dg[key_parts:],
            *table, tokens, heads, x.group, *head_strides, *d_strides, x.key**-0.5, **query,
        )  # fmt: skip
        launch(key_kernel, (chunks, heads, key_parts), x.operations(states=2, keys=3))(
            x.q, x.q_rstd, x.k, x.k_rstd, x.g, x.beta, states, writes, d_errors, d_ends, through,
            lower, dk, dg, dbeta, *table, tokens, heads, x.group, *head_strides, x.key**-0.5,
            **key,
        )  # fmt: skip
    return dq, dk, dv, dg.sum(0), dbeta.sum(0)


def before_norm(x: Launch, source: Tensor, rstd: Tensor, dy: Tensor, scale: float) -> Tensor:
    """The gradient (N, Hk, K) of q or k, from that of its scaled unit vectors in every head."""
    tokens, key_heads = source.shape[:2]
    dx = x.empty(*source.shape)
    with on_device(x.k):
        launch(unit_backward_kernel, (cdiv(tokens, UNIT_ROWS), key_heads))(
            source, rstd, dy, dx, tokens, x.heads, x.group, *source.stride()[:2], scale,
            KEY=x.key, BLOCK_K=next_power_of_2(x.key), ROWS=UNIT_ROWS, num_warps=4,
        )  # fmt: skip
    return dx
