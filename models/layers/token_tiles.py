"""Run a block's feed-forward part on a few tokens at a time.

    y = x1 + f(norm(x1))   for `tile_tokens` tokens at a time

The activations inside f are several times as wide as those between blocks, and the largest part of
a block's working set; in tiles they never exist whole. f sees every token by itself, so tiles
change no result. The backward pass recomputes each tile's inner activations once, computes its
gradients and frees it; the gradients of parameters are summed over tiles.

f is a dense SwiGLU (`models.layers.mlp`) or the experts of a mixture (`models.layers.moe`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.elementwise.dropout import Seed
from kernels.linear.adapters import Gradients
from kernels.linear.columns import Columns
from kernels.linear.projection import Projection
from kernels.runtime.simulation import equal_parts
from models.layers.linear import RMSNorm


@dataclass(frozen=True)
class TokenTile:
    """Consecutive tokens."""

    tokens: slice

    def seed(self, seed: Seed | None) -> Seed | None:
        """The seed of a dropout site whose rows begin with this tile's: they draw what the whole
        draws there.
        """
        return None if seed is None else seed.at(0, first_row=self.tokens.start)


class _Sums(dict[int, Tensor]):
    """`Gradients` in which setting a parameter again adds to its gradient."""

    def __setitem__(self, key: int, gradient: Tensor) -> None:
        before = self.get(key)
        super().__setitem__(key, gradient if before is None else before.add_(gradient))


@dataclass(frozen=True)
class NormedTiles:
    """How f's input is made: by a norm, for so many tokens at a time.

    `group` are projections that read it, for whose adapters it then has spare columns.
    """

    norm: RMSNorm
    tile_tokens: int
    group: Sequence[Projection] = ()


Forward = Callable[[Tensor | Columns, TokenTile], Tensor]
"""f: h (n, H) of a tile -> f(h) (n, H)."""

Backward = Callable[[Tensor, Tensor | Columns, TokenTile, Gradients], Tensor]
"""dy (n, H), h (n, H) of a tile -> dh (n, H); sets the gradient of every trainable parameter."""


def token_tiles(count: int, tile_tokens: int) -> Iterable[TokenTile]:
    """The tiles of `count` tokens; the last may be short."""
    return equal_parts(
        TokenTile(slice(first, min(first + tile_tokens, count)))
        for first in range(0, count, tile_tokens)
    )


def forward_in_tiles(x1: Tensor, tiled: NormedTiles, forward: Forward) -> Tensor:
    """x1 (N, H) -> y (N, H)."""
    y = torch.empty_like(x1)
    for tile in token_tiles(x1.shape[0], tiled.tile_tokens):
        part = x1[tile.tokens]
        # The only reference to the normed tile is the callee's, which frees it early.
        f = forward(tiled.norm.forward_for(part, tiled.group)[0], tile)
        torch.add(f, part, out=y[tile.tokens])
    return y


def backward_in_tiles(
    dy: Tensor, x1: Tensor, tiled: NormedTiles, backward: Backward, grads: Gradients
) -> Tensor:
    """dy (N, H) -> dx1 (N, H) in the memory of x1; parameters' gradients go into `grads`."""
    sums = _Sums()
    for tile in token_tiles(x1.shape[0], tiled.tile_tokens):
        part, d_part = x1[tile.tokens], dy[tile.tokens]
        h, rstd = tiled.norm.forward_for(part, tiled.group)
        dh = backward(d_part, h, tile, sums)
        tiled.norm.backward(dh, part, rstd, sums, dresidual=d_part, out=part)
    grads.update(sums)
    return x1
