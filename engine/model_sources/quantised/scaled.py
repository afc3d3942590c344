"""8-bit weights with scales: fp8, and compressed-tensors' int8 and float8.

A weight is (code - zero_point) * scale in fp32, rounded once to the model's type. The shape of the
scales says what one belongs to, for a weight (out, in):

    (), (1,), (1, 1)           the whole tensor
    (out,), (out, 1)           an output channel
    (out, in / g)              a group of g columns of a row
    (out / a, in / b)          a block of a rows and b columns, rounded up (DeepSeek, Qwen3-FP8)

`weight_scale_inv` multiplies too, whatever its name says. What a file says of activations
(`input_scale`) does not concern weights.
Sources: transformers' `finegrained_fp8` and `fbgemm_fp8`, compressed-tensors' `forward.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.model_sources.safetensors.stored_tensors import StoredTensor

_USUAL_BLOCK = (128, 128)
_ROWS = 256


@dataclass(frozen=True)
class ScaledTensor:
    """A weight of 8-bit codes with scales, (out, in) or (experts, out, in).

    `block` are the rows and columns of a block where the configuration says so. `tensor` decodes
    to `dtype`. Raises `CheckpointError` where the scales do not fit.
    """

    name: str
    weight: StoredTensor
    scale: StoredTensor
    zero_point: StoredTensor | None
    block: tuple[int, int] | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self._spans(self.shape[-2:], self._scale_shape())

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def tensor(self) -> Tensor:
        """The decoded weight, in memory of its own."""
        codes, scale = self.weight.tensor(), self.scale.tensor().float()
        zero = None if self.zero_point is None else self.zero_point.tensor().float()
        out = torch.empty(self.shape, dtype=self.dtype)
        if len(self.shape) == 2:
            self._decode(codes, scale, zero, out)
            return out
        for expert in range(self.shape[0]):
            per_expert = scale if scale.numel() == 1 else scale[expert]
            self._decode(
                codes[expert], per_expert, None if zero is None else zero[expert], out[expert]
            )
        return out

    def codes(self) -> None:
        """None: no operation here computes with such codes."""

    @property
    def form(self) -> str:
        """fp8, or int8 with scales."""
        return "fp8" if self.weight.dtype.is_floating_point else "int8 with scales"

    def release(self) -> None:
        """Let go of the pages of all parts."""
        for part in (self.weight, self.scale, self.zero_point):
            if part is not None:
                part.release()

    def _decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None, out: Tensor) -> None:
        """Decode one matrix into `out`, some rows at a time."""
        rows, columns = codes.shape
        height, width = self._spans((rows, columns), tuple(scale.shape))
        grid = scale.reshape(-(-rows // height), -(-columns // width))
        shift = None if zero is None else zero.reshape(grid.shape)
        slab = _ROWS if len(grid) == 1 else -(-_ROWS // height) * height
        for start in range(0, rows, slab):
            part = codes[start : start + slab].float()
            if shift is not None:
                part -= _spread(shift, start, part, height, width)
            out[start : start + slab] = part.mul_(_spread(grid, start, part, height, width))

    def _scale_shape(self) -> tuple[int, ...]:
        """The shape of one matrix's scales."""
        shape = self.scale.shape
        if len(self.shape) == 2 or math.prod(shape) == 1:
            return shape
        return shape[1:] if shape[:1] == self.shape[:1] else (0,)

    def _spans(self, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that one scale belongs to."""
        rows, columns = shape
        count = math.prod(scales)
        if count == 1:
            return rows, columns
        if scales in ((rows,), (rows, 1)):
            return 1, columns
        for height, width in ([self.block] if self.block else []) + [_USUAL_BLOCK]:
            if scales == (-(-rows // height), -(-columns // width)):
                return height, width
        if len(scales) == 2 and scales[0] == rows and columns % scales[1] == 0:
            return 1, columns // scales[1]
        raise CheckpointError(
            f"{self.weight.file.path}: tensor {self.name} of shape {list(self.shape)} has scales "
            f"of shape {list(self.scale.shape)}; expected one for the tensor, for each row, for "
            "each group of a row's columns or for each block that the configuration names."
        )


def _spread(grid: Tensor, start: int, part: Tensor, height: int, width: int) -> Tensor:
    """The entries of `grid` for the rows of `part`, which begin with row `start`."""
    rows, columns = part.shape
    own = grid[start // height : -(-(start + rows) // height)]
    return own.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
