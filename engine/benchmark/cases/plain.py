"""Plain torch versions of the ops, to compare the kernels with.

Every function computes in the dtype of its inputs, raising to fp32 where the Hugging Face models
do, so that the same text in float64 is the truth for an accuracy check. Gradients are autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from kernels.adamw8bit.dynamic_map import dynamic_map
from kernels.nf4 import NF4_CODE, NF4Weight
from kernels.nf4.weight import NESTED_BLOCK


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nf4_weight(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """A doubly quantised NF4 weight decoded by table look-ups."""
    assert weight.nested_absmax is not None and weight.nested_offset is not None
    scales = dynamic_map(True, weight.device)[weight.absmax.int()]
    nested = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: scales.numel()]
    scales = scales * nested + weight.nested_offset
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), dim=-1).view(-1).int()
    values = NF4_CODE.to(weight.device)[codes].view(-1, weight.block_size)
    return (values * scales[:, None]).to(dtype).view(weight.shape)


def nf4_codes(w: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of a weight in blocks of 64, by a search among the thresholds."""
    blocks = w.float().view(-1, 64)
    absmax = blocks.abs().amax(1)
    thresholds = ((NF4_CODE[1:] + NF4_CODE[:-1]) / 2).to(w.device)
    codes = torch.bucketize(blocks * absmax.reciprocal()[:, None], thresholds).to(torch.uint8)
    pairs = codes.view(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1], absmax


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, zero_centered: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times weight, or times 1 + weight and rounded once."""
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if zero_centered:
        return (normed * (1.0 + _wide(weight))).to(x.dtype)
    return weight * normed.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (N, heads, D) by cos, sin (N, D / 2)."""
    cos, sin = (torch.cat((t, t), -1).unsqueeze(1).to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return functional.silu(gate) * up


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of every row, in fp32 or wider."""
    return functional.cross_entropy(_wide(logits), targets, reduction="none")


def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int]) -> Tensor:
    """Causal attention of q (N, Hq, D) over k, v (N, Hkv, D), each document for itself."""
    parts = []
    for start, end in pairwise(bounds):
        heads = [x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        out = functional.scaled_dot_product_attention(
            heads[0], heads[1], heads[2], is_causal=True, enable_gqa=True
        )
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """A linear map with a LoRA pair."""
    low = functional.linear(x, a.to(x.dtype))
    return functional.linear(x, weight) + functional.linear(low, b.to(x.dtype)) * scale


def causal_conv1d(x: Tensor, weight: Tensor, bounds: Sequence[int]) -> Tensor:
    """silu of the depthwise convolution of x (N, C) by weight (C, J), each document for itself."""
    wide, taps = _wide(x), _wide(weight).unsqueeze(1)
    parts = []
    for start, end in pairwise(bounds):
        padded = functional.pad(wide[start:end].T, (weight.shape[1] - 1, 0))
        parts.append(functional.conv1d(padded.unsqueeze(0), taps, groups=x.shape[1])[0].T)
    return functional.silu(torch.cat(parts)).to(x.dtype)


def gated_rms_norm(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(w * rms(o)) * silu(z), the product in fp32 or wider."""
    return (functional.silu(_wide(z)) * rms_norm(o, weight, eps)).to(o.dtype)
