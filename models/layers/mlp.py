"""The SwiGLU feed-forward part of a decoder block.

y = x1 + down(silu(g) * u),   g, u = gate_up(norm(x1))

`kernels.linear.swiglu_mlp` has the arithmetic and its backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kernels.linear.lora import Gradients
from kernels.linear.projection import Projection
from kernels.linear.swiglu_mlp import (
    MLPActivations,
    SwiGLUMLP,
    mlp_backward,
    mlp_forward,
    mlp_inner,
)
from models.layers.context import LayerContext
from models.layers.linear import Linear, RMSNorm
from models.layers.tiled_mlp import TiledMLP


@dataclass
class MLPSaved:
    """What backward reads of the feed-forward part; None where it is computed again."""

    inner: MLPActivations | None = None

    def trim(self, policy: str) -> MLPSaved:
        """Only what `policy` keeps."""
        return self if policy == "none" else MLPSaved()


class MLP(nn.Module):
    """Holds gate, up and down projections."""

    def __init__(self, hidden: int, inner: int, index: int, bias: bool = False) -> None:
        super().__init__()
        self.index = index
        self.gate_proj = Linear(hidden, inner, bias)
        self.up_proj = Linear(hidden, inner, bias)
        self.down_proj = Linear(inner, hidden, bias)

    def gate_up(self) -> tuple[Projection, Projection]:
        return self.gate_proj.projection(), self.up_proj.projection()

    def joined(self) -> tuple[tuple[Linear, ...], ...]:
        """The projections that read the same input and want their weights side by side."""
        return ((self.gate_proj, self.up_proj),)

    def _operands(self, context: LayerContext) -> SwiGLUMLP:
        """What `kernels.linear.swiglu_mlp` computes with; shares memory with this module."""
        one_weight = context.settings.low_memory_decode
        return SwiGLUMLP(
            *self.gate_up(),
            self.down_proj.projection(),
            (context.seed(self.index, 2), context.seed(self.index, 3)),
            "wide" if one_weight else "narrow",
            one_weight,
        )

    def _tiled(self, norm: RMSNorm, context: LayerContext, tokens: int) -> TiledMLP | None:
        """This part over tiles of tokens, where the batch asks for that."""
        settings = context.settings
        if settings.mlp_tile_tokens is None and not settings.low_memory_decode:
            return None
        return TiledMLP(norm, self._operands(context), settings.mlp_tile_tokens or tokens)

    def forward(self, x1: Tensor, norm: RMSNorm, context: LayerContext) -> tuple[Tensor, MLPSaved]:
        """x1 (N, H) -> y (N, H) and every activation that backward could use."""
        tiled = self._tiled(norm, context, x1.shape[0])
        if tiled is not None:
            return tiled.forward(x1), MLPSaved()
        h, _ = norm.forward_with_rstd(x1)
        y, inner = mlp_forward(h, self._operands(context))
        return y.add_(x1), MLPSaved(MLPActivations(inner.gate, inner.up))

    def backward(
        self,
        dy: Tensor,
        x1: Tensor,
        norm: RMSNorm,
        context: LayerContext,
        saved: MLPSaved,
        grads: Gradients,
    ) -> Tensor:
        """dy (N, H) -> dx1 (N, H); adds the gradient of every trainable parameter."""
        tiled = self._tiled(norm, context, x1.shape[0])
        if tiled is not None:
            return tiled.backward(dy, x1, grads)
        mlp = self._operands(context)
        h, rstd = norm.forward_with_rstd(x1)
        decoded = mlp.decode(x1.dtype)
        inner = saved.inner or mlp_inner(h, mlp, decoded)
        dh, _ = mlp_backward(dy, h, mlp, inner, grads, decoded=decoded)
        assert dh is not None
        return norm.backward(dh, x1, rstd, grads).add_(dy)
