"""SwiGLU of bf16 tensors on a CPU, compiled by numba.

`swiglu` has the maths. One pass over what torch's ops convert to fp32 and back tensor by tensor. h,
and the gradients, are rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kernels.runtime.cores import over_cores
from kernels.runtime.lanes import LANES, Lanes, lane_op, rows_of

_LEAST_ELEMENTS = 1 << 15
_STEP = 2 * LANES


def swiglu_forward_rows(gate: Tensor, up: Tensor, h: Tensor) -> None:
    """Write h (N, I) of gate and up; rows may lie apart."""
    _over_rows(_forward(), gate, up, h)


def swiglu_backward_rows_(dh: Tensor, gate: Tensor, up: Tensor, keep_h: bool) -> None:
    """Overwrite gate and up (N, I) with their gradients, and dh with h where that is kept."""
    _over_rows(_backward(keep_h), gate, up, dh)


def _over_rows(loop: Any, gate: Tensor, up: Tensor, other: Tensor) -> None:
    rows, width = gate.shape
    layout = (*rows_of(gate), *rows_of(up), *rows_of(other))

    def part(begin: int, end: int) -> None:
        loop(layout, width, begin, end)

    over_cores(rows, max(1, _LEAST_ELEMENTS // width), part)


def _row_loop(op: Any) -> Any:
    """The loop that calls `op` for every vector of three matrices, without Python's lock."""
    from numba import njit

    def loop(layout, width, begin, end):  # type: ignore[no-untyped-def]
        gate, gate_row, up, up_row, other, other_row = layout
        for row in range(begin, end):
            g, u, h = gate + row * gate_row, up + row * up_row, other + row * other_row
            for at in range(0, 2 * width, _STEP):
                op((g + at, u + at, h + at), ())

    return njit(nogil=True)(loop)


@functools.cache
def _forward() -> Any:
    def body(lanes: Lanes, addresses: Sequence[Any], scalars: Sequence[Any]) -> None:
        gate_at, up_at, h_at = addresses
        gate, up = lanes.bf16(gate_at), lanes.bf16(up_at)
        lanes.to_bf16(lanes.mul(lanes.mul(gate, lanes.sigmoid(gate)), up), h_at)

    return _row_loop(lane_op(body))


@functools.cache
def _backward(keep_h: bool) -> Any:
    def body(lanes: Lanes, addresses: Sequence[Any], scalars: Sequence[Any]) -> None:
        gate_at, up_at, dh_at = addresses
        gate, up, dh = (lanes.bf16(at) for at in addresses)
        one = lanes.number(1.0)
        sigmoid = lanes.sigmoid(gate)
        silu = lanes.mul(gate, sigmoid)
        slope = lanes.mul(sigmoid, lanes.fma(gate, lanes.sub(one, sigmoid), one))
        lanes.to_bf16(lanes.mul(lanes.mul(dh, up), slope), gate_at)
        lanes.to_bf16(lanes.mul(dh, silu), up_at)
        if keep_h:
            lanes.to_bf16(lanes.mul(silu, up), dh_at)

    return _row_loop(lane_op(body))
