"""The heads of a Gated DeltaNet that one rank computes.

With H value heads and R ranks a rank has H / R consecutive ones and the key heads that they read.
The convolution works on each channel, the rule on each head, so a rank convolves the channels of
its heads alone, from the first token of every document to the last: states pass from token to token
as on one rank. Key heads that several ranks read are computed by each; gradients are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear.adapters import Gradients
from models.parallel.head_exchange import copies_of


@dataclass(frozen=True)
class DeltaShare:
    """How many key and value heads there are, of which sizes, and which of them a rank has."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    rank: int = 0
    ranks: int = 1

    @property
    def copies(self) -> int:
        """How often a key head is sent. Raises `ValueError` for heads that cannot be shared."""
        return copies_of(self.value_heads, self.key_heads, self.ranks)

    @property
    def keys(self) -> int:
        """Key heads of this rank."""
        return self.key_heads * self.copies // self.ranks

    @property
    def values(self) -> int:
        """Value heads of this rank."""
        return self.value_heads // self.ranks

    @property
    def width(self) -> int:
        """Channels of this rank: those of q, k and v."""
        return 2 * self.keys * self.key_dim + self.values * self.value_dim

    def split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C) of this rank's channels -> q, k (N, hk, K) and v (N, hv, V), views."""
        keys, values = (self.keys, self.key_dim), (self.values, self.value_dim)
        widths = (keys[0] * keys[1], keys[0] * keys[1], values[0] * values[1])
        q, k, v = mixed.split(widths, 1)
        return q.unflatten(1, keys), k.unflatten(1, keys), v.unflatten(1, values)

    def of_values(self, x: Tensor) -> Tensor:
        """The elements (hv,) of this rank's value heads, of x (Hv,)."""
        return x if self.ranks == 1 else x[self.rank * self.values :][: self.values]

    def of_channels(self, weight: Tensor) -> Tensor:
        """The rows of this rank's channels, of a convolution's weight (C, ...)."""
        return weight if self.ranks == 1 else weight.index_select(0, self._channels(weight.device))

    def add_values(self, grads: Gradients, parameter: Tensor, gradient: Tensor) -> None:
        """Set the gradient of a parameter (Hv,), zero for other ranks' heads, if it is wanted."""
        if not parameter.requires_grad:
            return
        if self.ranks > 1:
            whole = torch.zeros_like(parameter)
            self.of_values(whole).copy_(gradient)
            gradient = whole
        grads[id(parameter)] = gradient

    def add_channels(self, grads: Gradients, parameter: Tensor, gradient: Tensor | None) -> None:
        """Set the gradient of a convolution's weight, zero for other ranks' channels."""
        if gradient is None:
            return
        if self.ranks > 1:
            channels = self._channels(gradient.device)
            gradient = torch.zeros_like(parameter).index_add_(0, channels, gradient)
        grads[id(parameter)] = gradient

    def _channels(self, device: torch.device) -> Tensor:
        """The channels of this rank's heads of q, k and v, in this order."""
        first = self.rank * self.keys
        heads = torch.arange(first, first + self.keys, device=device) // self.copies
        keys = _elements(heads, self.key_dim)
        values = torch.arange(self.rank * self.values, (self.rank + 1) * self.values, device=device)
        width = self.key_heads * self.key_dim
        return torch.cat((keys, width + keys, 2 * width + _elements(values, self.value_dim)))


def _elements(heads: Tensor, dim: int) -> Tensor:
    """The elements of heads of `dim` each."""
    return (heads.unsqueeze(1) * dim + torch.arange(dim, device=heads.device)).flatten()
