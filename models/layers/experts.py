"""The experts of a mixture: parameters only; the maths lives in `kernels.moe`.

Dense weights are two parameters for all experts, named and shaped as transformers 5 holds them:
`gate_up_proj` (E, 2 I, H), rows of gate then of up, and `down_proj` (E, H, I). Quantised they are
three weights, one for each projection. LoRA pairs are per expert and projection; the product of a
pair is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kernels.linear.projection import QuantizedWeight
from kernels.moe.grouped_matmul import ExpertProjection, ExpertRowAdapter, ExpertWeights
from kernels.nf4 import NF4Weight
from kernels.nf4.planar import PlanarNF4Weight
from models.layers.linear import RowGroups

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

QuantizedExperts = NF4Weight | PlanarNF4Weight | tuple[QuantizedWeight, ...]
"""One projection of all experts: one weight (E, out, in), or one (out, in) for each."""


class ExpertAdapter(nn.Module):
    """The LoRA pairs of one projection: lora_A (E, r, in), lora_B (E, out, r), or None."""

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, count: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.count, self.in_features, self.out_features = count, in_features, out_features
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scale = 1.0
        self.dropout = 0.0
        self.named: dict[str, tuple[Tensor, Tensor, float]] = {}

    def attach(
        self, rank: int, scale: float, dropout: float, device: torch.device, seed: torch.Generator
    ) -> None:
        """Give every expert a trainable pair that changes nothing yet."""
        bound = 1.0 / math.sqrt(self.in_features)
        a = torch.empty(self.count, rank, self.in_features)
        b = torch.zeros(self.count, self.out_features, rank)
        self.lora_A = nn.Parameter(a.uniform_(-bound, bound, generator=seed).to(device))
        self.lora_B = nn.Parameter(b.to(device))
        self.scale, self.dropout = scale, dropout

    def set_pairs(
        self,
        pairs: Mapping[int, tuple[Tensor, ...]],
        scales: Mapping[int, float],
        dropout: float,
        device: torch.device,
    ) -> None:
        """Give experts the pairs (A, B) with the factors `scales`, both by their number.

        Ranks may differ: each is filled up with zeros to the largest, and an expert without a pair
        has zeros alone. Raises `ValueError` for a number that no expert has.
        """
        if not all(0 <= expert < self.count for expert in pairs):
            raise ValueError(f"there is no expert {max(pairs)}; the last is {self.count - 1}")
        a, b, self.scale = self.joined(pairs, scales)
        self.lora_A, self.lora_B = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))
        self.dropout = dropout

    def joined(
        self, pairs: Mapping[int, tuple[Tensor, ...]], scales: Mapping[int, float]
    ) -> tuple[Tensor, Tensor, float]:
        """The pairs of experts as A (E, r, in) and B (E, out, r), with one factor for all."""
        rank, scale = max(int(a.shape[0]) for a, *_ in pairs.values()), next(iter(scales.values()))
        a_all = torch.zeros(self.count, rank, self.in_features)
        b_all = torch.zeros(self.count, self.out_features, rank)
        for expert, (a, b, *_) in pairs.items():
            a_all[expert, : a.shape[0]] = a
            # There is one factor for all; that of another goes into its B.
            b_all[expert, :, : b.shape[1]] = b * (scales[expert] / scale)
        return a_all, b_all, scale

    def chosen(self, groups: RowGroups | None) -> tuple[ExpertRowAdapter, ...]:
        """The named pairs that a pass is computed with."""
        if groups is None or not self.named:
            return ()
        return tuple(
            ExpertRowAdapter(groups.mask(name, a.device), a, b, scale)
            for name, (a, b, scale) in self.named.items()
            if name in groups.rows
        )

    def projection(
        self, weight: ExpertWeights, groups: RowGroups | None = None
    ) -> ExpertProjection:
        """`weight` with these pairs, and with the named ones of a pass."""
        a, b, by_rows = self.lora_A, self.lora_B, self.chosen(groups)
        return ExpertProjection(weight, a, b, self.scale, self.dropout, by_rows)


class Experts(nn.Module):
    """Holds the weights of E experts of inner width I, and their LoRA pairs."""

    gate_up_proj: nn.Parameter | None
    down_proj: nn.Parameter | None

    def __init__(self, count: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.count, self.hidden, self.width = count, hidden, inner
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))
        self.gate_lora = ExpertAdapter(count, hidden, inner)
        self.up_lora = ExpertAdapter(count, hidden, inner)
        self.down_lora = ExpertAdapter(count, inner, hidden)
        self.stored: dict[str, QuantizedExperts] = {}

    def set_quantized(self, leaf: str, weights: dict[str, QuantizedExperts]) -> None:
        """Replace the parameter `leaf` by quantised weights, named as `EXPERT_PROJECTIONS`."""
        self._parameters[leaf] = None
        self.stored |= weights

    def adapters(self) -> dict[str, ExpertAdapter]:
        """Projection's name -> its pairs."""
        return {"gate_proj": self.gate_lora, "up_proj": self.up_lora, "down_proj": self.down_lora}

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        if self.down_proj is not None:
            return self.down_proj.device
        weight = self.stored["down_proj"]
        return (weight[0] if isinstance(weight, tuple) else weight).device

    def inner(self, groups: RowGroups | None = None) -> tuple[ExpertProjection, ...]:
        """Gate and up: one projection, or a pair where they are quantised or adapted."""
        joint = self.gate_up_proj
        gate: ExpertWeights
        up: ExpertWeights
        if joint is None:
            gate, up = self.stored["gate_proj"], self.stored["up_proj"]
        elif not any(p.lora_A is not None or p.named for p in (self.gate_lora, self.up_lora)):
            return (ExpertProjection(joint),)
        else:
            gate, up = joint.detach().chunk(2, 1)
        return (self.gate_lora.projection(gate, groups), self.up_lora.projection(up, groups))

    def down(self, groups: RowGroups | None = None) -> ExpertProjection:
        """The projection back to the hidden size."""
        dense = self.down_proj
        weight = self.stored["down_proj"] if dense is None else dense
        return self.down_lora.projection(weight, groups)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)
        if self.stored:
            device = fn(torch.empty(0, device=self.device)).device
            self.stored = {name: _moved(weight, device) for name, weight in self.stored.items()}
        return self


def _moved(weight: QuantizedExperts, device: torch.device) -> QuantizedExperts:
    if isinstance(weight, tuple):
        return tuple(one.to(device) for one in weight)
    return weight.to(device)
