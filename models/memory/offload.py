"""Offload activations and frozen weights to host memory.

Activations (`OffloadedInputs`). A layer's input goes to the host while the layer runs, and comes
back one layer ahead of its use in backward. On the GPU there are the input in use and the next one.

Weights (`WeightStream`). All layers' quantised weights, experts among them, lie in the host's
memory; on the GPU there are those of the layer in use and of the next: the one above in forward,
the one below in backward. The layer at which the direction turns stays, so it is not copied twice.

Both orders are known beforehand, so no prediction is needed and every copy has one layer's time
to hide in. On a CPU, device and host are one: both hand out the tensors they were given. Sources:
Pudipeddi et al. 2020 (arXiv 2002.05645) for streaming layers; Rhu et al. 2016 (arXiv 1602.08124)
for inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from kernels.linear.projection import QuantizedWeight
from kernels.runtime.host_memory import SideCopies, host_copy, host_empty
from models.layers.experts import Experts, QuantizedExperts
from models.layers.linear import Linear
from models.layers.observer import layer_observer

_Pending = tuple[Tensor, torch.cuda.Event | None]

Quantized = QuantizedWeight | QuantizedExperts
"""What one projection of a layer holds, of all experts together where it is theirs."""

Kind = TypeVar("Kind", bound=Quantized)
_Named = dict[str, Any]


class OffloadedInputs:
    """The inputs of the layers of one forward pass, by the layers' numbers."""

    def __init__(self, device: torch.device, copies: SideCopies) -> None:
        self._moves = device.type == "cuda"
        self._device, self._copies = device, copies
        self._host: dict[int, Tensor] = {}
        self._leaving: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._coming: dict[int, _Pending] = {}

    def keep(self, index: int, x: Tensor) -> None:
        """Take the input of layer `index`. Called in the order of the layers, before each runs."""
        if not self._moves:
            self._host[index] = x
            return
        self._let_go()
        x = x.contiguous()  # else torch makes a copy on the side stream, where nobody plans for it
        host = host_empty(x)
        event = self._copies.start([(host, x)])
        self._host[index] = host
        self._leaving = (index, x, event)

    def _let_go(self) -> None:
        """The input before has left by now, or is waited for: its memory may be used again."""
        if self._leaving is not None:
            self._copies.wait(self._leaving[2])
            self._leaving = None

    def fetch(self, index: int) -> Tensor:
        """The input of layer `index` again, once; the one below is sent for."""
        host = self._host.pop(index)
        if not self._moves:
            return host
        if self._leaving is not None and self._leaving[0] == index:
            x = self._leaving[1]  # the last layer's has not gone yet
            self._let_go()
        else:
            if index not in self._coming:
                self._coming[index] = self._send_for(host)
            x, event = self._coming.pop(index)
            self._copies.wait(event)
        below = self._host.get(index - 1)
        if below is not None:
            self._coming[index - 1] = self._send_for(below)
        return x

    def _send_for(self, host: Tensor) -> _Pending:
        x = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        return x, self._copies.start([(x, host)])


class WeightStream:
    """Quantised weights of all layers in the host's memory, two layers' at a time on the device."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._moves = device.type == "cuda"
        self._device, self._copies = device, SideCopies(device)
        self._holders = [[m for m in layer.modules() if quantized_weights(m)] for layer in layers]
        self._host = [[quantized_weights(m) for m in holders] for holders in self._holders]
        self._here: dict[int, tuple[list[_Named], torch.cuda.Event | None]] = {}

    @contextmanager
    def present(self, index: int, ahead: int) -> Iterator[None]:
        """While entered, layer `index` has its weights; those of layer `index + ahead` follow."""
        if not self._moves:
            yield
            return
        for known in self._here.keys() - {index, index + ahead}:
            # One that was sent for in vain may still be on its way into memory that is freed here.
            self._copies.wait(self._here.pop(known)[1])
        if index not in self._here:
            self._here[index] = self._bring(index)
        weights, event = self._here[index]
        self._copies.wait(event)
        following = index + ahead
        if following not in self._here and 0 <= following < len(self._holders):
            self._here[following] = self._bring(following)
        for holder, named in zip(self._holders[index], weights, strict=True):
            _put(holder, named)
        del weights
        try:
            yield
        finally:
            for holder, named in zip(self._holders[index], self._host[index], strict=True):
                _put(holder, named)

    def _bring(self, index: int) -> tuple[list[_Named], torch.cuda.Event | None]:
        pairs: list[tuple[Tensor, Tensor]] = []

        def on_device(x: Tensor) -> Tensor:
            target = torch.empty(x.shape, dtype=x.dtype, device=self._device)
            pairs.append((target, x))
            return target

        weights = [
            {name: mapped(weight, on_device) for name, weight in named.items()}
            for named in self._host[index]
        ]
        layer_observer().weights_arrive(w for named in weights for w in named.values())
        return weights, self._copies.start(pairs)


def quantized_weights(module: nn.Module) -> _Named:
    """Name -> quantised weight of a projection or of a mixture's experts; else nothing."""
    if isinstance(module, Experts):
        return module.stored
    if isinstance(module, Linear) and not isinstance(module.weight, Tensor):
        return {"weight": module.weight}
    return {}


def _put(holder: nn.Module, weights: _Named) -> None:
    """Give a module other weights, as `quantized_weights` has them."""
    if isinstance(holder, Experts):
        holder.stored = weights
    elif isinstance(holder, Linear):
        holder.set_weight(weights["weight"])


def mapped(weight: Kind, function: Callable[[Tensor], Tensor]) -> Kind:
    """A quantised weight whose tensors are those that `function` makes of this one's."""
    if isinstance(weight, tuple):
        return cast(Kind, tuple(mapped(one, function) for one in weight))
    parts: dict[str, Any] = {
        name: function(part) for name, part in vars(weight).items() if isinstance(part, Tensor)
    }
    return replace(weight, **parts)


def on_host(weight: Kind) -> Kind:
    """A copy of a quantised weight in the host's memory."""
    return mapped(weight, host_copy)


def tensors_of(weight: Quantized) -> list[Tensor]:
    """Every tensor of a quantised weight."""
    if isinstance(weight, tuple):
        return [part for one in weight for part in tensors_of(one)]
    return [part for part in vars(weight).values() if isinstance(part, Tensor)]
