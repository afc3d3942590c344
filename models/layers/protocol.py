"""What a decoder block asks of its two parts; a new mixer or feed-forward part is one such file.

Either part adds itself to its input, after a norm of it: x1 = x + mixer(norm(x)). `forward` returns
that and everything backward could use, in an object whose `trim` keeps what a checkpointing policy
keeps; `backward` computes again what is not there, and adds the gradients of the parameters
to `grads`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from kernels.linear.lora import Gradients
from models.layers.context import LayerContext
from models.layers.linear import Linear, RMSNorm


class Part(Protocol):
    """What both have."""

    def joined(self) -> tuple[tuple[Linear, ...], ...]:
        """Groups of projections that read the same input and want their weights side by side."""

    def forward(self, x: Tensor, norm: RMSNorm, context: LayerContext, /) -> tuple[Tensor, Any]:
        """x (N, H) -> its sum with the part's output (N, H), and what backward could use."""


class Mixer(Part, Protocol):
    """Mixes tokens: attention or Gated DeltaNet."""

    def backward(
        self,
        dx1: Tensor,
        x: Tensor,
        norm: RMSNorm,
        context: LayerContext,
        saved: Any,
        grads: Gradients,
        need_dx: bool,
        /,
    ) -> Tensor | None:
        """dx1 (N, H) -> dx (N, H), or None where nothing needs it."""


class FeedForward(Part, Protocol):
    """Works on each token alone: a dense SwiGLU or a mixture of experts."""

    def backward(
        self,
        dy: Tensor,
        x1: Tensor,
        norm: RMSNorm,
        context: LayerContext,
        saved: Any,
        grads: Gradients,
        /,
    ) -> Tensor:
        """dy (N, H) -> dx1 (N, H)."""
