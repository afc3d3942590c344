"""Bytes of layers, divided among ranks and gathered ahead of use.

Every rank keeps an N-th of a layer's bytes. The whole layer is put together by an all-gather of
uint8, in one of two buffers that are used again: layers of even numbers in one, of odd numbers in
the other. What is gathered ahead is the next layer's, so the buffer that it overwrites is never
that of the layer in use. Whatever still lies in a buffer is not gathered again: the two layers at
either end, where the direction turns, stay.

The order of the collectives follows from the order of the calls alone, so ranks that call alike
send alike. On a GPU a group's collectives run on a stream of their own, which begins after what the
computation had queued, and a layer's computation is all they have to hide behind. Shares that lie
in the host's memory are uploaded first, on a side stream. Source of the scheme: Rajbhandari et al.
2020 (ZeRO, arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.runtime.host_memory import SideCopies, host_copy
from kernels.runtime.ranks import Ranks, Transfer

ALIGNED = 256
"""Bytes at whose multiples tensors and shares begin: the widest load of any kernel, and more."""


def aligned_bytes(nbytes: int) -> int:
    """`nbytes` rounded up to whole `ALIGNED` bytes."""
    return -(-nbytes // ALIGNED) * ALIGNED


def share_bytes(nbytes: int, ranks: int) -> int:
    """What each rank keeps of a layer of `nbytes`, which all have the same of."""
    return aligned_bytes(-(-nbytes // ranks))


class LayerGather:
    """The layers' shares on this rank, and two buffers for whole layers.

    With `on_host` the shares of a GPU lie in the host's memory, pinned. Where layers change between
    passes they are not `lasting`: a forward pass then finds nothing in the buffers.
    """

    def __init__(
        self, ranks: Ranks, device: torch.device, *, on_host: bool = False, lasting: bool = True
    ) -> None:
        self.ranks, self.shares = ranks, list[Tensor]()
        self._device, self._lasting = device, lasting
        self._copies = SideCopies(device) if on_host and device.type == "cuda" else None
        self._buffers: list[Tensor | None] = [None, None]
        self._uploaded: list[Tensor | None] = [None, None]
        self._holds: list[int | None] = [None, None]
        self._pending: list[Transfer | None] = [None, None]

    def add(self, layer: Tensor) -> Tensor:
        """Keep this rank's share of the next layer's bytes, (n,) uint8; returns the share."""
        size = share_bytes(layer.numel(), self.ranks.size)
        first = self.ranks.rank * size
        own = layer[first : first + size]
        share = torch.zeros(size, dtype=torch.uint8, device=layer.device)
        share[: own.numel()] = own
        self.shares.append(share if self._copies is None else host_copy(share))
        return self.shares[-1]

    def reserve(self) -> None:
        """Take the buffers' memory now, when all layers are added, and not in the first pass."""
        for slot in range(min(2, len(self.shares))):
            self._buffer_of(self._buffers, slot, self.ranks.size)
            if self._copies is not None:
                self._buffer_of(self._uploaded, slot, 1)

    def tensors(self) -> list[Tensor]:
        """Shares and buffers."""
        every = (*self.shares, *self._buffers, *self._uploaded)
        return [tensor for tensor in every if tensor is not None]

    def arrive(self, index: int, ahead: int) -> Tensor:
        """The bytes of layer `index`; those of `index + ahead` are under way from now on.

        They stay until a layer of the same parity is asked for.
        """
        if not self._lasting and (index, ahead) == (0, 1):
            self.forget()
        self._start(index)
        slot, following = index % 2, index + ahead
        self._wait(slot)
        if 0 <= following < len(self.shares):
            self._start(following)
        buffer = self._buffers[slot]
        assert buffer is not None
        return buffer

    def forget(self) -> None:
        """Gather every layer anew that is asked for from now on."""
        self._holds = [None, None]

    def _start(self, index: int) -> None:
        slot = index % 2
        if self._holds[slot] == index:
            return
        self._wait(slot)  # what was gathered in vain may still be written to this buffer
        self._holds[slot] = None
        share = self.shares[index]
        space = self._buffer_of(self._buffers, slot, self.ranks.size)
        whole = space[: self.ranks.size * share.numel()]
        if self._copies is None:
            self._pending[slot] = self.ranks.all_gather(whole, share)
        else:
            uploaded = self._buffer_of(self._uploaded, slot, 1)[: share.numel()]
            self._copies.start([(uploaded, share)])
            with self._copies.following():
                self._pending[slot] = self.ranks.all_gather(whole, uploaded)
        self._holds[slot] = index

    def _buffer_of(self, buffers: list[Tensor | None], slot: int, times: int) -> Tensor:
        """A buffer for every layer of a slot, `times` their shares."""
        buffer = buffers[slot]
        nbytes = times * max(share.numel() for share in self.shares[slot::2])
        if buffer is None or buffer.numel() < nbytes:
            buffers[slot] = buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return buffer

    def _wait(self, slot: int) -> None:
        pending, self._pending[slot] = self._pending[slot], None
        if pending is not None:
            pending.wait()


def gathered_layers(layers: int, lowest: int | None, *, first: bool) -> list[int]:
    """The layers that one pass over `layers` gathers, in this order.

    It goes forward, and backward down to the layer `lowest` unless that is None. Buffers are empty
    in the `first` pass; the others follow a pass of the same kind.
    """
    holds: list[int | None] = [None, None]
    order: list[int] = []

    def arrive(index: int, ahead: int) -> None:
        for wanted in (index, index + ahead):
            if 0 <= wanted < layers and holds[wanted % 2] != wanted:
                holds[wanted % 2] = wanted
                order.append(wanted)

    for _ in range(1 if first else 2):
        order.clear()
        for index in range(layers):
            arrive(index, 1)
        for index in range(layers - 1, layers if lowest is None else lowest - 1, -1):
            arrive(index, -1)
    return order


def bytes_sent(shares: Sequence[int], lowest: int | None, *, first: bool) -> int:
    """Bytes that a rank gives to the gathers of one pass; arguments as in `gathered_layers`."""
    return sum(shares[index] for index in gathered_layers(len(shares), lowest, first=first))


def resident_bytes(shares: Sequence[int], ranks: int) -> int:
    """What a rank's shares of all layers and its two buffers take, on one device."""
    buffers = [max(shares[slot::2], default=0) for slot in (0, 1)]
    return sum(shares) + ranks * sum(buffers)
