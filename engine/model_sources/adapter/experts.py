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

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

EXPERTS = ".mlp.experts."
PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
PATTERN = r".*\.gate_up_proj"
Parts = tuple[Tensor, ...]


def fused_keys(rank: int, alpha: float) -> dict[str, Any]:
    """What the configuration of an adapter of experts says of them."""
    return {
        "target_parameters": list(PARAMETERS),
        "rank_pattern": {PATTERN: 2 * rank},
        "alpha_pattern": {PATTERN: 2 * alpha},
    }


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


def divide(
    pairs: Mapping[str, Parts], rank: Callable[[str], int], parameters: Collection[str]
) -> tuple[dict[str, Parts], dict[str, str]]:
    """The inverse of `fuse`: module -> pair, and module -> the parameter whose scale it has.

    `rank` gives the rank of a parameter, and `parameters` are the file's `target_parameters`. Where
    B of gate and up is not block diagonal, both projections have all of A. Raises `ValueError` for
    shapes that are no pair of experts.
    """
    result: dict[str, Parts] = {}
    sources: dict[str, str] = {}
    for module, parts in pairs.items():
        path = module.removesuffix(".base_layer")
        if not path.endswith(EXPERTS[:-1]):
            result[module], sources[module] = parts, module
            continue
        # The first parameter is wrapped first; alone it has the plain name.
        down = any(name.endswith("down_proj") for name in parameters)
        joint = path != module or not down
        parameter = f"{path}.{'gate_up_proj' if joint else 'down_proj'}"
        a, b = _unflattened(parts[0], parts[1], rank(parameter))
        halves = _halves(a, b) if joint else {"down_proj": (a, b)}
        halves = {name: pair for name, pair in halves.items() if bool(pair[0].any())}
        for projection, (half_a, half_b) in halves.items():
            for expert, pair in enumerate(zip(half_a, half_b, strict=True)):
                name = f"{path}.{expert}.{projection}"
                result[name] = (pair[0].clone(), pair[1].clone())
                sources[name] = parameter
    return result, sources


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


def _halves(a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    inner, rank = b.shape[1] // 2, b.shape[2] // 2
    if bool(b[:, :inner, rank:].any()) or bool(b[:, inner:, :rank].any()):
        return {"gate_proj": (a, b[:, :inner]), "up_proj": (a, b[:, inner:])}
    return {
        "gate_proj": (a[:, :rank], b[:, :inner, :rank]),
        "up_proj": (a[:, rank:], b[:, inner:, rank:]),
    }
