"""GGUF's blocks of 32 weights: Q8_0, Q4_0, Q5_0 and Q5_1.

    Q8_0   fp16 d, 32 x int8           x = d q
    Q4_0   fp16 d, 16 bytes            x = d (q - 8)
    Q5_0   fp16 d, 4 bytes, 16 bytes   x = d (q - 16)
    Q5_1   fp16 d, fp16 m, 4, 16       x = d q + m

Byte j of the 16 holds the low four bits of weight j below those of weight j + 16; the 4 bytes hold
the fifth bits of all 32, the first weight's lowest. Source: ggml's quantisation formats (MIT).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gguf.search import asymmetric, integers, symmetric


def half_bytes(values: Tensor) -> Tensor:
    """Numbers (..., 1) as the two bytes of an fp16 (..., 2)."""
    return values.to(torch.float16).view(torch.uint8)


def as_stored(values: Tensor) -> Tensor:
    """Numbers as fp16 keeps them, in fp32."""
    return values.to(torch.float16).float()


def q8_0(x: Tensor, weight: Tensor) -> Tensor:
    """Blocks (B, 32) as bytes (B, 34); the scale spans the block."""
    del weight
    d = as_stored(x.abs().amax(-1, keepdim=True) / 127)
    q = integers(x, d, -127, 127).to(torch.int8)
    return torch.cat((half_bytes(d), q.view(torch.uint8)), -1)


def q4_0(x: Tensor, weight: Tensor) -> Tensor:
    """Blocks (B, 32) as bytes (B, 18)."""
    d = as_stored(symmetric(x, weight, -8, 7))
    q = (integers(x, d, -8, 7) + 8).to(torch.uint8)
    return torch.cat((half_bytes(d), nibbles(q)), -1)


def q5_0(x: Tensor, weight: Tensor) -> Tensor:
    """Blocks (B, 32) as bytes (B, 22)."""
    d = as_stored(symmetric(x, weight, -16, 15))
    q = (integers(x, d, -16, 15) + 16).to(torch.uint8)
    return torch.cat((half_bytes(d), fifth_bits(q), nibbles(q & 15)), -1)


def q5_1(x: Tensor, weight: Tensor) -> Tensor:
    """Blocks (B, 32) as bytes (B, 24)."""
    d, m = (as_stored(part) for part in asymmetric(x, weight, 31))
    q = integers(x - m, d, 0, 31).to(torch.uint8)
    return torch.cat((half_bytes(d), half_bytes(m), fifth_bits(q), nibbles(q & 15)), -1)


def nibbles(q: Tensor) -> Tensor:
    """Four-bit numbers (B, 32) as bytes (B, 16)."""
    return q[..., :16] | (q[..., 16:] << 4)


def fifth_bits(q: Tensor) -> Tensor:
    """The fifth bits of five-bit numbers (B, 32) as bytes (B, 4)."""
    bits = (q >> 4).view(*q.shape[:-1], 4, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=q.device)
    return (bits << shifts).sum(-1, dtype=torch.uint8)
