"""Frozen weights of layers, divided among ranks and gathered as bytes.

A rank keeps an N-th of the bytes of each layer: codes and scales of quantised projections and
experts, and dense matrices where nothing is quantised. The bytes are gathered as they are
(`models.memory.layer_gather`), so results are those of whole weights, to the bit. Biases, norms and
whatever is trained stay whole on every rank; experts that are divided already stay where they are.

Outside its turn a layer's weights are placeholders (`models.memory.absent`): whoever reads one gets
an error, not other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.runtime.ranks import Ranks
from kernels.runtime.simulation import shapes_only
from models.layers.block import DecoderLayer
from models.layers.experts import Experts
from models.layers.linear import Linear
from models.memory.absent import Absent
from models.memory.layer_gather import LayerGather, aligned_bytes, bytes_sent, resident_bytes
from models.memory.offload import mapped, quantized_weights

_META = torch.device("meta")
_Named = dict[str, Any]


@dataclass(frozen=True)
class _Part:
    """Where a tensor lies in the bytes of its layer, and its form."""

    offset: int
    form: Tensor

    def view(self, layer: Tensor) -> Tensor:
        """The tensor in a layer's bytes (n,) uint8."""
        form = self.form
        if form.numel() == 0:
            return layer.new_empty(form.shape, dtype=form.dtype)
        item = form.dtype.itemsize
        typed = layer[: layer.numel() // item * item].view(form.dtype)
        return typed.as_strided(form.shape, form.stride(), self.offset // item)


@dataclass(frozen=True)
class _Divided:
    """A layer's modules that hold frozen weights, placeholders of these, and all their parts."""

    holders: tuple[nn.Module, ...]
    placeholders: tuple[_Named, ...]
    parts: tuple[_Part, ...]
    nbytes: int

    def put(self, weights: Sequence[_Named]) -> None:
        """Give the modules these weights."""
        for holder, named in zip(self.holders, weights, strict=True):
            _set_frozen(holder, named)

    def views(self, layer: Tensor) -> list[_Named]:
        """The weights as views of the layer's bytes."""
        parts = iter(self.parts)
        return [_each(named, lambda _: next(parts).view(layer)) for named in self.placeholders]


class ShardedWeights:
    """This rank's share of every layer's frozen weights; `weights_of` makes a layer whole.

    Layers are given to `take` in their order. With `on_host` a GPU's shares wait in the host's
    memory. Every rank must run the same passes: one that has no batch left
    calls `models.sharding.idle_pass`.
    """

    def __init__(self, ranks: Ranks, device: torch.device, *, on_host: bool = False) -> None:
        self.ranks = ranks
        self._gather = LayerGather(ranks, device, on_host=on_host)
        self._layers: list[DecoderLayer] = []
        self._divided: list[_Divided] = []

    def take(self, layer: DecoderLayer) -> None:
        """Keep a share of the next layer's weights and free the rest.

        Raises `ValueError` where the layer is not the next one, or where its weights are trained
        or were decoded to stay.
        """
        if layer.index != len(self._layers):
            raise ValueError(f"layer {layer.index} is given where {len(self._layers)} is expected")
        _refuse_others(layer)
        divided, flat = _divide(layer)
        divided.put(divided.placeholders)
        self._gather.add(flat)
        self._layers.append(layer)
        self._divided.append(divided)

    def reserve(self) -> None:
        """Take the gather buffers' memory, when all layers are taken."""
        self._gather.reserve()

    def tensors(self) -> list[Tensor]:
        """This rank's shares of all layers and its gather buffers."""
        return self._gather.tensors()

    @contextmanager
    def weights_of(self, index: int, ahead: int) -> Iterator[None]:
        """Inside the block layer `index` is whole; `index + ahead` is gathered meanwhile."""
        divided = self._divided[index]
        divided.put(divided.views(self._gather.arrive(index, ahead)))
        try:
            yield
        finally:
            divided.put(divided.placeholders)

    def idle_forward(self) -> None:
        """The gathers of a forward pass, for a rank that computes nothing while others do."""
        for index in range(len(self._layers)):
            self._gather.arrive(index, 1)

    def idle_backward(self) -> None:
        """Those of a backward pass, which ends at the lowest layer with something to train."""
        lowest = self.lowest_trained()
        if lowest is not None:
            for index in range(len(self._layers) - 1, lowest - 1, -1):
                self._gather.arrive(index, -1)

    def lowest_trained(self) -> int | None:
        """The lowest layer with trainable parameters: backward ends there."""
        return next((layer.index for layer in self._layers if layer.trainable()), None)

    @property
    def shares(self) -> list[int]:
        """Bytes that each rank keeps of every layer."""
        return [share.numel() for share in self._gather.shares]

    @property
    def layer_bytes(self) -> list[int]:
        """Bytes of every whole layer, with what aligns its tensors."""
        return [divided.nbytes for divided in self._divided]

    @property
    def resident_bytes(self) -> int:
        """What the shares and the two buffers take on each rank."""
        return resident_bytes(self.shares, self.ranks.size)

    def bytes_per_pass(self, *, backward: bool = True, first: bool = False) -> int:
        """Bytes that a rank gives to the gathers of one pass.

        The `first` pass of all finds no layer in the buffers; the others follow one of their kind.
        """
        return bytes_sent(self.shares, self.lowest_trained() if backward else None, first=first)


def frozen_layer_bytes(layer: DecoderLayer) -> int:
    """Bytes of a layer as `ShardedWeights` would lay them, from shapes alone."""
    return _divide(layer, copied=False)[0].nbytes


def _frozen_weights(module: nn.Module) -> _Named:
    """Name -> weight that is divided: quantised ones, dense matrices and dense experts."""
    if isinstance(module, Experts):
        if module.share.ranks.size > 1:
            return {}  # each rank has experts of its own, and keeps them
        dense = {"gate_up_proj": module.gate_up_proj, "down_proj": module.down_proj}
        return module.stored or {name: p for name, p in dense.items() if p is not None}
    if isinstance(module, Linear) and isinstance(module.weight, Tensor):
        return {"weight": module.weight}
    return quantized_weights(module)


def _set_frozen(holder: nn.Module, weights: _Named) -> None:
    """Give a module weights of the form that `_frozen_weights` returns."""
    if isinstance(holder, Linear):
        holder.set_weight(weights["weight"])
    elif isinstance(holder, Experts) and holder.stored:
        holder.stored = weights
    else:
        for name, weight in weights.items():
            holder.register_parameter(name, nn.Parameter(weight, requires_grad=False))


def _each(named: _Named, function: Callable[[Tensor], Tensor]) -> _Named:
    """The weights with the tensors that `function` makes of theirs, in one fixed order."""
    return {
        name: function(weight) if isinstance(weight, Tensor) else mapped(weight, function)
        for name, weight in named.items()
    }


def _refuse_others(layer: DecoderLayer) -> None:
    for path, module in layer.named_modules():
        trained = [p for p in _frozen_weights(module).values() if isinstance(p, Tensor)]
        if any(p.requires_grad for p in trained):
            raise ValueError(f"the weight of {path} is trained; only frozen ones can be divided so")
        if isinstance(module, Linear) and module.lasting is not None:
            raise ValueError(f"the weight of {path} is decoded to stay, and cannot be divided")


def _divide(layer: DecoderLayer, *, copied: bool = True) -> tuple[_Divided, Tensor]:
    """How a layer's frozen weights lie in one vector of bytes, and that vector.

    Tensors that share memory keep their distances: projections of one input stay adjacent.
    """
    holders = tuple(m for m in layer.modules() if _frozen_weights(m))
    tensors: list[Tensor] = []

    def placeholder(x: Tensor) -> Tensor:
        tensors.append(x.detach())
        return Absent(x)

    placeholders = tuple(_each(_frozen_weights(holder), placeholder) for holder in holders)
    spans: dict[int, tuple[int, int]] = {}
    for x in tensors:
        begin, end = _span(x)
        first, last = spans.get(_memory(x), (begin, end))
        spans[_memory(x)] = min(first, begin), max(last, end)
    nbytes, starts = 0, {}
    for memory, (first, last) in spans.items():
        starts[memory] = nbytes - first
        nbytes += aligned_bytes(last - first)
    parts = tuple(_Part(starts[_memory(x)] + _span(x)[0], _form(x)) for x in tensors)
    divided = _Divided(holders, placeholders, parts, nbytes)
    device = tensors[0].device if tensors and copied else _META
    flat = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    if copied:
        for part, x in zip(parts, tensors, strict=True):
            part.view(flat).copy_(x)
    return divided, flat


def _form(x: Tensor) -> Tensor:
    """A tensor without memory of the shape, strides and dtype of x."""
    with shapes_only():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_META)


def _memory(x: Tensor) -> int:
    """What tensors have in common that share memory."""
    return int(x.untyped_storage()._cdata)


def _span(x: Tensor) -> tuple[int, int]:
    """The first byte of x in its memory, and the one after its last."""
    begin = x.storage_offset()
    last = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
    return int(begin * x.itemsize), int((begin + (last + 1 if x.numel() else 0)) * x.itemsize)
