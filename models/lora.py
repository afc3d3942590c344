"""Putting LoRA pairs on a decoder, and taking them off again as tensors.

A (r, in) starts uniform in +-1/sqrt(in) (Kaiming with a = sqrt(5), as in PEFT), B (out, r) at
zero, so a new adapter changes nothing until it has been trained. The scale is alpha / r, or
alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv 2312.03732). Adapters are fp32 whatever the
base is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.decoder import Decoder
from models.linear import Linear
from models.registry import PROJECTIONS

TARGETS: dict[str, tuple[str, ...]] = {
    "all": PROJECTIONS,
    "attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qv": ("q_proj", "v_proj"),
}


def target_modules(targets: str | Sequence[str]) -> tuple[str, ...]:
    """Projection names for a preset ("all", "attn", "qv"), a comma list, or a list.

    Raises `ValueError` naming what is not a projection.
    """
    if isinstance(targets, str):
        named = TARGETS.get(targets) or tuple(t.strip() for t in targets.split(",") if t.strip())
    else:
        named = tuple(targets)
    unknown = [name for name in named if name not in PROJECTIONS]
    if unknown or not named:
        raise ValueError(
            f"target modules {', '.join(unknown) or '(none)'} are unknown; expected one of the "
            f"presets {', '.join(TARGETS)} or names out of {', '.join(PROJECTIONS)}"
        )
    return tuple(name for name in PROJECTIONS if name in named)


def linears(model: nn.Module, names: Sequence[str]) -> dict[str, Linear]:
    """Module path -> `Linear`, for every projection whose last name is in `names`."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Linear) and path.rsplit(".", 1)[-1] in names
    }


def scale_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """The factor of B A x."""
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def freeze(model: nn.Module) -> None:
    """Turn every gradient off."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def add_lora(
    model: Decoder,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all",
    use_rslora: bool = False,
    seed: int = 0,
) -> list[str]:
    """Freeze the base, give every target projection a trainable pair; returns their paths.

    The initial values are a function of (seed, order of the modules). Raises `ValueError` on a
    rank below 1, a dropout outside [0, 1) or an unknown target.
    """
    if rank < 1 or not 0.0 <= dropout < 1.0:
        raise ValueError(f"rank {rank} must be at least 1 and dropout {dropout} in [0, 1)")
    found = linears(model, target_modules(targets))
    freeze(model)
    generator = torch.Generator().manual_seed(seed)
    for linear in found.values():
        bound = 1.0 / math.sqrt(linear.in_features)
        a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(linear.out_features, rank)
        device = linear.weight.device
        linear.lora_A = nn.Parameter(a.to(device))
        linear.lora_B = nn.Parameter(b.to(device))
        linear.scale, linear.dropout = scale_of(rank, alpha, use_rslora), dropout
    return list(found)


def adapter_tensors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Module path -> (A, B) of every adapted projection, sharing memory with the model."""
    return {
        path: (module.lora_A.data, module.lora_B.data)
        for path, module in model.named_modules()
        if isinstance(module, Linear) and module.lora_A is not None and module.lora_B is not None
    }


@torch.no_grad()
def load_adapter_tensors(model: nn.Module, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Copy (A, B) pairs into the adapted projections.

    Raises `ValueError` unless paths and shapes match one to one, listing what does not.
    """
    own = adapter_tensors(model)
    wrong = [f"{path} is missing" for path in own if path not in tensors]
    wrong += [f"{path} is not adapted here" for path in tensors if path not in own]
    for path in own.keys() & tensors.keys():
        for kind, mine, given in zip("AB", own[path], tensors[path], strict=True):
            if mine.shape != given.shape:
                wrong.append(
                    f"lora_{kind} of {path} is {tuple(given.shape)}, expected {tuple(mine.shape)}"
                )
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"adapter does not match: {'; '.join(sorted(wrong)[:5])}{more}")
    for path, pair in tensors.items():
        for mine, given in zip(own[path], pair, strict=True):
            mine.copy_(given)
