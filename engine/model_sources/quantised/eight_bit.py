"""bitsandbytes' 8-bit rows: the tensors of one weight, read and made.

For a module M a file holds, in place of `M.weight` (out, in),

    M.weight          codes, int8 (out, in)
    M.SCB             the largest magnitude of each row, fp32 (out,)
    M.weight_format   uint8 (): 0, rows as they are; the other layouts belong to old kernels

and a weight is codes * SCB / 127 (`kernels.linear.int8`). bitsandbytes rounds a weight to float16
before it makes its codes.
Source: bitsandbytes 0.50, `nn.Int8Params`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.model_sources.safetensors.stored_tensors import StoredTensor
from kernels.linear.int8 import Int8Weight, dequantize_int8, quantize_int8


@dataclass(frozen=True)
class EightBitTensor:
    """A weight in 8-bit rows; `tensor` decodes it to `dtype`.

    Raises `CheckpointError` where its tensors do not fit together or lie in another layout.
    """

    name: str
    weight: StoredTensor
    scales: StoredTensor
    layout: StoredTensor | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        where = f"{self.weight.file.path}: tensor {self.name}"
        rows = self.weight.shape[:1]
        if self.weight.dtype != torch.int8 or len(self.weight.shape) != 2:
            raise CheckpointError(
                f"{where} is {self.weight.dtype} {list(self.weight.shape)} beside an SCB; expected "
                "an int8 matrix. Download the model again."
            )
        if self.scales.shape != rows or not bool(torch.isfinite(self.scales.tensor()).all()):
            raise CheckpointError(
                f"{where} has {list(self.scales.shape)} scales, or such as are not finite; "
                f"expected one for each of its {rows[0]} rows. Download the model again."
            )
        if self.layout is not None and int(self.layout.tensor().item()) != 0:
            raise CheckpointError(
                f"{where} is stored in a layout of old GPU kernels (weight_format "
                f"{int(self.layout.tensor().item())}). Load and save it with a recent "
                "bitsandbytes, or take the original 16-bit model."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def tensor(self) -> Tensor:
        """The decoded weight (out, in), in memory of its own."""
        return dequantize_int8(self.codes(), self.dtype)

    def codes(self) -> Int8Weight:
        """The weight as it is stored, views of the file."""
        return Int8Weight(self.weight.tensor(), self.scales.tensor().float(), self.dtype)

    @property
    def form(self) -> str:
        """The words for such rows."""
        return "8-bit rows"

    def release(self) -> None:
        """Let go of the pages of all parts."""
        self.weight.release()
        self.scales.release()


def eight_bit_rows(weight: Tensor) -> Int8Weight:
    """`weight` (out, in) as bitsandbytes rounds it to 8-bit rows.

    Raises `ValueError` for a weight that float16 cannot hold.
    """
    half = weight.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError("8-bit rows are made of float16 weights, whose largest number is 65504")
    return quantize_int8(half)
