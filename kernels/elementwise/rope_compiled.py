"""Rotary embedding of bf16 heads on a CPU, compiled by numba.

`rope` has the maths. Both halves of a head are read before either is written, so the rotation is in
place. Values are rounded once, as by torch's ops.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.runtime.cores import over_cores
from kernels.runtime.lanes import LANES, Lanes, lane_op, rows_of

_LEAST_ELEMENTS = 1 << 15
_STEP = 2 * LANES


def rotates_rows(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the loop serves these: halves of whole vectors, and adjacent fp32 factors."""
    factors = all(f.dtype == torch.float32 and f.stride(-1) == 1 for f in (cos, sin))
    return x.shape[-1] % (2 * LANES) == 0 and factors


def rotate_rows_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """Rotate bf16 x (N, heads, D) in place by fp32 cos, sin (N, D/2)."""
    tokens, heads, dim = x.shape
    layout = (*rows_of(x), x.stride(1) * x.itemsize, *rows_of(cos), *rows_of(sin))
    sign, loop = np.float32(-1.0 if inverse else 1.0), _loop()

    def part(begin: int, end: int) -> None:
        loop(layout, heads, dim, sign, begin, end)

    over_cores(tokens, max(1, _LEAST_ELEMENTS // (heads * dim)), part)


@functools.cache
def _loop() -> Any:
    """The loop over tokens, without Python's lock."""
    from numba import njit

    def body(lanes: Lanes, addresses: Sequence[Any], scalars: Sequence[Any]) -> None:
        first_at, second_at, cos_at, sin_at = addresses
        first, second = lanes.bf16(first_at), lanes.bf16(second_at)
        cos = lanes.load(cos_at, lanes.float)
        sin = lanes.mul(lanes.load(sin_at, lanes.float), lanes.same(scalars[0]))
        left = lanes.sub(lanes.mul(first, cos), lanes.mul(second, sin))
        right = lanes.add(lanes.mul(second, cos), lanes.mul(first, sin))
        lanes.to_bf16(left, first_at)
        lanes.to_bf16(right, second_at)

    rotate = lane_op(body)

    def loop(layout, heads, dim, sign, begin, end):  # type: ignore[no-untyped-def]
        x, x_row, x_head, cos, cos_row, sin, sin_row = layout
        for token in range(begin, end):
            c, s = cos + token * cos_row, sin + token * sin_row
            for head in range(heads):
                h = x + token * x_row + head * x_head
                for at in range(0, dim, _STEP):
                    rotate((h + at, h + dim + at, c + 2 * at, s + 2 * at), (sign,))

    return njit(nogil=True)(loop)
