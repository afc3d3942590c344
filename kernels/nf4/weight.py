"""NF4 weights: four-bit codes in blocks, with scales that are quantised too.

Maths. The flat, row-major weight is cut into blocks of `block_size`. A block stores
`absmax = max|w|` and, per element, the index of the entry of `NF4_CODE` nearest to
`w * (1 / absmax)` (Dettmers et al., "QLoRA", 2023, appendix E). Two indices share a byte, the even
element in the high nibble. Double quantisation stores the scales in 8 bits: `absmax - mean(absmax)`
in blocks of 256 in the signed dynamic map (`kernels.adamw8bit.dynamic_map`), so that

    absmax[b] = map[code[b]] * nested_absmax[b // 256] + nested_offset     (fp32)
    w[i]      = NF4_CODE[nibble[i]] * absmax[i // block_size]              (fp32, then one rounding)

Codes, scales and decoded values are bit for bit those of bitsandbytes 0.50 on a CPU, in its byte
order. The mean is torch's, whose last bit may depend on the number of threads, as it does there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

NF4_CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
    device="cpu",
)
"""The sixteen values of NF4, fp32, ascending."""

NESTED_BLOCK = 256
"""Scales per block of the second quantisation."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

NF4_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What can be quantised to NF4 and decoded from it."""


@dataclass(frozen=True, eq=False)
class NF4Tensors:
    """What NF4 weights in either order of their codes have in common."""

    def tensors(self) -> dict[str, Tensor]:
        """The weight's tensors by name."""
        return {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}

    @property
    def device(self) -> torch.device:
        absmax: Tensor = vars(self)["absmax"]
        return absmax.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.tensors().values())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same weight on `device`."""
        parts = self.tensors().items()
        return replace(
            self, **{name: part.to(device, non_blocking=non_blocking) for name, part in parts}
        )


@dataclass(frozen=True, eq=False)
class NF4Weight(NF4Tensors):
    """A weight in NF4.

    `packed` is uint8 (ceil(n / 2),). With double quantisation, `absmax` is uint8 (blocks,),
    `nested_absmax` fp32 (ceil(blocks / 256),) and `nested_offset` fp32 (); without it, `absmax` is
    fp32 and the other two are None. `shape` and `dtype` are those of the weight that was quantised.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: tuple[int, ...]
    block_size: int
    dtype: torch.dtype

    def numel(self) -> int:
        return math.prod(self.shape)
