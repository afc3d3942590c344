"""A dense feed-forward part over tiles of tokens (`models.layers.token_tiles`).

    y = x1 + down(silu(g) * u),   g, u = gate_up(norm(x1)),   for `rows` tokens at a time

Every weight is decoded once for all tiles, or once for each use in each tile where the operands ask
for one decoded weight at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from kernels.elementwise.swiglu import swiglu_forward
from kernels.linear.lora import Gradients, project
from kernels.linear.swiglu_mlp import SwiGLUMLP, mlp_backward, mlp_inner
from models.layers.linear import RMSNorm
from models.layers.token_tiles import Tile, backward_in_tiles, forward_in_tiles


@dataclass(frozen=True)
class TiledMLP:
    """One block's MLP with the norm before it; its seeds are those of the first tile."""

    norm: RMSNorm
    mlp: SwiGLUMLP
    rows: int

    def forward(self, x1: Tensor) -> Tensor:
        """x1 (N, H) -> y (N, H)."""
        decoded = self.mlp.decode(x1.dtype)

        def forward(h: Tensor, tile: Tile) -> Tensor:
            mlp = self._of_tile(tile)
            inner = mlp_inner(h, mlp, decoded)
            # Each tensor is freed as soon as the next one exists: this is what tiles are for.
            del h
            activated = swiglu_forward(inner.gate, inner.up)
            del inner
            down, seed = (mlp.down,), mlp.seeds[1]
            return project(activated, down, seed, decoded.down, mlp.down_slot)[0][0]

        return forward_in_tiles(x1, self.norm, self.rows, forward)

    def backward(self, dy: Tensor, x1: Tensor, grads: Gradients) -> Tensor:
        """dy (N, H) -> dx1 (N, H) in the memory of x1; parameters' gradients go into `grads`."""
        decoded = self.mlp.decode(x1.dtype)

        def backward(dy: Tensor, h: Tensor, tile: Tile, grads: Gradients) -> Tensor:
            mlp = self._of_tile(tile)
            inner = mlp_inner(h, mlp, decoded)
            dh, _ = mlp_backward(dy, h, mlp, inner, grads, decoded=decoded)
            assert dh is not None
            return dh

        return backward_in_tiles(dy, x1, self.norm, self.rows, backward, grads)

    def _of_tile(self, tile: Tile) -> SwiGLUMLP:
        first, second = self.mlp.seeds
        return replace(self.mlp, seeds=(tile.seed(first), tile.seed(second)))
