"""Triton kernels of the causal convolution; `causal_conv1d` has the maths.

A program walks along a run of tokens with a block of channels. What a token shares with those
before it, the last three inputs and the unfinished gradients of three, goes on from token to token
in registers, so that x and dy are read once. Where a token stands in its document says how far back
it reads: nothing else is known of documents here.

Backward forms a again and finishes dx three tokens late; a run reads three tokens beyond its end,
of which it uses da alone. dw needs no atomics: every run writes its share, and the shares are
summed afterwards, so the result does not depend on the GPU.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kernels.delta_net.tiles import chunk_table
from kernels.runtime.triton_support import cdiv, jit, launch, next_power_of_2, on_device, tl

MAX_TAPS = 4
_RUN = 64
_DWEIGHT_RUNS = 256


@jit
def _before(
    x_ptr, state_ptr, row, position, document, column, inside, x_row, channels, depth,
    BACK: tl.constexpr, TAPS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """x_{row - BACK} in fp32: of the same document, else of its state, zero without one."""
    near = inside & (position >= BACK) & (BACK < TAPS)
    x = tl.load(x_ptr + (row - BACK) * x_row + column, mask=near, other=0.0).to(tl.float32)
    if STATE:
        line = document.to(tl.int64) * depth + depth + position - BACK
        far = inside & (position < BACK) & (BACK < TAPS)
        x += tl.load(state_ptr + line * channels + column, mask=far, other=0.0).to(tl.float32)
    return x


@jit
def _tap(weight_ptr, column, channels, BACK: tl.constexpr, TAPS: tl.constexpr):
    """The weight in fp32 that reads x_{t - BACK}."""
    # Taps that a shorter convolution lacks are zero, so that one body of four serves 1 to 4.
    inside = (column < channels) & (BACK < TAPS)
    at = weight_ptr + column * TAPS + (TAPS - 1 - BACK)
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@jit
def causal_conv1d_forward_kernel(
    x_ptr, weight_ptr, state_ptr, document_ptr, position_ptr, y_ptr,
    tokens, channels, run, depth, x_row,
    TAPS: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * run
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0 = _tap(weight_ptr, column, channels, 0, TAPS)
    w1 = _tap(weight_ptr, column, channels, 1, TAPS)
    w2 = _tap(weight_ptr, column, channels, 2, TAPS)
    w3 = _tap(weight_ptr, column, channels, 3, TAPS)
    known = column < channels
    position = tl.load(position_ptr + first)
    x1 = _before(
        x_ptr, x_ptr, first, position, position, column, known, x_row, 0, 0, 1, TAPS, False
    )
    x2 = _before(
        x_ptr, x_ptr, first, position, position, column, known, x_row, 0, 0, 2, TAPS, False
    )
    x3 = _before(
        x_ptr, x_ptr, first, position, position, column, known, x_row, 0, 0, 3, TAPS, False
    )
    # The loads before the loop start a run in the middle of a document; x1 to x3 then shift along.
    for step in range(run):
        row = first + step
        inside = known & (row < tokens)
        position = tl.load(position_ptr + row, mask=row < tokens, other=0)
        x = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0)
        x0 = x.to(tl.float32)
        if STATE:
            # Inputs from before a document come from its state: loaded each time, not shifted.
            document = tl.load(document_ptr + row, mask=row < tokens, other=0)
            x1 = _before(
                x_ptr, state_ptr, row, position, document, column, inside, x_row, channels, depth,
                1, TAPS, True,
            )  # fmt: skip
            x2 = _before(
                x_ptr, state_ptr, row, position, document, column, inside, x_row, channels, depth,
                2, TAPS, True,
            )  # fmt: skip
            x3 = _before(
                x_ptr, state_ptr, row, position, document, column, inside, x_row, channels, depth,
                3, TAPS, True,
            )  # fmt: skip
        else:
            # At the start of a document the last inputs in registers are another's: drop them.
            reach = tl.minimum(position, TAPS - 1)
            x1 = tl.where(reach >= 1, x1, 0.0)
            x2 = tl.where(reach >= 2, x2, 0.0)
            x3 = tl.where(reach >= 3, x3, 0.0)
        a = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        y = a / (1.0 + tl.exp(-a))
        tl.store(y_ptr + row * channels + column, y.to(x.dtype), mask=inside)
        x3 = x2
        x2 = x1
        x1 = x0


@jit
def causal_conv1d_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, position_ptr, dx_ptr, partial_ptr,
    tokens, channels, run, dy_row, x_row,
    TAPS: tl.constexpr, DWEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    first = program * run
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0 = _tap(weight_ptr, column, channels, 0, TAPS)
    w1 = _tap(weight_ptr, column, channels, 1, TAPS)
    w2 = _tap(weight_ptr, column, channels, 2, TAPS)
    w3 = _tap(weight_ptr, column, channels, 3, TAPS)
    known = column < channels
    position = tl.load(position_ptr + first)
    x1 = _before(
        x_ptr, x_ptr, first, position, position, column, known, x_row, 0, 0, 1, TAPS, False
    )
    x2 = _before(
        x_ptr, x_ptr, first, position, position, column, known, x_row, 0, 0, 2, TAPS, False
    )
    x3 = _before(
        x_ptr, x_ptr, first, position, position, column, known, x_row, 0, 0, 3, TAPS, False
    )
    # dx of the three tokens before the one at hand, as far as it is known.
    g1 = tl.zeros((BLOCK,), tl.float32)
    g2 = tl.zeros((BLOCK,), tl.float32)
    g3 = tl.zeros((BLOCK,), tl.float32)
    dw0 = tl.zeros((BLOCK,), tl.float32)
    dw1 = tl.zeros((BLOCK,), tl.float32)
    dw2 = tl.zeros((BLOCK,), tl.float32)
    dw3 = tl.zeros((BLOCK,), tl.float32)
    # Three tokens more than the run: dx of its last ones needs their da.
    for step in range(run + 3):
        row = first + step
        inside = known & (row < tokens)
        position = tl.load(position_ptr + row, mask=row < tokens, other=0)
        x0 = tl.load(x_ptr + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
        reach = tl.minimum(position, TAPS - 1)
        x1 = tl.where(reach >= 1, x1, 0.0)
        x2 = tl.where(reach >= 2, x2, 0.0)
        x3 = tl.where(reach >= 3, x3, 0.0)
        a = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
        s = 1.0 / (1.0 + tl.exp(-a))
        da = dy * s * (1.0 + a * (1.0 - s))
        if DWEIGHT:
            # Those three belong to the next run, which counts them.
            own = tl.where(step < run, da, 0.0)
            dw0 += own * x0
            dw1 += own * x1
            dw2 += own * x2
            dw3 += own * x3
        # This token's da reaches back to as many tokens as its document has before it.
        g1 += w1 * tl.where(reach >= 1, da, 0.0)
        g2 += w2 * tl.where(reach >= 2, da, 0.0)
        g3 += w3 * tl.where(reach >= 3, da, 0.0)
        # Only now has dx of three tokens ago got its last term.
        done = known & (step >= 3) & (row - 3 < tokens)
        tl.store(dx_ptr + (row - 3) * channels + column, g3.to(dx_ptr.dtype.element_ty), mask=done)
        g3 = g2
        g2 = g1
        g1 = w0 * da
        x3 = x2
        x2 = x1
        x1 = x0
    if DWEIGHT:
        share = partial_ptr + program * TAPS * channels + column
        tl.store(share, dw0, mask=known)
        tl.store(share + channels, dw1, mask=known & (TAPS > 1))
        tl.store(share + 2 * channels, dw2, mask=known & (TAPS > 2))
        tl.store(share + 3 * channels, dw3, mask=known & (TAPS > 3))


def tile(channels: int, dweight: bool = False) -> tuple[int, int]:
    """Channels of one program (a power of two) and its warps.

    With four more sums, those of dweight, a thread has registers for fewer channels.
    """
    return min(256, next_power_of_2(channels)), 4 if dweight else 2


@lru_cache(maxsize=16)
def token_positions(bounds: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Document of every token and its position there, (N,) int32 each; the same for every layer.

    They are made on the device from boundaries that the gated delta rule needs there too.
    """
    edges = chunk_table(bounds, device).bounds
    row = torch.arange(bounds[-1], dtype=torch.int32, device=device)
    document = torch.searchsorted(edges, row, right=True, out_int32=True) - 1
    return document, row - edges.index_select(0, document)


