"""LoRA pairs of experts in PEFT's fused form.

It is written for the families whose experts PEFT knows in no other form.

transformers 5 holds a mixture's experts as two parameters, and PEFT (0.18 and later) adapts those
by `target_parameters`, with one pair for all experts of a parameter:

    <mlp>.experts.base_layer.lora_A.weight  (E 2 r, H)       lora_B.weight  (2 I, 2 r E)    gate_up
    <mlp>.experts.lora_A.weight             (E r, I)         lora_B.weight  (H, r E)        down

A has the experts one below the other; in B they are the last index of its columns. The pairs of
gate and up become one of twice the rank, whose B is block diagonal, so that nothing changes; rank
and alpha of `gate_up_proj` are doubled in the configuration. Both parameters are always there: one
that is not adapted has a pair of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

EXPERTS = ".mlp.experts."
PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
PATTERN = r".*\.gate_up_proj"
Parts = tuple[Tensor, ...]


def doubled_alpha(alpha: float, use_rslora: bool) -> float:
    """The alpha with which a pair of twice the rank has the same scale."""
    return alpha * (math.sqrt(2.0) if use_rslora else 2.0)


def fused_keys(rank: int, alpha: float, use_rslora: bool) -> dict[str, Any]:
    """What the configuration of an adapter of experts says of them."""
    double = doubled_alpha(alpha, use_rslora)
    return {
        "target_parameters": list(PARAMETERS),
        "rank_pattern": {PATTERN: 2 * rank},
        "alpha_pattern": {PATTERN: int(double) if float(double).is_integer() else double},
    }


def is_ours(raw: Mapping[str, Any]) -> bool:
    """Whether the patterns in a configuration are those of `fused_keys`."""
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        return False
    double = doubled_alpha(alpha, bool(raw.get("use_rslora")))
    patterns = (raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {})
    return patterns in (({PATTERN: 2 * rank}, {PATTERN: double}), ({}, {}))


def fuse(tensors: Mapping[str, Parts]) -> dict[str, Parts]:
    """`tensors` with the pairs (A, B) of all experts of a parameter in one, by PEFT's names."""
    fused: dict[str, Parts] = {}
    mixtures: dict[str, dict[str, dict[int, Parts]]] = {}
    for module, parts in tensors.items():
        path, separator, tail = module.partition(EXPERTS)
        if not separator:
            fused[module] = parts
            continue
        expert, _, projection = tail.partition(".")
        experts = mixtures.setdefault(f"{path}{EXPERTS[:-1]}", {}).setdefault(projection, {})
        experts[int(expert)] = parts
    for path, projections in mixtures.items():
        pairs = {name: _stacked(experts) for name, experts in projections.items()}
        joint, down = _completed(pairs)
        fused[f"{path}.base_layer"], fused[path] = _flattened(*joint), _flattened(*down)
    return fused


def divide(pairs: Mapping[str, Parts], rank: int) -> dict[str, Parts]:
    """The inverse of `fuse`. Raises `ValueError` where B of gate and up is not block diagonal."""
    ending = EXPERTS[:-1]
    result: dict[str, Parts] = {}
    for module, parts in pairs.items():
        path = module.removesuffix(".base_layer")
        if not path.endswith(ending):
            result[module] = parts
            continue
        joint = path != module
        a, b = _unflattened(parts[0], parts[1], 2 * rank if joint else rank)
        halves = _halves(module, a, b, rank) if joint else {"down_proj": (a, b)}
        halves = {name: pair for name, pair in halves.items() if bool(pair[0].any())}
        for projection, (half_a, half_b) in halves.items():
            for expert, pair in enumerate(zip(half_a, half_b, strict=True)):
                result[f"{path}.{expert}.{projection}"] = (pair[0].clone(), pair[1].clone())
    return result


def _stacked(experts: dict[int, Parts]) -> tuple[Tensor, Tensor]:
    """A (E, r, in) and B (E, out, r)."""
    ordered = [experts[index] for index in sorted(experts)]
    return torch.stack([a for a, *_ in ordered]), torch.stack([b for _, b, *_ in ordered])


def _completed(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A (E, 2 r, H) and block diagonal B (E, 2 I, 2 r) of gate and up, and the pair of down."""
    a, b = next(iter(pairs.values()))
    (count, rank, columns), rows = a.shape, b.shape[1]
    hidden, inner = (rows, columns) if "down_proj" in pairs else (columns, rows)
    into = (a.new_zeros(count, rank, hidden), a.new_zeros(count, inner, rank))
    back = (a.new_zeros(count, rank, inner), a.new_zeros(count, hidden, rank))
    (gate_a, gate_b), (up_a, up_b) = pairs.get("gate_proj", into), pairs.get("up_proj", into)
    corner = torch.zeros_like(gate_b)
    blocks = torch.cat((gate_b, corner), 2), torch.cat((corner, up_b), 2)
    joint = torch.cat((gate_a, up_a), 1), torch.cat(blocks, 1)
    return joint, pairs.get("down_proj", back)


def _flattened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A (E R, in) and B (out, R E)."""
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def _unflattened(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (E, R, in) and B (E, out, R)."""
    if a.shape[0] % rank or b.dim() != 2 or b.shape[1] != a.shape[0]:
        raise ValueError(
            f"A {list(a.shape)} and B {list(b.shape)} are no pair of rank {rank} of experts"
        )
    return a.unflatten(0, (-1, rank)), b.unflatten(1, (rank, -1)).permute(2, 0, 1)


def _halves(module: str, a: Tensor, b: Tensor, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    inner = b.shape[1] // 2
    if bool(b[:, :inner, rank:].any()) or bool(b[:, inner:, :rank].any()):
        raise ValueError(
            f"the pair of {module} mixes gate and up, which have pairs of their own here"
        )
    return {
        "gate_proj": (a[:, :rank], b[:, :inner, :rank]),
        "up_proj": (a[:, rank:], b[:, inner:, rank:]),
    }
