"""Trained weights of layers, divided among ranks, and their gradients' sums.

Each rank has an N-th of every layer's parameters as one flat vector. A layer is gathered ahead of
its use into one of two buffers (`models.memory.layer_gather`), in forward and again in backward. In
backward its gradients are laid in the same order and summed by a reduce-scatter in fp32 or wider,
of which each rank gets its share, while the layer below computes. Optimizer states exist for the
share alone.

A parameter begins at a multiple of 256 elements, and so does every share. What a rank has of a
parameter is therefore whole blocks of 256 of it, the blocks of 8-bit optimizer states: they are
those of whole parameters, and so is the result. Source: Rajbhandari et al. 2020 (ZeRO stage 3,
arXiv 1910.02054).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.linear.adapters import Gradients
from kernels.runtime.ranks import Ranks, Transfer
from kernels.vocabulary.shard import BLOCK
from models.layers.block import DecoderLayer
from models.layers.experts import Experts
from models.memory.absent import Absent
from models.memory.layer_gather import LayerGather, bytes_sent, resident_bytes


@dataclass(frozen=True, eq=False)
class ParameterPiece:
    """What a rank trains of a parameter: elements from `begin` on of the flattened whole."""

    name: str
    shape: torch.Size
    begin: int
    parameter: nn.Parameter


@dataclass(frozen=True)
class _Slot:
    """A parameter of a layer: the module that has it, and where it lies in the layer's vector."""

    module: nn.Module
    leaf: str
    name: str
    shape: torch.Size
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def parameter(self) -> nn.Parameter:
        """What the module has now: the whole parameter or its placeholder."""
        parameter = self.module._parameters[self.leaf]
        assert parameter is not None
        return parameter

    def view(self, flat: Tensor) -> Tensor:
        """The parameter in a layer's vector."""
        return flat[self.offset : self.offset + self.numel].view(self.shape)


@dataclass(frozen=True)
class _GradientSum:
    """Gradients of a layer that are being summed: the whole vector, and this rank's share."""

    index: int
    transfer: Transfer
    given: Tensor
    share: Tensor


