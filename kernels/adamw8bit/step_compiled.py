"""The 8-bit AdamW step on a CPU, compiled by numba.

The package has the maths. A row of 256 elements is decoded, updated and stored again while it lies
in the processor's first cache: a step moves 16 bytes an element, where torch's AdamW with fp32
moments moves 28. Every operation is rounded where the torch ops of `adamw_slab_` round it, and
fused where they are: codes and scales are the same bits. Parameters may differ in the last bit of
their update, because torch's square root is not always the nearest number and this one is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.adamw8bit import ROW, ZERO_CODE, Update
from kernels.adamw8bit.dynamic_map import GRID_STEPS, arrays
from kernels.adamw8bit.launch import FlatMoments
from kernels.runtime.cores import over_cores

_LEAST_ROWS = 1024
_TINY = np.float32(torch.finfo(torch.float32).tiny)
_STEPS = np.float32((GRID_STEPS - 1) / 2)


def adamw_rows_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first_rows: Sequence[int],
    moments: FlatMoments,
    update: Update,
    grad_scale: float,
) -> None:
    """One step of `params`, fp32 and contiguous as their `grads` are, in place.

    The 8-bit moments of parameter i begin at row `first_rows[i]`; they are rounded by the grid.
    `grad_scale` multiplies the gradients as they are read.
    """
    table = np.empty((4, len(params)), dtype=np.int64)
    rows = 0
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        table[:, i] = param.data_ptr(), grad.data_ptr(), param.numel(), first_rows[i]
        rows += -(-param.numel() // ROW)
    stored = tuple(
        part.numpy()
        for part in (moments.m_codes, moments.v_codes, moments.m_absmax, moments.v_absmax)
    )
    maps = arrays(True), arrays(False)
    beta1, beta2 = update.beta1, update.beta2
    rates = (beta1, 1.0 - beta1, beta2, 1.0 - beta2)
    rest = (update.decay, update.denominator_scale, update.eps, update.step_size)
    numbers = tuple(np.float32(number) for number in (grad_scale, *rates, *rest))
    loop = _compiled()

    def part(begin: int, end: int) -> None:
        loop(table, stored, maps, numbers, begin, end)

    over_cores(rows, _LEAST_ROWS, part)


@functools.cache
def _compiled() -> Any:
    """The loop over rows `begin:end` of all parameters end to end; it runs without Python's lock.

    Compiling takes about two seconds.
    """
    from numba import carray, njit, types
    from numba.extending import intrinsic

    @intrinsic
    def floats_at(context, address):  # type: ignore[no-untyped-def]
        kind = types.CPointer(types.float32)

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.inttoptr(args[0], context.get_value_type(kind))

        return kind(types.int64), generate

    @intrinsic
    def fma(context, a, b, c):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.fma(*args)

        return types.float32(types.float32, types.float32, types.float32), generate

    compiled = njit(nogil=True, error_model="numpy")

    # Each loop below is simple enough for LLVM's vectoriser; one loop of all of them is not.
    @compiled
    def decode(values, codes, table, scale):  # type: ignore[no-untyped-def]
        for i in range(ROW):
            values[i] = table[codes[i]] * scale

    @compiled
    def update(m, v, param, grad, numbers):  # type: ignore[no-untyped-def]
        scale, beta1, rest1, beta2, rest2 = numbers[:5]
        decay, denominator, eps, size = numbers[5:]
        for i in range(param.size):
            g = grad[i] * scale
            m[i] = fma(g, rest1, m[i] * beta1)
            v[i] = fma(rest2 * g, g, v[i] * beta2)
            root = np.sqrt(v[i]) / denominator + eps
            param[i] = param[i] * decay + (size * m[i]) / root

    @compiled
    def largest(bits):  # type: ignore[no-untyped-def]
        """The magnitude of a row's largest element: positive floats are ordered as their bits."""
        most = np.int32(0)
        for i in range(ROW):
            most = max(most, bits[i] & np.int32(0x7FFFFFFF))
        return most

    @compiled
    def to_steps(values, steps, inverse, shift):  # type: ignore[no-untyped-def]
        for i in range(ROW):
            steps[i] = np.int32((values[i] * inverse + shift) * _STEPS + np.float32(0.5))

    @compiled
    def look_up(codes, steps, grid):  # type: ignore[no-untyped-def]
        for i in range(codes.size):
            codes[i] = grid[np.uint32(steps[i])]

    @compiled
    def store(values, steps, codes, count, padding, grid):  # type: ignore[no-untyped-def]
        """Quantise a row, of which `count` elements are a parameter's; returns its scale."""
        values[count:] = np.float32(0.0)
        steps[0] = largest(values.view(np.int32))
        absmax = steps.view(np.float32)[0]
        shift = np.float32(1.0) if absmax != np.float32(0.0) else np.float32(0.0)
        to_steps(values, steps, np.float32(1.0) / max(absmax, _TINY), shift)
        look_up(codes[:count], steps, grid)
        codes[count:] = padding
        return absmax

    @compiled
    def loop(table, moments, maps, numbers, begin, end):  # type: ignore[no-untyped-def]
        m_codes, v_codes, m_scales, v_scales = moments
        (m_map, m_grid), (v_map, v_grid) = maps
        m, v = np.empty(ROW, np.float32), np.empty(ROW, np.float32)
        steps = np.empty(ROW, np.int32)
        done = 0
        for index in range(table.shape[1]):
            numel, first = table[2, index], table[3, index]
            rows = (numel + ROW - 1) // ROW
            low, high = max(begin - done, 0), min(end - done, rows)
            done += rows
            if low >= high:
                continue
            param = carray(floats_at(table[0, index]), numel)
            grad = carray(floats_at(table[1, index]), numel)
            for row in range(low, high):
                at, own = row * ROW, first + row
                count = min(ROW, numel - at)
                decode(m, m_codes[own], m_map, m_scales[own])
                decode(v, v_codes[own], v_map, v_scales[own])
                update(m, v, param[at : at + count], grad[at : at + count], numbers)
                m_scales[own] = store(m, steps, m_codes[own], count, np.uint8(ZERO_CODE), m_grid)
                v_scales[own] = store(v, steps, v_codes[own], count, np.uint8(0), v_grid)

    return loop
