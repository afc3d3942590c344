"""Several adapters on one base, chosen by row of a pass.

They stay unmerged and frozen, in the type of the model. What a pass computes of them is in
`kernels.linear.row_adapters`; which rows are whose it is told by `RowGroups`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.linear.decode import decode_weight
from kernels.linear.dora import row_scale
from kernels.linear.projection import Projection
from kernels.linear.row_adapters import RowAdapter
from models.adapters import match_pairs
from models.decoder import Decoder
from models.layers.experts import ExpertAdapter
from models.layers.linear import Linear


@torch.no_grad()
def attach_named(
    model: Decoder,
    name: str,
    tensors: Mapping[str, tuple[Tensor, ...]],
    scales: Mapping[str, float],
) -> None:
    """Give the model an adapter under a name; one of that name before is replaced.

    `tensors` and `scales` are as in `models.adapters.attach_lora`, and so are the errors.
    """
    matched = match_pairs(model, tensors, scales)
    detach_named(model, name)
    device, dtype = model.device, model.dtype
    for linear, parts, scale in matched.linears:
        a, b, *magnitude = (part.to(device, torch.float32) for part in parts)
        factor = _row_scale(linear, (a, b, magnitude[0]), scale, dtype) if magnitude else None
        linear.named[name] = RowAdapter(None, a.to(dtype), b.to(dtype), scale, factor)
    for adapter, pairs, factors in matched.experts:
        a, b, scale = adapter.joined(pairs, factors)
        adapter.named[name] = (a.to(device, dtype), b.to(device, dtype), scale)


def detach_named(model: Decoder, name: str) -> None:
    """Take an adapter off again, if there is one of that name."""
    for module in model.modules():
        if isinstance(module, Linear | ExpertAdapter):
            module.named.pop(name, None)


def _row_scale(
    linear: Linear, parts: tuple[Tensor, Tensor, Tensor], scale: float, dtype: torch.dtype
) -> Tensor:
    """DoRA's c (out,), of the weight as a pass in `dtype` sees it."""
    weight = linear.weight
    dense = weight.to(dtype) if isinstance(weight, Tensor) else decode_weight(weight, dtype)
    a, b, magnitude = parts
    scaled = row_scale(dense, Projection(weight, None, a, b, scale, magnitude=magnitude))
    assert scaled is not None
    return scaled.scale