def _rows_adjacent(x: Tensor) -> Tensor:
    """x, or a copy of it, with the channels of a token adjacent."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _taps(weight: Tensor) -> int:
    taps = weight.numel() // weight.shape[0]
    if not 1 <= taps <= MAX_TAPS:
        raise ValueError(
            f"a convolution of {taps} taps; the Triton kernels take 1 to {MAX_TAPS}, "
            "ENGINE_REFERENCE=1 runs the plain torch reference"
        )
    return taps


def _check_state(state: Tensor, documents: int, taps: int, channels: int) -> None:
    fits = state.dim() == 3 and state.shape[1] >= taps - 1
    if not fits or (state.shape[0], state.shape[2]) != (documents, channels):
        raise ValueError(
            f"state {tuple(state.shape)} does not fit; expected ({documents}, {taps - 1}, "
            f"{channels})"
        )


def forward(x: Tensor, weight: Tensor, bounds: tuple[int, ...], state: Tensor | None) -> Tensor:
    """y (N, C) contiguous, in the dtype of x; arguments as `causal_conv1d_forward`."""
    tokens, channels = x.shape
    taps = _taps(weight)
    if state is not None:
        _check_state(state, len(bounds) - 1, taps, channels)
    x, weight = _rows_adjacent(x), weight.contiguous()
    before = x if state is None else state.contiguous()
    y = torch.empty((tokens, channels), dtype=x.dtype, device=x.device)
    block, warps = tile(channels)
    if y.numel():
        document, position = token_positions(bounds, x.device)
        with on_device(x):
            launch(causal_conv1d_forward_kernel, (cdiv(tokens, _RUN), cdiv(channels, block)))(
                x, weight, before, document, position, y, tokens, channels, _RUN,
                0 if state is None else state.shape[1], x.stride(0),
                TAPS=taps, STATE=state is not None, BLOCK=block, num_warps=warps,
            )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bounds: tuple[int, ...], need_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """dx (N, C) contiguous and, if asked for, dw; arguments as `causal_conv1d_backward`."""
    tokens, channels = x.shape
    taps = _taps(weight)
    dy, x = _rows_adjacent(dy), _rows_adjacent(x)
    dx = torch.empty((tokens, channels), dtype=x.dtype, device=x.device)
    run = max(_RUN, cdiv(tokens, _DWEIGHT_RUNS)) if need_dweight else _RUN
    runs = cdiv(tokens, run)
    shares = (runs, taps, channels) if need_dweight else (0,)
    partial = torch.empty(shares, dtype=torch.float32, device=x.device)
    block, warps = tile(channels, need_dweight)
    if dx.numel():
        _, position = token_positions(bounds, x.device)
        with on_device(x):
            launch(causal_conv1d_backward_kernel, (runs, cdiv(channels, block)))(
                dy, x, weight.contiguous(), position, dx, partial, tokens, channels, run,
                dy.stride(0), x.stride(0), TAPS=taps, DWEIGHT=need_dweight, BLOCK=block,
                num_warps=warps,
            )  # fmt: skip
    if not need_dweight:
        return dx, None
    # Line j holds the tap that reads x_{t - j}, which stands in column J - 1 - j of the weight.
    return dx, partial.sum(0).flip(0).T.reshape(weight.shape).to(weight.dtype)
