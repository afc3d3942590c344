"""The experts of a mixture: parameters only; the maths lives in `kernels.moe`.

Dense weights are two parameters for all experts, named and shaped as transformers 5 holds them:
`gate_up_proj` (E, 2 I, H), rows of gate then of up, and `down_proj` (E, H, I). Quantised they are
three weights, one for each projection. LoRA pairs are per expert and projection; the product of a
pair is never formed. Divided over ranks, each has its experts' weights and pairs alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.linear.projection import QuantizedWeight
from kernels.moe.expert_share import share_of
from kernels.moe.grouped_matmul import ExpertProjection, ExpertRowAdapter, ExpertWeights
from kernels.nf4 import NF4Weight
from kernels.nf4.planar import PlanarNF4Weight
from kernels.runtime.ranks import ONE_RANK, Ranks
from models.layers.linear import RowGroups

EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

QuantizedExperts = NF4Weight | PlanarNF4Weight | tuple[QuantizedWeight, ...]
"""One projection of all experts: one weight (E, out, in), or one (out, in) for each."""


@dataclass(frozen=True)
class ExpertShare:
    """Which of `total` experts this process has: all, or an equal share of those of `ranks`.

    Raises `ValueError` where they cannot be divided equally.
    """

    total: int
    ranks: Ranks = ONE_RANK

    def __post_init__(self) -> None:
        if self.total % self.ranks.size:
            raise ValueError(
                f"{self.total} experts cannot be divided equally over {self.ranks.size} processes"
            )

    @property
    def count(self) -> int:
        return self.total // self.ranks.size

    @property
    def first(self) -> int:
        return self.ranks.rank * self.count

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of all experts (E, ...), in memory of its own where it is one."""
        if self.ranks.size == 1:
            return tensor
        return tensor[self.first : self.first + self.count].clone()

    def of_weight(self, weight: QuantizedExperts) -> QuantizedExperts:
        """The part of quantised weights of all experts."""
        if self.ranks.size == 1:
            return weight
        part = share_of(weight, self.first, self.count)
        assert not isinstance(part, Tensor)
        return part  # type: ignore[return-value]


def _cut(module: nn.Module, leaf: str, share: ExpertShare) -> None:
    """Keep a share of a parameter of all experts, if there is one."""
    parameter = module._parameters[leaf]
    if parameter is not None:
        part = share.of(parameter.detach())
        module._parameters[leaf] = nn.Parameter(part, requires_grad=parameter.requires_grad)


class ExpertAdapter(nn.Module):
    """The LoRA pairs of one projection: lora_A (E, r, in), lora_B (E, out, r), or None."""

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(self, count: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.share = ExpertShare(count)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scale = 1.0
        self.dropout = 0.0
        self.named: dict[str, tuple[Tensor, Tensor, float]] = {}

    @property
    def count(self) -> int:
        """Experts whose pairs are here."""
        return self.share.count

    def divide(self, share: ExpertShare) -> None:
        """Keep the pairs of a share of the experts alone."""
        self.share = share
        for leaf in ("lora_A", "lora_B"):
            _cut(self, leaf, share)

    def attach(
        self, rank: int, scale: float, dropout: float, device: torch.device, seed: torch.Generator
    ) -> None:
        """Give every expert a trainable pair that changes nothing yet."""
        bound = 1.0 / math.sqrt(self.in_features)
        a = torch.empty(self.share.total, rank, self.in_features)
        b = torch.zeros(self.count, self.out_features, rank)
        # Experts start alike however they are divided.
        a = self.share.of(a.uniform_(-bound, bound, generator=seed))
        self.lora_A = nn.Parameter(a.to(device))
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
        if not all(0 <= expert < self.share.total for expert in pairs):
            raise ValueError(f"there is no expert {max(pairs)}; the last is {self.share.total - 1}")
        a, b, self.scale = self.joined(pairs, scales)
        self.lora_A, self.lora_B = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))
        self.dropout = dropout

    def joined(
        self, pairs: Mapping[int, tuple[Tensor, ...]], scales: Mapping[int, float]
    ) -> tuple[Tensor, Tensor, float]:
        """The pairs of the experts here as A (E, r, in), B (E, out, r), and one factor for all."""
        rank, scale = max(int(a.shape[0]) for a, *_ in pairs.values()), next(iter(scales.values()))
        a_all = torch.zeros(self.count, rank, self.in_features)
        b_all = torch.zeros(self.count, self.out_features, rank)
        for expert, (a, b, *_) in pairs.items():
            row = expert - self.share.first
            if not 0 <= row < self.count:
                continue
            a_all[row, : a.shape[0]] = a
            # There is one factor for all; that of another goes into its B.
            b_all[row, :, : b.shape[1]] = b * (scales[expert] / scale)
        return a_all, b_all, scale

    def chosen(self, groups: RowGroups | None) -> tuple[ExpertRowAdapter, ...]:
        """The named pairs that a pass is computed with."""
        if groups is None or not self.named:
            return ()
        if self.share.ranks.size > 1:
            raise ValueError(
                "named adapters are computed for chosen tokens, and experts that are divided over "
                "processes are not told which tokens they get; use one adapter, or no division"
            )
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
        self.share, self.hidden, self.width = ExpertShare(count), hidden, inner
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, inner))
        self.gate_lora = ExpertAdapter(count, hidden, inner)
        self.up_lora = ExpertAdapter(count, hidden, inner)
        self.down_lora = ExpertAdapter(count, inner, hidden)
        self.stored: dict[str, QuantizedExperts] = {}

    @property
    def count(self) -> int:
        """Experts whose weights are here."""
        return self.share.count

    def divide(self, ranks: Ranks) -> None:
        """Keep this rank's share of the experts alone, now and of what is set from here on.

        Raises `ValueError` where they cannot be divided equally, or are already.
        """
        if self.share.ranks.size > 1:
            raise ValueError("the experts are already divided over processes")
        self.share = ExpertShare(self.share.total, ranks)
        for leaf in ("gate_up_proj", "down_proj"):
            _cut(self, leaf, self.share)
        self.stored = {n: self.share.of_weight(weight) for n, weight in self.stored.items()}
        for adapter in self.adapters().values():
            adapter.divide(self.share)

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
