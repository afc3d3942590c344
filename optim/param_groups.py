"""Weight-decay groups: matrices decay, norms and biases do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to the parameter of this name.

    Biases and the scales of norms have one dimension; the last tests are for those stored
    otherwise, and for the taps of a depthwise convolution.
    """
    leaf = name.rsplit(".", 1)[-1]
    owner = name.rsplit(".", 2)[-2] if "." in name else ""
    matrix = parameter.ndim >= 2 and owner != "conv1d"
    return matrix and leaf != "bias" and "norm" not in owner.lower()


def plus_ratio(name: str, parameter: Tensor, ratio: float) -> float:
    """LoRA+: how many times faster a parameter of an adapter learns than its matrices A.

    `ratio` for the matrices B and for vectors, such as DoRA's magnitudes; 1 for all others.
    Source: Hayou et al. 2024, arXiv 2402.12354; which are which is as in PEFT.
    """
    return ratio if "lora_B" in name or parameter.ndim == 1 else 1.0


def param_groups(
    parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
    weight_decay: float = 0.01,
    lr_ratio: Callable[[str, Tensor], float] | None = None,
) -> list[dict[str, Any]]:
    """Optimiser groups of the trainable parameters: those that decay, then those that do not.

    Takes a module or (name, parameter) pairs; keeps their order within each group, counts a shared
    parameter once, and leaves out a group that would be empty. With `lr_ratio` there are such two
    groups for each of its values, which stands in them: the learning rate is to be multiplied by
    it. Raises ValueError if nothing trains.
    """
    named = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
    members: dict[tuple[float, bool], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for name, parameter in named:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        ratio = 1.0 if lr_ratio is None else lr_ratio(name, parameter)
        members.setdefault((ratio, decays(name, parameter)), []).append(parameter)
    if not members:
        raise ValueError("no parameter requires a gradient, so there is nothing to optimise")
    ordered = sorted(members, key=lambda kind: (kind[0], not kind[1]))
    extra = [{} if ratio == 1.0 else {"lr_ratio": ratio} for ratio, _ in ordered]
    return [
        {"params": members[kind], "weight_decay": weight_decay if kind[1] else 0.0, **more}
        for kind, more in zip(ordered, extra, strict=True)
    ]


class DividedParameter(Protocol):
    """A rank's part of a parameter of this name and whole shape: whole blocks of 256 elements.

    It begins at element `begin` of the flattened whole.
    """

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> torch.Size: ...

    @property
    def begin(self) -> int: ...

    @property
    def parameter(self) -> nn.Parameter: ...


def piece_groups(
    pieces: Iterable[DividedParameter],
    weight_decay: float = 0.01,
    min_8bit_size: int = 4096,
    lr_ratio: Callable[[str, Tensor], float] | None = None,
) -> list[dict[str, Any]]:
    """Groups as `param_groups` makes them, by what each piece is a part of.

    Whether states take 8 bits follows from the whole parameter too (`min_8bit_size` of a group), so
    that a step moves every element as an optimizer of whole parameters does. Raises ValueError if
    nothing trains.
    """
    members: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for piece in pieces:
        whole = torch.empty(piece.shape, device="meta")
        ratio = 1.0 if lr_ratio is None else lr_ratio(piece.name, whole)
        kind = ratio, not decays(piece.name, whole), whole.numel() < min_8bit_size
        members.setdefault(kind, []).append(piece.parameter)
    if not members:
        raise ValueError("this rank has no part of any parameter, so there is nothing to optimise")
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if unchanged else weight_decay,
            "min_8bit_size": 1 << 62 if exact else 0,
            **({} if ratio == 1.0 else {"lr_ratio": ratio}),
        }
        for (ratio, unchanged, exact), parameters in sorted(members.items())
    ]
