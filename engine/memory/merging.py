"""Plan the host memory that merging an adapter takes."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from engine.model_sources.interface.row_parts import outside_layers, rows_of_part
from models.config.model_config import ModelConfig
from models.tensor_names import expected_tensors, skeleton

_FP32 = 4


def merge_peak(
    model: ModelConfig, stored: torch.dtype, targets: Collection[str], adapter_bytes: int
) -> int:
    """The most bytes of host memory that merging takes, checked before it is reported."""
    written = host_peak(model, stored, targets, adapter_bytes)
    return max(written, verification_peak(model) + adapter_bytes)


def verification_peak(model: ModelConfig) -> int:
    """The most bytes that comparing the logits of two models takes (`engine.inference.layerwise`).

    One layer is in memory in fp32, and while it is built, a copy of the weights that read the same
    input. For Llama-3.3-70B that is 3.42 + 1.88 = 5.30 GB; for a mixture all experts of a layer.
    """
    most = 0
    for layer in skeleton(model).layers:
        own = sum(parameter.numel() for parameter in layer.parameters())
        groups = (*layer.mixer.same_input(), *layer.mlp.same_input())
        joined = [sum(math.prod(linear.weight.shape) for linear in group) for group in groups]
        most = max(most, own + max(joined, default=0))
    return _FP32 * most


def host_peak(
    model: ModelConfig, stored: torch.dtype, targets: Collection[str], adapter_bytes: int
) -> int:
    """The most bytes of host memory that adding an adapter to the original weights takes.

    The adapter is held whole, and of one tensor after the other the mapped original; where it is
    adapted, also the sum in fp32 and the sum rounded. Embedding and head are read some rows at a
    time, experts in one tensor are added to one by one. A model's depth does not matter. For
    Llama-3.3-70B in bf16 a `down_proj` of 28,672 x 8,192 takes 0.47 + 0.94 + 0.47 = 1.88 GB; an
    adapter of rank 16 in fp32 adds 0.83 GB.
    """
    most, both = 0, 2 * stored.itemsize
    for name, shape in expected_tensors(model).items():
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        adapted = leaf in targets or (leaf == "gate_up_proj" and "gate_proj" in targets)
        adapted = adapted and len(shape) > 1
        count = math.prod(shape)
        if outside_layers(name) and len(shape) > 1:
            count = min(count, rows_of_part(shape) * shape[-1])
        if adapted and len(shape) > 2:
            most = max(most, both * count + _FP32 * math.prod(shape[1:]))
        else:
            most = max(most, (both + _FP32 if adapted else stored.itemsize) * count)
    return most + adapter_bytes
