"""Quantise a weight matrix to one of GGUF's block formats.

Which weights count more in a block follows from their size, or where the activations are known from
these: with the mean square v_j of input j, the error of an output is sum_j v_j (x_j - x'_j)^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gguf import k_quants, simple_blocks

_CHUNK = 1 << 17
"""Weights at a time: the search holds about ten fp32 copies of them."""
_LEAST_IMPORTANCE = 1e-5
"""Of an input, over the mean of all."""


@dataclass(frozen=True)
class BlockFormat:
    """`size` weights become `bytes` bytes; `number` is GGUF's id of the format."""

    number: int
    size: int
    bytes: int
    encode: Callable[[Tensor, Tensor], Tensor]


FORMATS = {
    "q4_0": BlockFormat(2, 32, 18, simple_blocks.q4_0),
    "q5_0": BlockFormat(6, 32, 22, simple_blocks.q5_0),
    "q5_1": BlockFormat(7, 32, 24, simple_blocks.q5_1),
    "q8_0": BlockFormat(8, 32, 34, simple_blocks.q8_0),
    "q4_k": BlockFormat(12, 256, 144, k_quants.q4_k),
    "q5_k": BlockFormat(13, 256, 176, k_quants.q5_k),
    "q6_k": BlockFormat(14, 256, 210, k_quants.q6_k),
}


@torch.no_grad()
def quantize(weight: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """The bytes (rows, columns / size * bytes) of a matrix (rows, columns) of any floating type.

    `importance` (columns,) is the mean square of each input, where it is known. Raises `KeyError`
    for an unknown format, `ValueError` for rows that are no multiple of its blocks or values that
    are not finite.
    """
    form = FORMATS[kind]
    rows, columns = weight.shape
    if columns % form.size:
        raise ValueError(f"rows of {columns} are no multiple of {form.size}, a block of {kind}")
    out = torch.empty(rows, columns // form.size * form.bytes, dtype=torch.uint8)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = weight[start : start + step].float()
        if not torch.isfinite(part).all():
            raise ValueError("the weight holds values that are not finite")
        blocks = form.encode(
            part.reshape(-1, form.size), _weights(part, importance).reshape(-1, form.size)
        )
        out[start : start + step] = blocks.view(part.shape[0], -1)
    return out


def _weights(part: Tensor, importance: Tensor | None) -> Tensor:
    """How much the error of each weight counts."""
    if importance is None:
        return part.abs() + part.square().mean(-1, keepdim=True).sqrt()
    relative = importance.float() / importance.float().mean().clamp_min(1e-30)
    # An input that was silent on the calibration rows may speak on others.
    return relative.clamp_min(_LEAST_IMPORTANCE).expand_as(part)
