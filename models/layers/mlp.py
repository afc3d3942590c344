"""The SwiGLU feed-forward part of a decoder block.

y = x1 + down(silu(g) * u),   g, u = gate_up(norm(x1))

`kernels.linear.swiglu_mlp` has the arithmetic and its backward pass; the settings may ask for tiles
of tokens (`models.layers.token_tiles`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from kernels.elementwise.swiglu import swiglu_forward
from kernels.few_rows.elementwise import gate_rows, takes_width
from kernels.few_rows.product import takes_rows
from kernels.few_rows.project import project_rows
from kernels.linear.adapters import AdapterSaved, Gradients
from kernels.linear.columns import Columns, matrix_of
from kernels.linear.lora import project
from kernels.linear.projection import Projection
from kernels.linear.swiglu_mlp import (
    MLPActivations,
    SwiGLUMLP,
    mlp_activated,
    mlp_backward,
    mlp_down_backward,
    mlp_gate_up_backward,
    mlp_inner,
    mlp_output,
)
from models.layers.context import LayerContext, OutputDropout
from models.layers.linear import Linear, RMSNorm, RowGroups
from models.layers.token_tiles import NormedTiles, TokenTile, backward_in_tiles, forward_in_tiles


@dataclass
class MLPSaved:
    """What backward reads of the feed-forward part; None where it is recomputed.

    `down_input` is what down's adapter left (the second value of `project`).
    """

    inner: MLPActivations | None = None
    down_input: AdapterSaved | None = None

    def trim(self, policy: str) -> MLPSaved:
        """Only what `policy` saves."""
        if policy == "none":
            return self
        return MLPSaved(down_input=self.down_input if policy == "selective" else None)


class MLP(nn.Module):
    """Holds gate, up and down projections."""

    def __init__(self, hidden: int, inner: int, index: int, bias: bool = False) -> None:
        super().__init__()
        self.index = index
        self.gate_proj = Linear(hidden, inner, bias)
        self.up_proj = Linear(hidden, inner, bias)
        self.down_proj = Linear(inner, hidden, bias)

    def gate_up(self, groups: RowGroups | None = None) -> tuple[Projection, Projection]:
        return self.gate_proj.projection(groups), self.up_proj.projection(groups)

    def output(self) -> tuple[Projection, ...]:
        """The projection that writes the part's output."""
        return (self.down_proj.projection(),)

    def same_input(self) -> tuple[tuple[Linear, ...], ...]:
        """Groups of projections that read the same input."""
        return ((self.gate_proj, self.up_proj),)

    def _operands(self, context: LayerContext) -> SwiGLUMLP:
        """What `kernels.linear.swiglu_mlp` computes with; shares memory with this module."""
        settings = context.settings
        return SwiGLUMLP(
            *self.gate_up(context.groups),
            self.down_proj.projection(context.groups),
            (context.seed(self.index, 2), context.seed(self.index, 3)),
            settings.output_scratch,
            settings.low_memory_decode,
        )

    def forward(
        self, x: Tensor, addend: Tensor, norm: RMSNorm, context: LayerContext
    ) -> tuple[Tensor, MLPSaved]:
        """x1 = x + addend (N, H) -> y (N, H) and all that backward could use.

        `addend` becomes x1.
        """
        mlp, tile_tokens = self._operands(context), _tile_tokens(context, x)
        drop = context.output_dropout(self.index, 1)
        if tile_tokens is not None:
            tiled = NormedTiles(norm, tile_tokens, (mlp.gate, mlp.up))
            return _forward_in_tiles(addend.add_(x), tiled, mlp, drop), MLPSaved()
        inner = mlp_inner(norm.add_forward_for(x, addend, self.gate_up()), mlp)
        y, inner = mlp_output(inner, mlp)
        return drop(y).add_(addend), MLPSaved(inner, inner.down_input)

    def next_tokens(
        self, x: Tensor, addend: Tensor, norm: RMSNorm, context: LayerContext
    ) -> Tensor:
        """y (N, H) as `forward` gives it, for few tokens without gradients.

        `addend` becomes x1.
        """
        groups = context.groups
        gate_up = project_rows(norm.next_tokens(x, addend), self.gate_up(groups))
        width = self.gate_proj.out_features
        if takes_rows(gate_up) and takes_width(width):
            h = gate_rows(gate_up)
        else:
            h = swiglu_forward(gate_up[:, :width], gate_up[:, width:])
        return project_rows(h, (self.down_proj.projection(groups),)).add_(addend)

    def backward(
        self,
        dy: Tensor | Columns,
        x1: Tensor,
        norm: RMSNorm,
        context: LayerContext,
        saved: MLPSaved,
        grads: Gradients,
        mixer: tuple[Projection],
    ) -> Tensor | Columns:
        """dy (N, H) -> dx1 (N, H), with spare columns for `mixer` where its adapter joins products.

        Adds the gradient of every trainable parameter.
        """
        mlp, tile_tokens = self._operands(context), _tile_tokens(context, x1)
        drop = context.output_dropout(self.index, 1)
        if tile_tokens is None:
            return self._backward((drop.gradient(dy), dy), x1, norm, mlp, saved, grads, mixer)
        decoded = mlp.decode(x1.dtype)

        def backward(dy: Tensor, h: Tensor | Columns, tile: TokenTile, grads: Gradients) -> Tensor:
            part = _of_tile(mlp, tile)
            inner = mlp_inner(h, part, decoded)
            given = drop.from_row(tile.tokens.start)(dy)
            dh, _ = mlp_backward(given, h, part, inner, grads, decoded=decoded)
            assert dh is not None
            return dh

        tiled = NormedTiles(norm, tile_tokens, self.gate_up())
        return backward_in_tiles(matrix_of(dy), x1, tiled, backward, grads)

    def _backward(
        self,
        gradients: tuple[Tensor | Columns, Tensor | Columns],
        x1: Tensor,
        norm: RMSNorm,
        mlp: SwiGLUMLP,
        saved: MLPSaved,
        grads: Gradients,
        mixer: tuple[Projection],
    ) -> Tensor | Columns:
        """All tokens at once. What is saved needs norm(x1) late, when the widest memory is free.

        `gradients` are those of down_proj's output and of the block's.
        """
        inner, (given, dy) = saved.inner, gradients
        decoded = mlp.decode(x1.dtype)
        h: Tensor | Columns
        if inner is None:
            h, rstd = norm.forward_for(x1, self.gate_up())
            inner = replace(mlp_inner(h, mlp, decoded), down_input=saved.down_input)
            mlp_down_backward(given, mlp, inner, grads, decoded[1])
        else:
            mlp_down_backward(given, mlp, inner, grads, decoded[1])
            h, rstd = norm.forward_with_rstd(x1)
        del given, gradients
        dh = mlp_gate_up_backward(h, mlp, inner, grads, decoded[0])
        assert dh is not None
        return norm.backward_for(dh, x1, rstd, grads, matrix_of(dy), mixer)