class ShardedParameters:
    """This rank's share of every layer's trained parameters; `weights_of` makes a layer whole.

    Layers are given to `take` in their order. All ranks run the same passes (`models.sharding`),
    and backward reaches every layer.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self.pieces: list[list[ParameterPiece]] = []
        self._gather = LayerGather(ranks, device, lasting=False)
        self._slots: list[list[_Slot]] = []
        self._dtypes: list[torch.dtype] = []
        self._sums: list[_GradientSum] = []

    def take(self, layer: DecoderLayer) -> None:
        """Keep a share of the next layer's parameters, to be trained, and free the rest.

        Raises `ValueError` where the layer is not the next one, has experts that are divided
        already, or parameters of several dtypes.
        """
        if layer.index != len(self._slots):
            raise ValueError(f"layer {layer.index} is given where {len(self._slots)} is expected")
        if any(isinstance(m, Experts) and m.share.ranks.size > 1 for m in layer.modules()):
            raise ValueError(f"the experts of layer {layer.index} are divided over ranks already")
        slots, size = _slots(layer)
        whole = [slot.parameter() for slot in slots]
        dtypes = {parameter.dtype for parameter in whole}
        if len(dtypes) != 1:
            kinds = ", ".join(sorted(map(str, dtypes)))
            raise ValueError(f"layer {layer.index} has parameters of several dtypes: {kinds}")
        dtype = dtypes.pop()
        share = -(-size // (self.ranks.size * BLOCK)) * BLOCK
        flat = torch.zeros(self.ranks.size * share, dtype=dtype, device=whole[0].device)
        for slot, parameter in zip(slots, whole, strict=True):
            slot.view(flat).copy_(parameter.detach())
            slot.module.register_parameter(slot.leaf, nn.Parameter(Absent(parameter)))
        own = self._gather.add(flat.view(torch.uint8)).view(dtype)
        self.pieces.append(_pieces(slots, own, self.ranks.rank * share))
        self._slots.append(slots)
        self._dtypes.append(dtype)

    def reserve(self) -> None:
        """Take the gather buffers' memory, when all layers are taken."""
        self._gather.reserve()

    def tensors(self) -> list[Tensor]:
        """This rank's shares of all layers and its gather buffers."""
        return self._gather.tensors()

    @contextmanager
    def weights_of(self, index: int, ahead: int) -> Iterator[None]:
        """Inside the block layer `index` is whole; `index + ahead` is gathered meanwhile."""
        slots = self._slots[index]
        flat = self._gather.arrive(index, ahead)[: self._nbytes(index)].view(self._dtypes[index])
        absent = [slot.parameter() for slot in slots]
        for slot in slots:
            slot.module.register_parameter(slot.leaf, nn.Parameter(slot.view(flat)))
        try:
            yield
        finally:
            for slot, parameter in zip(slots, absent, strict=True):
                slot.module.register_parameter(slot.leaf, parameter)

    def leaves_of(self, index: int) -> list[Tensor]:
        """What autograd sees of a layer: this rank's pieces."""
        return [piece.parameter for piece in self.pieces[index]]

    @torch.no_grad()
    def reduce(self, index: int, gradients: Gradients) -> None:
        """Sum a layer's gradients over all ranks; called inside `weights_of`, or without any.

        The sum is added to the pieces' gradients when the layer below, or the lowest, is reduced.
        """
        dtype = self._dtypes[index]
        wide = torch.promote_types(dtype, torch.float32)
        size = self._nbytes(index) // dtype.itemsize
        share = self._gather.shares[index]
        given = torch.zeros(size, dtype=wide, device=share.device)
        for slot in self._slots[index] if gradients else ():
            gradient = gradients.get(id(slot.parameter()))
            if gradient is not None:
                slot.view(given).copy_(gradient)
        own = given.new_empty(size // self.ranks.size)
        transfer = self.ranks.reduce_scatter(own, given)
        self._finish()
        self._sums.append(_GradientSum(index, transfer, given, own))
        if index == 0:
            self._finish()

    def _finish(self) -> None:
        """Add the sums that are under way to the gradients of their pieces."""
        while self._sums:
            pending = self._sums.pop()
            pending.transfer.wait()
            pieces = self.pieces[pending.index]
            first = self.ranks.rank * pending.share.numel()
            for piece, at in zip(pieces, _offsets(self._slots[pending.index], pieces), strict=True):
                parameter = piece.parameter
                part = pending.share[at - first : at - first + parameter.numel()]
                part = part.to(parameter.dtype)
                parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)

    def idle_forward(self) -> None:
        """The gathers of a forward pass, for a rank that computes nothing while others do."""
        for index in range(len(self._slots)):
            self._gather.arrive(index, 1)

    def idle_backward(self) -> None:
        """The gathers and sums of a backward pass, to which this rank adds nothing."""
        for index in range(len(self._slots) - 1, -1, -1):
            self._gather.arrive(index, -1)
            self.reduce(index, {})

    def whole_layer(self, index: int) -> dict[str, Tensor]:
        """Name -> parameter of a layer, valid until two others are asked for; a collective.

        Parameters are those of now: whoever has stepped since the last call calls `forget` before.
        """
        flat = self._gather.arrive(index, 0)[: self._nbytes(index)].view(self._dtypes[index])
        return {slot.name: slot.view(flat) for slot in self._slots[index]}

    def forget(self) -> None:
        """Take nothing in the buffers for what the parameters are now."""
        self._gather.forget()

    def _nbytes(self, index: int) -> int:
        return self.ranks.size * self._gather.shares[index].numel()

    @property
    def shares(self) -> list[int]:
        """Bytes that each rank keeps of every layer."""
        return [share.numel() for share in self._gather.shares]

    @property
    def resident_bytes(self) -> int:
        """What shares and gather buffers take on each rank, without gradients and states."""
        return resident_bytes(self.shares, self.ranks.size)

    def bytes_per_pass(self, *, backward: bool = True) -> dict[str, int]:
        """Bytes that a rank gives to each kind of collective in one pass."""
        gathered = bytes_sent(self.shares, 0 if backward else None, first=True)
        sums = 0
        for share, dtype in zip(self.shares, self._dtypes, strict=True):
            wide = torch.promote_types(dtype, torch.float32)
            sums += self.ranks.size * share // dtype.itemsize * wide.itemsize
        return {"all_gather": gathered} | ({"reduce_scatter": sums} if backward else {})


def _slots(layer: DecoderLayer) -> tuple[list[_Slot], int]:
    """A layer's parameters in a vector, and its length; those of one input come first, adjacent."""
    together = [
        linear for group in (*layer.mixer.same_input(), *layer.mlp.same_input()) for linear in group
    ]
    weights = [(linear, "weight") for linear in together if "weight" in linear._parameters]
    first = {(id(module), leaf) for module, leaf in weights}
    others = [
        (module, leaf)
        for module in layer.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and (id(module), leaf) not in first
    ]
    names = {id(module): path for path, module in layer.named_modules()}
    slots, offset = [], 0
    for module, leaf in (*weights, *others):
        parameter = module._parameters[leaf]
        assert parameter is not None
        path = f"model.layers.{layer.index}.{names[id(module)]}.{leaf}"
        slots.append(_Slot(module, leaf, path, parameter.shape, offset))
        offset += -(-parameter.numel() // BLOCK) * BLOCK
    return slots, offset


def _pieces(slots: list[_Slot], own: Tensor, first: int) -> list[ParameterPiece]:
    """What of each parameter lies in `own`, which begins at element `first` of the layer."""
    pieces = []
    for slot in slots:
        begin = max(slot.offset, first)
        end = min(slot.offset + slot.numel, first + own.numel())
        if begin < end:
            part = nn.Parameter(own[begin - first : end - first])
            pieces.append(ParameterPiece(slot.name, slot.shape, begin - slot.offset, part))
    return pieces


def _offsets(slots: list[_Slot], pieces: list[ParameterPiece]) -> list[int]:
    """Where the pieces begin in the layer's vector."""
    offsets = {slot.name: slot.offset for slot in slots}
    return [offsets[piece.name] + piece.begin for piece in pieces]
