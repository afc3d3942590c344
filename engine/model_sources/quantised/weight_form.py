"""In which form a model's weights lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config.choices import Quantization
from engine.model_sources.quantised.stored_codes import Codes
from kernels.linear.int8 import quantize_int8
from kernels.linear.projection import QuantizedWeight
from kernels.moe.grouped_matmul import planar_experts
from kernels.nf4 import NF4Weight, quantize
from kernels.nf4.planar import BLOCK, has_planar_order, to_planar
from models.layers.experts import EXPERT_PROJECTIONS, ExpertShare, QuantizedExperts
from models.memory.offload import Kind, on_host


@dataclass(frozen=True)
class WeightForm:
    """What becomes of a layer's weights; quantised ones may be `offloaded` to the host."""

    quantization: Quantization | None
    double_quant: bool
    device: torch.device
    dtype: torch.dtype
    offloaded: bool

    def quantized(self, weight: Tensor) -> QuantizedWeight:
        """`weight` (out, in) in the order in which the device reads it."""
        on_device = weight.to(self.device)
        if self.quantization == "int8":
            return self.stored(quantize_int8(on_device))
        return self.in_order(quantize(on_device, double_quant=self.double_quant))

    def in_order(self, weight: Codes) -> QuantizedWeight:
        """`weight`, which lies on the device, where it is to lie and as the kernels read it."""
        # The GPU kernels read their own order of NF4 codes; the reference reads either.
        on_gpu = self.device.type == "cuda"
        if on_gpu and isinstance(weight, NF4Weight) and has_planar_order(weight):
            return self.stored(to_planar(weight))
        return self.stored(weight)

    def quantized_experts(
        self, leaf: str, tensor: Tensor, share: ExpertShare
    ) -> dict[str, QuantizedExperts]:
        """A share of all experts' weights (E, out, in), projection by projection."""
        both = leaf == "gate_up_proj"
        names = EXPERT_PROJECTIONS[:2] if both else (leaf,)
        result: dict[str, QuantizedExperts] = {}
        for name, part in zip(names, tensor.chunk(len(names), 1), strict=True):
            if self.quantization == "int8":
                own = share.of(part).to(self.device)
                result[name] = self.stored(tuple(quantize_int8(expert) for expert in own))
                continue
            # All are quantised, for their scales have one offset in common.
            packed = quantize(part.to(self.device), double_quant=self.double_quant)
            result[name] = self.experts_in_order(packed, share)
        return result

    def experts_in_order(self, weight: NF4Weight, share: ExpertShare) -> QuantizedExperts:
        """A share of all experts' codes (E, out, in), on the device, as the kernels read them."""
        part = share.of_weight(weight)
        assert isinstance(part, NF4Weight)
        # In 16 bits on a GPU all experts are one launch, which reads the planar order.
        planar = self.device.type == "cuda" and self.dtype.itemsize == 2
        whole = planar and part.shape[-1] % BLOCK == 0 and part.block_size % BLOCK == 0
        return self.stored(planar_experts(part) if whole else part)

    def stored(self, weight: Kind) -> Kind:
        """`weight` where it is to lie."""
        return on_host(weight) if self.offloaded else weight