def _tile_tokens(context: LayerContext, x1: Tensor) -> int | None:
    """Tokens of a tile, where the settings ask for tiles or for one decoded weight at a time."""
    settings = context.settings
    return settings.mlp_tile_tokens or (x1.shape[0] if settings.low_memory_decode else None)


def _of_tile(mlp: SwiGLUMLP, tile: TokenTile) -> SwiGLUMLP:
    first, second = mlp.seeds
    return replace(mlp, seeds=(tile.seed(first), tile.seed(second)))


def _forward_in_tiles(
    x1: Tensor, tiled: NormedTiles, mlp: SwiGLUMLP, drop: OutputDropout
) -> Tensor:
    """x1 (N, H) -> y (N, H); every weight is decoded once for all tiles where that is allowed."""
    decoded = mlp.decode(x1.dtype)

    def forward(h: Tensor | Columns, tile: TokenTile) -> Tensor:
        part = _of_tile(mlp, tile)
        inner = mlp_inner(h, part, decoded)
        # Each tensor is freed as soon as the next one exists: this is what tiles are for.
        del h
        activated = mlp_activated(inner, part)
        del inner
        down, seed = (part.down,), part.seeds[1]
        ys, _ = project(activated, down, seed, decoded[1], part.down_slot, spare=False)
        return drop.from_row(tile.tokens.start)(ys.matrix)

    return forward_in_tiles(x1, tiled, forward)
