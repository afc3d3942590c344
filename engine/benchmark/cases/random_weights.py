"""Random weights, made directly on the device that uses them.

NF4 weights are random codes and random scales, not the quantisation of a random matrix: the
arithmetic that reads them is the same, and 70 billion of them are there in a second. Their scale is
that of a trained model, about 1 / sqrt(columns), so that activations stay in range.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.linear.projection import Projection
from kernels.nf4 import NF4Weight
from kernels.nf4.planar import BLOCK, PlanarNF4Weight
from kernels.nf4.weight import NESTED_BLOCK
from models.adapters import add_lora
from models.config.model_config import ModelConfig
from models.decoder import Decoder
from models.layers.experts import EXPERT_PROJECTIONS, ExpertAdapter, Experts, QuantizedExperts
from models.layers.linear import Linear
from models.tensor_names import is_quantised, skeleton

_NF4_DEVIATION = 0.55
"""Standard deviation of a uniformly drawn NF4 value, to two digits."""


def random_nf4(
    rows: int,
    columns: int,
    device: torch.device,
    dtype: torch.dtype,
    planar: bool | None = None,
) -> NF4Weight | PlanarNF4Weight:
    """A doubly quantised weight (rows, columns), in the order that `load_model` keeps there.

    `planar` asks for one order; columns must then be a multiple of 64.
    """
    if planar is None:
        planar = device.type == "cuda" and columns % BLOCK == 0
    shape, blocks = (rows, columns), -(-rows * columns // BLOCK)
    mean = 1.0 / (_NF4_DEVIATION * math.sqrt(columns))
    nested = torch.full((-(-blocks // NESTED_BLOCK),), 0.5 * mean, device=device)
    offset = torch.tensor(mean, device=device)
    if planar:
        size = (columns // BLOCK, rows)
        codes = torch.randint(
            -(1 << 15), 1 << 15, (*size, BLOCK // 4), dtype=torch.int16, device=device
        )
        absmax = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
        return PlanarNF4Weight(codes, absmax, nested, offset, shape, BLOCK, dtype)
    packed = torch.randint(0, 256, (-(-rows * columns // 2),), dtype=torch.uint8, device=device)
    absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device)
    return NF4Weight(packed, absmax, nested, offset, shape, BLOCK, dtype)


def random_projection(
    rows: int, columns: int, rank: int, device: torch.device, dtype: torch.dtype
) -> Projection:
    """An NF4 projection with a LoRA pair in fp32, both halves away from zero."""
    a = torch.randn(rank, columns, device=device) / math.sqrt(columns)
    b = torch.randn(rows, rank, device=device) / math.sqrt(rank)
    return Projection(
        random_nf4(rows, columns, device, dtype),
        None,
        a.requires_grad_(),
        b.requires_grad_(),
        scale=0.5,
    )


def random_decoder(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, *, rank: int = 16
) -> Decoder:
    """A decoder of `config` with an NF4 base, ready to be trained: LoRA on all projections.

    The B halves are not zero, so that every gradient is computed from something.
    """
    model = skeleton(config)
    for name, shape in [(n, tuple(p.shape)) for n, p in model.named_parameters()]:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, Experts):
            module.set_quantized(leaf, _random_experts(leaf, shape, device, dtype))
        elif isinstance(module, Linear) and leaf == "weight":
            if is_quantised(name):
                module.set_weight(random_nf4(shape[0], shape[1], device, dtype))
                continue
            module.set_weight(_normal(shape, shape[1] ** -0.5, device, dtype))
        else:
            setattr(module, leaf, nn.Parameter(_filled(shape, device, dtype), requires_grad=False))
    add_lora(model, rank=rank, alpha=2.0 * rank)
    for layer in model.layers:
        for module in layer.modules():
            if isinstance(module, Linear | ExpertAdapter) and module.lora_B is not None:
                nn.init.normal_(module.lora_B, std=0.01)
    return model


def _random_experts(
    leaf: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> dict[str, QuantizedExperts]:
    """One parameter of a mixture, as `engine.model_sources.load_model` keeps it there."""
    names = EXPERT_PROJECTIONS[:2] if leaf == "gate_up_proj" else (leaf,)
    count, rows, columns = shape[0], shape[1] // len(names), shape[2]
    planar = device.type == "cuda" and dtype.itemsize == 2 and columns % BLOCK == 0
    return {
        name: replace(
            random_nf4(count * rows, columns, device, dtype, planar), shape=(count, rows, columns)
        )
        for name in names
    }


def _normal(
    shape: tuple[int, ...], deviation: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    return torch.empty(shape, device=device, dtype=dtype).normal_(std=deviation)


def _filled(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A norm's weight or a bias near its usual value; a matrix of unit variance."""
    if len(shape) == 1:
        return 1.0 + _normal(shape, 0.1, device, dtype)
    return _normal(shape, 1.0, device, dtype)
