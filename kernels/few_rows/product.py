"""x W^T for few rows of x, and W as stored.

W (out, in) is dense, of the dtype of x, or NF4 (`kernels.nf4`) or 8-bit rows
(`kernels.linear.int8`); x (N, in) and y (N, out) are fp32 or bf16. Products are added up in fp32
and rounded once: weights of codes are not rounded to the dtype of x, as they are where they are
decoded first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from kernels.few_rows.product_loop import CHUNK, MOST_ROWS, LoopKind, product_loop, weave
from kernels.linear.int8 import Int8Weight
from kernels.nf4.decode_compiled import wide_permutes
from kernels.nf4.weight import NF4Weight
from kernels.runtime.cores import over_cores, use_compiled

_LEAST_WEIGHTS = 1 << 15
_WEIGHTS_OF_A_CORE = 1 << 19
_MOST_UNWOVEN = 2
_BLOCKS = (32, 64, 128)
_DENSE = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


StoredWeight = Tensor | NF4Weight | Int8Weight


def takes_rows(x: Tensor) -> bool:
    """Whether the loops are there for the rows of x (N, in), and few enough rows.

    Not in a dispatch mode, nor where a gradient is recorded.
    """
    return (
        x.shape[0] <= MOST_ROWS
        and x.dtype in _DENSE
        and x.stride(1) == 1
        and use_compiled(x)
        and not x.is_meta
        and not torch.is_grad_enabled()
        and not is_in_torch_dispatch_mode()
    )


def takes_weight(x: Tensor, weight: StoredWeight) -> bool:
    """Whether there is a loop for W (out, in), and enough of it to be worth compiling one."""
    matrix = weight.codes if isinstance(weight, Int8Weight) else weight
    if len(matrix.shape) != 2 or matrix.numel() < _LEAST_WEIGHTS or matrix.shape[1] % CHUNK:
        return False
    if isinstance(weight, NF4Weight):
        block = weight.block_size
        return weight.device.type == "cpu" and block in _BLOCKS and not weight.shape[1] % block
    assert isinstance(matrix, Tensor)
    if not matrix.is_cpu or matrix.stride(1) != 1:
        return False
    return isinstance(weight, Int8Weight) or matrix.dtype == x.dtype


def multiply_rows(
    x: Tensor, weights: Sequence[StoredWeight], outs: Sequence[Tensor], *, add: bool = False
) -> None:
    """Write x times each weight, transposed, into its `out` (N, out), or add it there.

    x and the weights must be as `takes_rows` and `takes_weight` say, the rows of outputs those of
    any matrix of x's dtype.
    """
    woven = None
    if x.shape[0] > _MOST_UNWOVEN and not all(map(_is_fp32, weights)):
        woven = weave(x)
    calls = []
    for weight, out in zip(weights, outs, strict=True):
        own = None if _is_fp32(weight) else woven
        calls.append(_call(x if own is None else own, weight, out, add, own is not None))
    counts = [out.shape[1] for out in outs]
    least = max(1, _WEIGHTS_OF_A_CORE // x.shape[1])
    if sum(counts) < 2 * least or torch.get_num_threads() == 1:
        for (loop, arguments), count in zip(calls, counts, strict=True):
            loop(*arguments, 0, count)
        return

    def part(begin: int, end: int) -> None:
        """Rows `begin:end` of all weights, one below the other."""
        first = 0
        for (loop, arguments), count in zip(calls, counts, strict=True):
            low, high = max(begin - first, 0), min(end - first, count)
            if low < high:
                loop(*arguments, low, high)
            first += count

    over_cores(sum(counts), least, part)


def _is_fp32(weight: StoredWeight) -> bool:
    return isinstance(weight, Tensor) and weight.dtype == torch.float32


def _call(
    x: Tensor, weight: StoredWeight, out: Tensor, add: bool, woven: bool
) -> tuple[Any, tuple[Any, ...]]:
    """A loop, and its arguments but the first and last row of W."""
    (rows, columns), scales = x.shape, (0, 0, 0.0)
    kind, block = _DENSE[out.dtype], CHUNK
    if isinstance(weight, NF4Weight):
        stored, pitch, block = weight.packed, columns // 2, weight.block_size
        kind, nested, offset = "nf4", weight.nested_absmax, weight.nested_offset
        if nested is None or offset is None:
            scales = (weight.absmax.data_ptr(), 0, 0.0)
        else:
            kind = "nested"
            scales = (weight.absmax.data_ptr(), nested.data_ptr(), float(offset))
    elif isinstance(weight, Int8Weight):
        stored, pitch, kind = weight.codes, weight.codes.stride(0), "int8"
        scales = (weight.absmax.data_ptr(), 0, 0.0)
    else:
        stored, pitch = weight, weight.stride(0) * weight.itemsize
    narrow, power = out.dtype == torch.bfloat16, 1 << (rows - 1).bit_length()
    loop = product_loop(LoopKind(kind, narrow, power, wide_permutes(), woven, block))
    last = rows - 1
    return loop, (
        (stored.data_ptr(), pitch, columns),
        (x.data_ptr(), x.stride(0) * x.itemsize, last),
        (out.data_ptr(), out.stride(0) * out.itemsize, last),
        scales,
        int(add),
    )
