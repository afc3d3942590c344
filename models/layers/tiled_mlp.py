"""A dense feed-forward part over tiles of tokens (`models.layers.token_tiles`).

    y = x1 + down(silu(g) * u),   g, u = gate_up(norm(x1)),   for `rows` tokens at a time

With `low_memory_decode` no more than one decoded weight exists at a time: gate and up become two
products, and every weight is decoded once for each use of each tile instead of once for all.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.elementwise.dropout import Seed
from kernels.elementwise.swiglu import swiglu_backward_, swiglu_forward
from kernels.linear.lora import Gradients, project, project_backward
from kernels.linear.projection import Decoded, Projection, decode
from models.layers.linear import RMSNorm
from models.layers.token_tiles import Tile, backward_in_tiles, forward_in_tiles


@dataclass(frozen=True)
class TiledMLP:
    """One block's MLP with the norm before it.

    `seeds` are those of the dropout before gate and up, and before down; None without dropout.
    """

    norm: RMSNorm
    gate_up: tuple[Projection, ...]
    down: Projection
    seeds: tuple[Seed | None, Seed | None]
    rows: int
    low_memory_decode: bool = False

    def forward(self, x1: Tensor) -> Tensor:
        """x1 (N, H) -> y (N, H)."""
        wide, narrow = self._decoded(x1)

        def forward(h: Tensor, tile: Tile) -> Tensor:
            gate, up = self._inner(h, tile.seed(self.seeds[0]), wide)
            del h
            inner = swiglu_forward(gate, up)
            del gate, up
            seed = tile.seed(self.seeds[1])
            return project(inner, (self.down,), seed, narrow, self._slot)[0][0]

        return forward_in_tiles(x1, self.norm, self.rows, forward)

    def backward(self, dy: Tensor, x1: Tensor, grads: Gradients) -> Tensor:
        """dy (N, H) -> dx1 (N, H) in the memory of x1; parameters' gradients go into `grads`."""
        wide, narrow = self._decoded(x1)

        def backward(dy: Tensor, h: Tensor, tile: Tile, grads: Gradients) -> Tensor:
            first, second = (tile.seed(seed) for seed in self.seeds)
            return self._tile_backward(dy, h, (first, second), wide, narrow, grads)

        return backward_in_tiles(dy, x1, self.norm, self.rows, backward, grads)

    def _tile_backward(
        self,
        dy: Tensor,
        h: Tensor,
        seeds: tuple[Seed | None, Seed | None],
        wide: Decoded | None,
        narrow: Decoded | None,
        grads: Gradients,
    ) -> Tensor:
        """dh (n, H) of a tile for dy (n, H) and h (n, H)."""
        gate, up = self._inner(h, seeds[0], wide)
        inner = swiglu_forward(gate, up)
        narrow = narrow or decode((self.down,), dy.dtype, self._slot)
        d_inner = project_backward((dy,), inner, (self.down,), grads, seed=seeds[1], decoded=narrow)
        del inner
        assert d_inner is not None
        d_gate_up = swiglu_backward_(d_inner, gate, up)
        del d_inner
        dh: Tensor | None = None
        for dys, group in self._groups(d_gate_up):
            more = project_backward(dys, h, group, grads, seed=seeds[0], decoded=wide)
            assert more is not None
            dh = more if dh is None else dh.add_(more)
        assert dh is not None
        return dh

    @property
    def _slot(self) -> str:
        """The scratch that down is decoded into: the other weights' own where it is one by one."""
        return "wide" if self.low_memory_decode else "narrow"

    def _decoded(self, x1: Tensor) -> tuple[Decoded | None, Decoded | None]:
        """The weights for all tiles, where they may all be there together."""
        if self.low_memory_decode:
            return None, None
        return decode(self.gate_up, x1.dtype), decode((self.down,), x1.dtype, self._slot)

    def _inner(self, h: Tensor, seed: Seed | None, wide: Decoded | None) -> list[Tensor]:
        if not self.low_memory_decode:
            return project(h, self.gate_up, seed, wide)[0]
        return [project(h, (projection,), seed)[0][0] for projection in self.gate_up]

    def _groups(
        self, d_gate_up: tuple[Tensor, ...]
    ) -> list[tuple[tuple[Tensor, ...], tuple[Projection, ...]]]:
        if not self.low_memory_decode:
            return [(d_gate_up, self.gate_up)]
        # The weight that was decoded last has been written over by down: the order is free.
        return [((d,), (p,)) for d, p in zip(d_gate_up, self.gate_up, strict=True)]
