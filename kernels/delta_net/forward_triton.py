"""Triton kernels of the gated delta rule, forward pass.

The symbols are those of `kernels.delta_net`; chunks of C = 64 tokens restart at every document.

    kernel     grid                         reads               writes
    inverse    chunks, Hv                   k, g, beta          T (chunks, Hv, C, C)
    scan       V / BLOCK_V, Hv, documents   k, v, g, beta, T    S at every chunk, v', final state
    output     chunks, Hv, V / BLOCK_V      q, k, g, S, v'      o

T is solved in fp32 in blocks of 16: those on the diagonal row by row, all four at once, those
below by forward substitution of blocks, T_ij = -T_ii sum_{j <= m < i} A_im T_mj, with T and A as
four columns of blocks (64, 16). A never leaves the registers. T, S and v' are stored in the dtype
of k; everything else on the way is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.delta_net.operands import CHUNK, GatedDeltaInputs, GatedDeltaSaved
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
    square,
    store_head,
)
from kernels.runtime.triton_support import cdiv, jit, launch, on_device, tl

PRECISION = "tf32x3"
"""How the fp32 blocks of T are multiplied: three tf32 products, as good as fp32."""


@jit
def _panel(pairs, first, log, left_scale, right_scale):
    """Columns `first` to `first` + 15 of A, (64, 16), from the products of their keys."""
    i = tl.arange(0, 64)[:, None]
    j = first + tl.arange(0, 16)[None, :]
    # G of these 16 columns, by a masked sum: registers cannot be sliced.
    at_column = tl.sum(tl.where(i == j, log[:, None], 0.0), 0)
    # Masked before the exponential: above the diagonal the difference may overflow it.
    decay = tl.exp(tl.where(i > j, log[:, None] - at_column[None, :], float("-inf")))
    return pairs * left_scale[:, None] * right_scale[None, :] * decay


@jit
def _diagonal_inverses(a):
    """(I + A)^-1 of the four strictly lower A (16, 16) that lie one below the other, (64, 16)."""
    a = tl.reshape(a, (4, 16, 16))
    i = tl.arange(0, 16)
    eye = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    inverse = tl.zeros((4, 16, 16), tl.float32) + eye[None, :, :]
    # Row `step` of an inverse needs the finished rows above it: known = A[step] inverse. The four
    # blocks advance together, so 15 steps do for 64 rows.
    for step in range(1, 16):
        here = (i == step)[None, :, None]
        line = tl.sum(tl.where(here, a, 0.0), 1)
        known = tl.sum(line[:, :, None] * inverse, 1)
        inverse -= tl.where(here, known[:, None, :], 0.0)
    return tl.reshape(inverse, (64, 16))


@jit
def _take(x, which: tl.constexpr):
    """Rows 16 which to 16 which + 15 of x (64, 16)."""
    here = (tl.arange(0, 4) == which)[:, None, None]
    return tl.sum(tl.where(here, tl.reshape(x, (4, 16, 16)), 0.0), 0)


@jit
def _put(x, y, which: tl.constexpr):
    """x (64, 16) with those rows replaced by y (16, 16)."""
    here = (tl.arange(0, 4) == which)[:, None, None]
    return tl.reshape(tl.where(here, y[None, :, :], tl.reshape(x, (4, 16, 16))), (64, 16))


@jit
def _step(x, a, solved, which: tl.constexpr, PRECISION: tl.constexpr):
    """One block of a column of T is known: store it in x and take it off the rows below."""
    # Rows down to this block are final; with zeros of A there, the product leaves them as they are.
    below = tl.where(tl.arange(0, 64)[:, None] >= 16 * which + 16, a, 0.0)
    return _put(x, solved, which) - tl.dot(below, solved, input_precision=PRECISION)


@jit
def inverse_kernel(
    k, k_rstd, g, beta, out, starts, ends, heads, group, k_row, k_head,
    KEY: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    key_head = head // group
    start = tl.load(starts + chunk).to(tl.int64)
    end = tl.load(ends + chunk)
    keys = k + key_head * k_head
    row = start + tl.arange(0, 64)
    # The four panels of 16 columns are separate sums: a (64, 64) sum could not be cut afterwards.
    n0 = start + tl.arange(0, 16)
    n1, n2, n3 = n0 + 16, n0 + 32, n0 + 48

    zero = tl.zeros((64, 16), tl.float32)
    a0, a1, a2, a3 = zero, zero, zero, zero
    for at in range(0, KEY, BLOCK_K):
        column = at + tl.arange(0, BLOCK_K)
        left = load_rows(keys, row, row < end, k_row, column, KEY)
        a0 += product(left, tl.trans(load_rows(keys, n0, n0 < end, k_row, column, KEY)))
        a1 += product(left, tl.trans(load_rows(keys, n1, n1 < end, k_row, column, KEY)))
        a2 += product(left, tl.trans(load_rows(keys, n2, n2 < end, k_row, column, KEY)))
        a3 += product(left, tl.trans(load_rows(keys, n3, n3 < end, k_row, column, KEY)))
    # Norms, beta and decay scale the sums in fp32; the keys went in as they lie in memory.
    log = log_decay(g, row, row < end, head, heads)
    scale = load_scalars(beta, row, row < end, head, heads)
    scale *= load_scalars(k_rstd, row, row < end, key_head, heads // group)
    a0 = _panel(a0, 0, log, scale, load_scalars(k_rstd, n0, n0 < end, key_head, heads // group))
    a1 = _panel(a1, 16, log, scale, load_scalars(k_rstd, n1, n1 < end, key_head, heads // group))
    a2 = _panel(a2, 32, log, scale, load_scalars(k_rstd, n2, n2 < end, key_head, heads // group))
    a3 = _panel(a3, 48, log, scale, load_scalars(k_rstd, n3, n3 < end, key_head, heads // group))

    # The diagonal blocks of the four panels, one below the other.
    block = (tl.arange(0, 64) // 16)[:, None]
    own = tl.where(block < 2, tl.where(block == 0, a0, a1), tl.where(block == 2, a2, a3))
    diagonal = _diagonal_inverses(own)
    # Block row by block row: a finished block T_mj takes A_im T_mj off all rows i below at once,
    # so block row i only multiplies what is left by its own inverse d.
    d = _take(diagonal, 0)
    t0 = _step(zero, a0, d, 0, PRECISION)

    d = _take(diagonal, 1)
    t0 = _step(t0, a1, tl.dot(d, _take(t0, 1), input_precision=PRECISION), 1, PRECISION)
    t1 = _step(zero, a1, d, 1, PRECISION)

    d = _take(diagonal, 2)
    t0 = _step(t0, a2, tl.dot(d, _take(t0, 2), input_precision=PRECISION), 2, PRECISION)
    t1 = _step(t1, a2, tl.dot(d, _take(t1, 2), input_precision=PRECISION), 2, PRECISION)
    t2 = _step(zero, a2, d, 2, PRECISION)

    d = _take(diagonal, 3)
    t0 = _put(t0, tl.dot(d, _take(t0, 3), input_precision=PRECISION), 3)
    t1 = _put(t1, tl.dot(d, _take(t1, 3), input_precision=PRECISION), 3)
    t2 = _put(t2, tl.dot(d, _take(t2, 3), input_precision=PRECISION), 3)
    t3 = _put(zero, d, 3)

    # No mask: beyond the document's end keys and beta were loaded as zero, and T is the identity.
    target = out + (chunk * heads + head) * 4096
    target += tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 16)[None, :]
    tl.store(target, t0.to(out.dtype.element_ty))
    tl.store(target + 16, t1.to(out.dtype.element_ty))
    tl.store(target + 32, t2.to(out.dtype.element_ty))
    tl.store(target + 48, t3.to(out.dtype.element_ty))


@jit
def scan_kernel(
    k, k_rstd, v, g, beta, inverse, initial, states, writes, final, bounds, first, heads, group,
    k_row, k_head, v_row, v_head,
    INITIAL: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    column, head, document, start, end, at_document, element, in_state = document_state(
        bounds, heads, KEY, VALUE, BLOCK_K, BLOCK_V
    )
    matrix = tl.load(first + document).to(tl.int64) * heads + head
    key_head = head // group
    i = tl.arange(0, 64)
    along_k = tl.arange(0, BLOCK_K)
    if INITIAL:
        state = tl.load(initial + at_document, mask=in_state, other=0.0).to(tl.float32)
    else:
        state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for at in range(start, end, 64):
        row = at + i
        inside = row < end
        keys = load_rows(k + key_head * k_head, row, inside, k_row, along_k, KEY)
        values = load_rows(v + head * v_head, row, inside, v_row, column, VALUE)
        rstd = load_scalars(k_rstd, row, inside, key_head, heads // group)
        strength = load_scalars(beta, row, inside, head, heads)
        log = log_decay(g, row, inside, head, heads)
        total = at_end(log, 64)
        # The running state stays fp32. What this chunk reads is the rounded copy that is stored, so
        # that the output and the backward pass see the same S.
        narrow = state.to(keys.dtype)
        tl.store(states + matrix * KEY * VALUE + element, narrow, mask=in_state)
        read = product(keys, narrow) * (rstd * tl.exp(log))[:, None]
        error = strength[:, None] * (values.to(tl.float32) - read)
        # No mask: T of a chunk is always written whole.
        solve = tl.load(inverse + square(i, matrix))
        write = product(solve, error.to(keys.dtype))
        store_head(writes, row, inside, head, heads, column, VALUE, write)
        # k~ scales rows of k; here it scales rows of v' instead, whose sums are in fp32 already.
        write *= (rstd * tl.exp(total - log))[:, None]
        state = state * tl.exp(total) + product(tl.trans(keys), write.to(keys.dtype))
        # Chunks come first in S and T, heads second.
        matrix += heads
    tl.store(final + at_document, state, mask=in_state)


@jit
def output_kernel(
    q, q_rstd, k, k_rstd, g, states, writes, out, starts, ends, heads, group, q_row, q_head, k_row,
    k_head, scale,
    KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    chunk, head, key_head, row, inside = chunk_tokens(starts, ends, group)
    column = tl.program_id(2).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    scores = tl.zeros((64, 64), tl.float32)
    result = tl.zeros((64, BLOCK_V), tl.float32)
    at_state = states + (chunk * heads + head) * KEY * VALUE
    # Both products reduce over K: one pass loads each tile of q once for the two.
    for at in range(0, KEY, BLOCK_K):
        along_k = at + tl.arange(0, BLOCK_K)
        queries = load_rows(q + key_head * q_head, row, inside, q_row, along_k, KEY)
        keys = load_rows(k + key_head * k_head, row, inside, k_row, along_k, KEY)
        state = load_rows(at_state, along_k, along_k < KEY, VALUE, column, VALUE)
        scores += product(queries, tl.trans(keys))
        result += product(queries, state)
    q_scale = load_scalars(q_rstd, row, inside, key_head, heads // group) * scale
    k_scale = load_scalars(k_rstd, row, inside, key_head, heads // group)
    log = log_decay(g, row, inside, head, heads)
    scores *= q_scale[:, None] * k_scale[None, :] * decay_matrix(log, 64)
    written = load_head(writes, row, inside, head, heads, column, VALUE)
    result *= (q_scale * tl.exp(log))[:, None]
    result += product(scores.to(written.dtype), written)
    store_head(out, row, inside, head, heads, column, VALUE, result)


def invert(x: Launch) -> Tensor:
    """T (chunks, Hv, C, C) in the dtype of k."""
    out, tile = x.empty(x.table.chunks, x.heads, CHUNK, CHUNK), x.tile("inverse")
    # The blocks of T take about as many operations as one product of two of its size.
    operations = x.operations(keys=1) + 2.0 * out.numel() * CHUNK
    with on_device(x.k):
        launch(inverse_kernel, (x.table.chunks, x.heads), operations)(
            x.k, x.k_rstd, x.g, x.beta, out, x.table.starts, x.table.ends, x.heads, x.group,
            *x.k.stride()[:2], KEY=x.key, BLOCK_K=tile.keys, PRECISION=PRECISION,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def scan(x: Launch, inverse: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """S of every chunk (chunks, Hv, K, V), v' (N, Hv, V), final states (D, Hv, K, V) fp32."""
    states = x.empty(x.table.chunks, x.heads, x.key, x.value)
    writes = x.empty(*x.v.shape)
    final = x.empty(x.table.documents, x.heads, x.key, x.value, dtype=torch.float32)
    start = final if initial is None else initial.contiguous()
    options = x.options("scan")
    grid = (cdiv(x.value, options["BLOCK_V"]), x.heads, x.table.documents)
    with on_device(x.k):
        launch(scan_kernel, grid, x.operations(states=2, values=1))(
            x.k, x.k_rstd, x.v, x.g, x.beta, inverse, start, states, writes, final,
            x.table.bounds, x.table.first, x.heads, x.group, *x.k.stride()[:2],
            *x.v.stride()[:2], INITIAL=initial is not None, **options,
        )  # fmt: skip
    return states, writes, final


def output(x: Launch, states: Tensor, writes: Tensor) -> Tensor:
    """o (N, Hv, V) in the dtype of k."""
    out, options = x.empty(*x.v.shape), x.options("output")
    parts = cdiv(x.value, options["BLOCK_V"])  # each multiplies queries and keys anew
    with on_device(x.k):
        launch(
            output_kernel,
            (x.table.chunks, x.heads, parts),
            x.operations(states=1, keys=parts, values=1),
        )(
            x.q, x.q_rstd, x.k, x.k_rstd, x.g, states, writes, out, x.table.starts, x.table.ends,
            x.heads, x.group, *x.q.stride()[:2], *x.k.stride()[:2], x.key**-0.5, **options,
        )  # fmt: skip
    return out


def forward(x: GatedDeltaInputs) -> tuple[Tensor, Tensor, GatedDeltaSaved]:
    """As `kernels.delta_net.gated_delta_forward`."""
    operands = prepare(x)
    inverse = invert(operands)
    states, writes, last = scan(operands, inverse, x.initial_state)
    out = output(operands, states, writes)
    return out.to(x.v.dtype), last, GatedDeltaSaved(inverse, states, writes)
