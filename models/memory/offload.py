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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from kernels.linear.projection import QuantizedWeight
from kernels.runtime.host_memory import SideCopies, host_buffer, host_copy
from models.layers.experts import Experts, QuantizedExperts
from models.layers.linear import Linear
from models.layers.observer import layer_observer

_Pending = tuple[Tensor, torch.cuda.Event | None]

Quantized = QuantizedWeight | QuantizedExperts
"""What one projection of a layer holds, of all experts together where it is theirs."""

Kind = TypeVar("Kind", bound=Quantized)
_Named = dict[str, Any]


class LayerWeights(Protocol):
    """Weights of layers that are elsewhere until their layer's turn."""

    def weights_of(self, index: int, ahead: int) -> AbstractContextManager[None]:
        """Inside the block layer `index` has its weights; `index + ahead` is next."""


class OffloadedInputs:
    """The inputs of the layers of one forward pass, by the layers' numbers."""

    def __init__(self, device: torch.device, copies: SideCopies) -> None:
        self._is_gpu = device.type == "cuda"
        self._device, self._copies = device, copies
        self._host: dict[int, Tensor] = {}
        self._outgoing: tuple[int, Tensor, torch.cuda.Event | None] | None = None
        self._incoming: dict[int, _Pending] = {}

    def save(self, index: int, x: Tensor) -> None:
        """Save the input of layer `index`. Called in the order of the layers, before each runs."""
        if not self._is_gpu:
            self._host[index] = x
            return
        self._release_outgoing()
        x = x.contiguous()  # else torch copies it on the side stream, uncounted by plans
        host = host_buffer(x)
        event = self._copies.start([(host, x)])
        self._host[index] = host
        self._outgoing = (index, x, event)

    def _release_outgoing(self) -> None:
        """Wait for the copy of the input before; its memory may then be used again."""
        if self._outgoing is not None:
            self._copies.wait(self._outgoing[2])
            self._outgoing = None

    def fetch(self, index: int) -> Tensor:
        """Return the input of layer `index`, once, and start fetching the one below."""
        host = self._host.pop(index)
        if not self._is_gpu:
            return host
        if self._outgoing is not None and self._outgoing[0] == index:
            x = self._outgoing[1]  # the last layer's is still on the GPU
            self._release_outgoing()
        else:
            if index not in self._incoming:
                self._incoming[index] = self._start_fetch(host)
            x, event = self._incoming.pop(index)
            self._copies.wait(event)
        below = self._host.get(index - 1)
        if below is not None:
            self._incoming[index - 1] = self._start_fetch(below)
        return x

    def _start_fetch(self, host: Tensor) -> _Pending:
        x = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        return x, self._copies.start([(x, host)])


class WeightStream:
    """Quantised weights of all layers in the host's memory, two layers' at a time on the device."""

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._device, self._copies = device, SideCopies(device)
        self._holders = [[m for m in layer.modules() if quantized_weights(m)] for layer in layers]
        self._host = [[quantized_weights(m) for m in holders] for holders in self._holders]
        self._on_device: dict[int, tuple[list[_Named], torch.cuda.Event | None]] = {}

    @contextmanager
    def weights_of(self, index: int, ahead: int) -> Iterator[None]:
        """Inside the block layer `index` has its weights; those of `index + ahead` are fetched."""
        if not self._is_gpu:
            yield
            return
        for known in self._on_device.keys() - {index, index + ahead}:
            # A layer fetched in vain may still be being copied into the memory that is freed here.
            self._copies.wait(self._on_device.pop(known)[1])
        if index not in self._on_device:
            self._on_device[index] = self._start_upload(index)
        weights, event = self._on_device[index]
        self._copies.wait(event)
        following = index + ahead
        if following not in self._on_device and 0 <= following < len(self._holders):
            self._on_device[following] = self._start_upload(following)
        for holder, named in zip(self._holders[index], weights, strict=True):
            _set_weights(holder, named)
        del weights
        try:
            yield
        finally:
            for holder, named in zip(self._holders[index], self._host[index], strict=True):
                _set_weights(holder, named)

    def _start_upload(self, index: int) -> tuple[list[_Named], torch.cuda.Event | None]:
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


def _set_weights(holder: nn.Module, weights: _Named) -> None:
    """Give a module weights of the form that `quantized_weights` returns."""
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
