"""The SwiGLU feed-forward part of a decoder block.

y = x1 + down(silu(g) * u),   g, u = gate_up(norm(x1))

`kernels.linear.swiglu_mlp` has the arithmetic and its backward pass; the settings may ask for tiles
of tokens (`models.layers.token_tiles`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from kernels.elementwise.swiglu import swiglu_forward
from kernels.linear.lora import Gradients, project
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
from models.layers.token_tiles import TokenTile, backward_in_tiles, forward_in_tiles


@dataclass
class MLPSaved:
    """What backward reads of the feed-forward part; None where it is recomputed."""

    inner: MLPActivations | None = None

    def trim(self, policy: str) -> MLPSaved:
        """Only what `policy` saves."""
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

    def same_input(self) -> tuple[tuple[Linear, ...], ...]:
        """Groups of projections that read the same input."""
        return ((self.gate_proj, self.up_proj),)

    def _operands(self, context: LayerContext) -> SwiGLUMLP:
        """What `kernels.linear.swiglu_mlp` computes with; shares memory with this module."""
        settings = context.settings
        return SwiGLUMLP(
            *self.gate_up(),
            self.down_proj.projection(),
            (context.seed(self.index, 2), context.seed(self.index, 3)),
            settings.output_scratch,
            settings.low_memory_decode,
        )

    def forward(self, x1: Tensor, norm: RMSNorm, context: LayerContext) -> tuple[Tensor, MLPSaved]:
        """x1 (N, H) -> y (N, H) and every activation that backward could use."""
        mlp, tile_tokens = self._operands(context), _tile_tokens(context, x1)
        if tile_tokens is not None:
            return _forward_in_tiles(x1, norm, mlp, tile_tokens), MLPSaved()
        h, _ = norm.forward_with_rstd(x1)
        y, inner = mlp_forward(h, mlp)
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
        mlp, tile_tokens = self._operands(context), _tile_tokens(context, x1)
        decoded = mlp.decode(x1.dtype)
        if tile_tokens is None:
            h, rstd = norm.forward_with_rstd(x1)
            inner = saved.inner or mlp_inner(h, mlp, decoded)
            dh, _ = mlp_backward(dy, h, mlp, inner, grads, decoded=decoded)
            assert dh is not None
            return norm.backward(dh, x1, rstd, grads).add_(dy)

        def backward(dy: Tensor, h: Tensor, tile: TokenTile, grads: Gradients) -> Tensor:
            part = _of_tile(mlp, tile)
            inner = mlp_inner(h, part, decoded)
            dh, _ = mlp_backward(dy, h, part, inner, grads, decoded=decoded)
            assert dh is not None
            return dh

        return backward_in_tiles(dy, x1, norm, tile_tokens, backward, grads)


def _tile_tokens(context: LayerContext, x1: Tensor) -> int | None:
    """Tokens of a tile, where the settings ask for tiles or for one decoded weight at a time."""
    settings = context.settings
    return settings.mlp_tile_tokens or (x1.shape[0] if settings.low_memory_decode else None)


def _of_tile(mlp: SwiGLUMLP, tile: TokenTile) -> SwiGLUMLP:
    first, second = mlp.seeds
    return replace(mlp, seeds=(tile.seed(first), tile.seed(second)))


def _forward_in_tiles(x1: Tensor, norm: RMSNorm, mlp: SwiGLUMLP, tile_tokens: int) -> Tensor:
    """x1 (N, H) -> y (N, H); every weight is decoded once for all tiles where that is allowed."""
    decoded = mlp.decode(x1.dtype)

    def forward(h: Tensor, tile: TokenTile) -> Tensor:
        part = _of_tile(mlp, tile)
        inner = mlp_inner(h, part, decoded)
        # Each tensor is freed as soon as the next one exists: this is what tiles are for.
        del h
        activated = swiglu_forward(inner.gate, inner.up)
        del inner
        down, seed = (part.down,), part.seeds[1]
        return project(activated, down, seed, decoded[1], part.down_slot)[0][0]

    return forward_in_tiles(x1, norm, tile_tokens, forward)
