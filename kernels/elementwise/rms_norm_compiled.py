"""RMSNorm of bf16 rows on a CPU, compiled by numba.

`rms_norm` has the maths. A row is read twice while it lies in the processor's first cache: for its
mean square, and to be scaled. Values are rounded where torch's ops round them; sums are in another
order than theirs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kernels.runtime.cores import over_cores
from kernels.runtime.lanes import LANES, Lanes, lane_op, rows_of

_LEAST_ELEMENTS = 1 << 15
_STEP = 2 * LANES


def norm_rows(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, rstd: Tensor
) -> None:
    """Write norm(x) to `out` and 1 / rms to rstd (N,); x (N, H) takes `residual` first, if given.

    All are bf16 but rstd, which is fp32; weight (H,) is contiguous. `out` may be x.
    """
    added = x if residual is None else residual
    layout = (*rows_of(x), *rows_of(added), *rows_of(out), weight.data_ptr())
    loop = _forward(residual is not None)
    _over_rows(loop, x, layout, (rstd.numpy(), np.float32(eps)))


def norm_gradient_rows(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dresidual: Tensor | None,
    out: Tensor,
) -> None:
    """Write dx (N, H), with `dresidual` added if given, to `out`, which may be any of the others.

    All are bf16 but rstd (N,), which is fp32; weight (H,) is contiguous.
    """
    added = dy if dresidual is None else dresidual
    layout = (*rows_of(dy), *rows_of(x), *rows_of(added), *rows_of(out), weight.data_ptr())
    _over_rows(_backward(dresidual is not None), x, layout, (rstd.numpy(),))


def _over_rows(loop: Any, x: Tensor, layout: tuple[int, ...], numbers: tuple[Any, ...]) -> None:
    rows, width = x.shape

    def part(begin: int, end: int) -> None:
        sums = np.empty(LANES, np.float32)
        loop(layout, numbers, (sums, sums.ctypes.data), width, begin, end)

    over_cores(rows, max(1, _LEAST_ELEMENTS // width), part)


@functools.cache
def _forward(adds: bool) -> Any:
    """The loop over rows, without Python's lock."""
    from numba import njit

    def squares(lanes: Lanes, addresses: Sequence[Any], scalars: Sequence[Any]) -> None:
        x_at, added_at, sums_at = addresses
        x = lanes.bf16(x_at)
        if adds:
            x = lanes.rounded(lanes.add(x, lanes.bf16(added_at)))
            lanes.to_bf16(x, x_at)
        sums = lanes.load(sums_at, lanes.float)
        lanes.store(lanes.fma(x, x, sums), sums_at)

    def scaled(lanes: Lanes, addresses: Sequence[Any], scalars: Sequence[Any]) -> None:
        x_at, weight_at, out_at = addresses
        unit = lanes.rounded(lanes.mul(lanes.bf16(x_at), lanes.same(scalars[0])))
        lanes.to_bf16(lanes.mul(unit, lanes.bf16(weight_at)), out_at)

    square, scale = lane_op(squares), lane_op(scaled)

    def loop(layout, numbers, sums, width, begin, end):  # type: ignore[no-untyped-def]
        x_at, x_row, added_at, added_row, out_at, out_row, weight = layout
        (rstd, eps), (partial, sums_at) = numbers, sums
        for row in range(begin, end):
            x, added, out = x_at + row * x_row, added_at + row * added_row, out_at + row * out_row
            partial[:] = np.float32(0.0)
            for at in range(0, 2 * width, _STEP):
                square((x + at, added + at, sums_at), ())
            own = np.float32(1.0) / np.sqrt(np.float32(partial.sum() / width) + eps)
            rstd[row] = own
            for at in range(0, 2 * width, _STEP):
                scale((x + at, weight + at, out + at), (own,))

    return njit(nogil=True, error_model="numpy")(loop)


@functools.cache
def _backward(adds: bool) -> Any:
    """The loop over rows, without Python's lock."""
    from numba import njit

    def products(lanes: Lanes, addresses: Sequence[Any], scalars: Sequence[Any]) -> None:
        dy_at, x_at, weight_at, sums_at = addresses
        product = lanes.mul(lanes.bf16(dy_at), lanes.bf16(x_at))
        sums = lanes.load(sums_at, lanes.float)
        lanes.store(lanes.fma(product, lanes.bf16(weight_at), sums), sums_at)

    def gradients(lanes: Lanes, addresses: Sequence[Any], scalars: Sequence[Any]) -> None:
        dy_at, x_at, weight_at, added_at, out_at = addresses
        mean, rstd = (lanes.same(scalar) for scalar in scalars)
        direct = lanes.mul(lanes.bf16(dy_at), lanes.bf16(weight_at))
        dx = lanes.mul(lanes.sub(direct, lanes.mul(lanes.bf16(x_at), mean)), rstd)
        if adds:
            dx = lanes.add(dx, lanes.bf16(added_at))
        lanes.to_bf16(dx, out_at)

    product, gradient = lane_op(products), lane_op(gradients)

    def loop(layout, numbers, sums, width, begin, end):  # type: ignore[no-untyped-def]
        dy_at, dy_row, x_at, x_row, added_at, added_row, out_at, out_row, weight = layout
        (rstd,), (partial, sums_at) = numbers, sums
        for row in range(begin, end):
            dy, x = dy_at + row * dy_row, x_at + row * x_row
            added, out, own = added_at + row * added_row, out_at + row * out_row, rstd[row]
            partial[:] = np.float32(0.0)
            for at in range(0, 2 * width, _STEP):
                product((dy + at, x + at, weight + at, sums_at), ())
            mean = np.float32(partial.sum() * own * own / width)
            for at in range(0, 2 * width, _STEP):
                gradient((dy + at, x + at, weight + at, added + at, out + at), (mean, own))

    return njit(nogil=True, error_model="numpy")(loop)
