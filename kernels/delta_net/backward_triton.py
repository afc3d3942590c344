"""Triton kernels of the gated delta rule, backward pass over chunks.

The symbols are those of `kernels.delta_net`; chunks of C = 64 tokens restart at every document.

    kernel           grid                         reads                   writes
    writes_backward  chunks, Hv, V / BLOCK_V      q, k, g, do             P^T do
    reverse_scan     V / BLOCK_V, Hv, documents   the inputs, T, P^T do   X, dS+ of every chunk, dS

and then the kernels of `backward_intra_triton`. T, S, v', X, M and N are stored in the dtype of k.
P^T do needs no state: it is formed for all chunks in parallel, so that the scan, which cannot be,
does less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.delta_net.backward_intra_triton import before_norm, inside_chunks
from kernels.delta_net.forward_triton import scan
from kernels.delta_net.operands import GatedDeltaGradients, GatedDeltaInputs, GatedDeltaSaved
from kernels.delta_net.tiles import (
    Launch,
    at_end,
    chunk_tokens,
    decay_matrix,
    document_state,
    load_head,
    load_rows,
    load_scalars,
    log_decay,
    prepare,
    product,
    row_products,
    rows_adjacent,
    square,
    store_head,
)
from kernels.runtime.triton_support import cdiv, jit, launch, on_device, tl


@jit
def writes_backward_kernel(
    q, q_rstd, k, k_rstd, g, d_out, out, starts, ends, heads, group, q_row, q_head, k_row, k_head,
    d_row, d_head, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    _, head, key_head, row, inside = chunk_tokens(starts, ends, group)
    column = tl.program_id(2).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    queries, keys = q + key_head * q_head, k + key_head * k_head
    # k q^T rather than q k^T: this is P^T as it is needed, without a transposition of the sums.
    scores = row_products(keys, k_row, queries, q_row, row, inside, KEY, BLOCK_K)
    q_scale = load_scalars(q_rstd, row, inside, key_head, heads // group) * scale
    k_scale = load_scalars(k_rstd, row, inside, key_head, heads // group)
    decay = tl.trans(decay_matrix(log_decay(g, row, inside, head, heads), 64))
    scores *= k_scale[:, None] * q_scale[None, :] * decay
    d_rows = load_rows(d_out + head * d_head, row, inside, d_row, column, VALUE)
    dtype = out.dtype.element_ty
    result = product(scores.to(dtype), d_rows.to(dtype))
    store_head(out, row, inside, head, heads, column, VALUE, result)


@jit
def reverse_scan_kernel(
    q, q_rstd, k, k_rstd, g, beta, inverse, d_out, d_writes, d_final, d_errors, d_ends, d_initial,
    bounds, first, heads, group, q_row, q_head, k_row, k_head, d_row, d_head, scale,
    FINAL: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    column, head, document, start, end, at_document, element, in_state = document_state(
        bounds, heads, KEY, VALUE, BLOCK_K, BLOCK_V
    )
    matrix = (tl.load(first + document + 1).to(tl.int64) - 1) * heads + head
    last = start + (end - start - 1) // 64 * 64
    key_head = head // group
    i = tl.arange(0, 64)
    along_k = tl.arange(0, BLOCK_K)
    if FINAL:
        d_state = tl.load(d_final + at_document, mask=in_state, other=0.0).to(tl.float32)
    else:
        d_state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    # From the last chunk, which may be short, back to the first.
    for back in range(0, last - start + 1, 64):
        row = last - back + i
        inside = row < end
        keys = load_rows(k + key_head * k_head, row, inside, k_row, along_k, KEY)
        k_scale = load_scalars(k_rstd, row, inside, key_head, heads // group)
        log = log_decay(g, row, inside, head, heads)
        total = at_end(log, 64)
        # dS+ of this chunk, before its own terms; the running sum stays fp32.
        narrow = d_state.to(keys.dtype)
        tl.store(d_ends + matrix * KEY * VALUE + element, narrow, mask=in_state)
        written = load_head(d_writes, row, inside, head, heads, column, VALUE)
        d_write = product(keys, narrow) * (k_scale * tl.exp(total - log))[:, None]
        d_write += written.to(tl.float32)
        solve = tl.load(inverse + square(i, matrix))
        d_error = product(tl.trans(solve), d_write.to(keys.dtype))
        store_head(d_errors, row, inside, head, heads, column, VALUE, d_error)
        queries = load_rows(q + key_head * q_head, row, inside, q_row, along_k, KEY)
        q_scale = load_scalars(q_rstd, row, inside, key_head, heads // group) * scale
        d_rows = load_rows(d_out + head * d_head, row, inside, d_row, column, VALUE)
        # Gamma q scales rows of q; scaling rows of do instead leaves q as it lies in memory.
        d_rows = d_rows.to(tl.float32) * (q_scale * tl.exp(log))[:, None]
        d_state = d_state * tl.exp(total) + product(tl.trans(queries), d_rows.to(keys.dtype))
        strength = load_scalars(beta, row, inside, head, heads)
        # X is stored: from here on d_error is only the factor of this product.
        d_error *= (k_scale * strength * tl.exp(log))[:, None]
        d_state -= product(tl.trans(keys), d_error.to(keys.dtype))
        matrix -= heads
    tl.store(d_initial + at_document, d_state, mask=in_state)


def reverse_scan(
    x: Launch, inverse: Tensor, d_out: Tensor, d_final: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """X (N, Hv, V), dS+ of every chunk (chunks, Hv, K, V), dS (D, Hv, K, V) fp32."""
    d_writes, d_errors = x.empty(*x.v.shape), x.empty(*x.v.shape)
    d_ends = x.empty(x.table.chunks, x.heads, x.key, x.value)
    d_initial = x.empty(x.table.documents, x.heads, x.key, x.value, dtype=torch.float32)
    d_last = d_initial if d_final is None else d_final.contiguous()
    strides = *x.q.stride()[:2], *x.k.stride()[:2], *d_out.stride()[:2]
    first, second = x.options("writes_backward"), x.options("reverse_scan")
    parts = cdiv(x.value, first["BLOCK_V"])  # each multiplies keys and queries anew
    with on_device(x.k):
        launch(
            writes_backward_kernel,
            (x.table.chunks, x.heads, parts),
            x.operations(keys=parts, values=1),
        )(
            x.q, x.q_rstd, x.k, x.k_rstd, x.g, d_out, d_writes, x.table.starts, x.table.ends,
            x.heads, x.group, *strides, x.key**-0.5, **first,
        )  # fmt: skip
        launch(
            reverse_scan_kernel,
            (cdiv(x.value, second["BLOCK_V"]), x.heads, x.table.documents),
            x.operations(states=3, values=1),
        )(
            x.q, x.q_rstd, x.k, x.k_rstd, x.g, x.beta, inverse, d_out, d_writes, d_last,
            d_errors, d_ends, d_initial, x.table.bounds, x.table.first, x.heads, x.group,
            *strides, x.key**-0.5, FINAL=d_final is not None, **second,
        )  # fmt: skip
    return d_errors, d_ends, d_initial


def backward(
    do: Tensor, x: GatedDeltaInputs, saved: GatedDeltaSaved, d_final_state: Tensor | None
) -> GatedDeltaGradients:
    """As `kernels.delta_net.gated_delta_backward`."""
    operands, d_out = prepare(x), rows_adjacent(do)
    states, writes = saved.states, saved.writes
    if states is None or writes is None:
        states, writes, _ = scan(operands, saved.inverse, x.initial_state)
    d_errors, d_ends, d_initial = reverse_scan(operands, saved.inverse, d_out, d_final_state)
    dq, dk, dv, dg, dbeta = inside_chunks(operands, d_out, states, writes, d_errors, d_ends)
    dq = before_norm(operands, operands.q, operands.q_rstd, dq, x.q_scale)
    dk = before_norm(operands, operands.k, operands.k_rstd, dk, 1.0)
    return GatedDeltaGradients(dq.to(x.q.dtype), dk.to(x.k.dtype), dv, dg, dbeta, d_initial)
