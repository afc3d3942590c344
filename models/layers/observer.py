"""Tell an observer what the layers of a step do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from kernels.runtime.simulation import Scoped


class LayerObserver:
    """Is told what layers do in the thread where it observes; here every method does nothing."""

    def forward_begins(self, layer: int) -> None:
        """A layer's forward pass is next."""

    def mixer_ran(self, layer: int, saved: Any) -> None:
        """In forward, attention or Gated DeltaNet has run and would save this."""

    def mlp_ran(self, layer: int, saved: Any) -> None:
        """In forward, a feed-forward part has run and would save this."""

    def forward_ends(self, layer: int) -> None:
        """Of a layer's forward pass there are its output and what it saved."""

    def backward_begins(self, layer: int) -> None:
        """A layer's backward pass is next."""

    def backward_ends(self, layer: int, gradients: Iterable[Tensor]) -> None:
        """A layer's backward pass made these gradients of its parameters."""

    def weights_arrive(self, weights: Iterable[Any]) -> None:
        """These quantised weights get memory on the device."""


_observer: Scoped[LayerObserver] = Scoped("layer observer", LayerObserver())

layer_observer = _observer.get
observe_layers = _observer.use
"""A context in which an observer is told of this thread's layers."""
