"""Weight-decay groups: matrices decay, norms and biases do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to the parameter of this name.

    Biases and the scales of norms have one dimension; the last tests are for those stored
    otherwise, and for the taps of a depthwise convolution.
    """
    leaf = name.rsplit(".", 1)[-1]
    owner = name.rsplit(".", 2)[-2] if "." in name else ""
    matrix = parameter.ndim >= 2 and owner != "conv1d"
    return matrix and leaf != "bias" and "norm" not in owner.lower()


def param_groups(
    parameters: nn.Module | Iterable[tuple[str, nn.Parameter]], weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Optimiser groups of the trainable parameters: those that decay, then those that do not.

    Takes a module or (name, parameter) pairs; keeps their order within each group, counts a shared
    parameter once, and leaves out a group that would be empty. Raises ValueError if nothing trains.
    """
    named = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    seen: set[int] = set()
    for name, parameter in named:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        (decayed if decays(name, parameter) else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("no parameter requires a gradient, so there is nothing to optimise")
    return groups
