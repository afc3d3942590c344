"""Rotary embedding: frequencies for every rope type that is read.

    inv_i = theta^(-2 i / D),  i < D / 2;   angle = position * inv_i

D is the number of elements of a head that are rotated.

- linear: inv / factor.
- dynamic: a document of L > O tokens has theta (f L / O - f + 1)^(D / (D - 2)) for theta, f the
  factor and O the positions that the model was made for; a shorter one is not scaled.
- llama3: wavelengths longer than O / low_freq_factor are divided by factor, those shorter than
  O / high_freq_factor are kept, those between are interpolated (Llama 3.1's published code).
- yarn: inv / factor below, inv above, and a ramp between the dimensions at which O positions make
  beta_slow and beta_fast turns; cos and sin are scaled by the attention factor
  (Peng et al. 2023, arXiv 2309.00071).

O is `original_max_position_embeddings`. Angles are fp32, as in the models' own training code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.config.model_config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """inv (rotary_dim / 2,) fp32 on the CPU, and the factor that scales cos and sin."""
    rope, dim = config.rope_parameters, config.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim
    inv = 1.0 / (rope["rope_theta"] ** exponents)
    kind = rope["rope_type"]
    if kind == "linear":
        return inv / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(inv, rope), 1.0
    if kind == "yarn":
        return _yarn(inv, rope, dim)
    return inv, 1.0


def _llama3(inv: Tensor, rope: Mapping[str, Any]) -> Tensor:
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / inv
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv / rope["factor"] + smooth * inv
    scaled = torch.where(wavelength > original / low, inv / rope["factor"], between)
    return torch.where(wavelength < original / high, inv, scaled)


def _yarn(inv: Tensor, rope: Mapping[str, Any], dim: int) -> tuple[Tensor, float]:
    factor, original = rope["factor"], rope["original_max_position_embeddings"]
    base = rope["rope_theta"]

    def dimension(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(rope.get("beta_fast", 32.0))
    high = dimension(rope.get("beta_slow", 1.0))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    steps = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((steps - low) / (high - low)).clamp(0, 1)
    scaled = inv / factor * ramp + inv * (1 - ramp)
    return scaled, _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    def mscale(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1.0)


class Rotary:
    """cos and sin for given positions, computed once per batch, not per layer."""

    def __init__(self, config: ModelConfig) -> None:
        self.inv, self.factor = inverse_frequencies(config)
        rope = config.rope_parameters
        self.dynamic = rope if rope["rope_type"] == "dynamic" else None

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """position_ids (N,) -> cos, sin (N, D / 2) in fp32, or fp64 for an fp64 model."""
        if self.inv.device != position_ids.device:
            self.inv = self.inv.to(position_ids.device)
        inv = self.inv if self.dynamic is None else self._stretched(position_ids, self.dynamic)
        angles = position_ids.float().unsqueeze(1) * inv
        wide = torch.promote_types(dtype, torch.float32)
        return (angles.cos() * self.factor).to(wide), (angles.sin() * self.factor).to(wide)

    def _stretched(self, position_ids: Tensor, rope: Mapping[str, Any]) -> Tensor:
        """inv (N, D / 2) of every token, by the length of its document, which begins at 0."""
        factor, original = rope["factor"], rope["original_max_position_embeddings"]
        dim = 2 * self.inv.shape[0]
        document = (position_ids == 0).cumsum(0)
        last = torch.zeros(position_ids.shape[0] + 1, dtype=torch.int64, device=document.device)
        last = last.scatter_reduce(0, document, position_ids.long(), "amax")
        length = (last + 1).clamp(min=original)[document].float().unsqueeze(1)
        # At least 1 but for rounding, which a great factor makes much of.
        longer = (factor * length / original - (factor - 1.0)).clamp(min=1.0)
        stretch = longer ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=document.device).float() / dim
        inv: Tensor = 1.0 / (rope["rope_theta"] * stretch) ** exponents
        return inv
