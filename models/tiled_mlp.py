"""The MLP of a block over tiles of tokens: its inner activations never exist whole.

    y = x1 + down(silu(g) * u),   g, u = gate_up(norm(x1)),   for `rows` tokens at a time

The inner activations of a token are four times as wide as an intermediate layer, which makes them
the largest part of a block's working set; every token goes through the MLP by itself, so any number
of them can go at once. The backward pass recomputes each tile's inner activations once, forms its
gradients and forgets it. What is added up over tiles is the adapters' gradients.

With `singly` no more than one decoded weight exists at a time: gate and up become two products, and
every weight is decoded once for each use of each tile instead of once for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.lora import Gradients, project, project_backward
from kernels.projection import Decoded, Projection, decode
from kernels.swiglu import swiglu_backward_, swiglu_forward
from models.linear import RMSNorm

_TILE_SEED = 0x5851F42D4C957F2D


@dataclass(frozen=True)
class TiledMLP:
    """One block's MLP with the norm before it.

    `seeds` are those of the dropout before gate and up, and before down; None without dropout.
    """

    norm: RMSNorm
    gate_up: tuple[Projection, ...]
    down: Projection
    seeds: tuple[int | None, int | None]
    rows: int
    singly: bool = False

    def forward(self, x1: Tensor) -> Tensor:
        """x1 (N, H) -> y (N, H)."""
        y = torch.empty_like(x1)
        wide, narrow = self._decoded(x1)
        for tile, seeds in self._tiles(x1.shape[0]):
            h, _ = self.norm.run(x1[tile])
            gate, up = self._inner(h, seeds[0], wide)
            del h
            inner = swiglu_forward(gate, up)
            del gate, up
            (out,), _ = project(inner, (self.down,), seeds[1], narrow, self._slot)
            torch.add(out, x1[tile], out=y[tile])
        return y

    def backward(self, dy: Tensor, x1: Tensor, grads: Gradients) -> Tensor:
        """dy (N, H) -> dx1 (N, H) in the memory of x1; parameters' gradients go into `grads`."""
        wide, narrow = self._decoded(x1)
        for tile, seeds in self._tiles(x1.shape[0]):
            part: Gradients = {}
            self._tile_backward(dy[tile], x1[tile], seeds, wide, narrow, part)
            for key, gradient in part.items():
                grads[key] = grads[key].add_(gradient) if key in grads else gradient
        return x1

    def _tile_backward(
        self,
        dy: Tensor,
        x1: Tensor,
        seeds: tuple[int | None, int | None],
        wide: Decoded | None,
        narrow: Decoded | None,
        grads: Gradients,
    ) -> None:
        h, rstd = self.norm.run(x1)
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
        torch.add(self.norm.differentiate(dh, x1, rstd, grads), dy, out=x1)

    @property
    def _slot(self) -> str:
        """The scratch that down is decoded into: the other weights' own where it is one by one."""
        return "wide" if self.singly else "narrow"

    def _decoded(self, x1: Tensor) -> tuple[Decoded | None, Decoded | None]:
        """The weights for all tiles, where they may all be there together."""
        if self.singly:
            return None, None
        return decode(self.gate_up, x1.dtype), decode((self.down,), x1.dtype, self._slot)

    def _tiles(self, count: int) -> Iterator[tuple[slice, tuple[int | None, int | None]]]:
        """(tokens, seeds) of every tile. Each draws its own dropout; the first the block's own."""
        for index, start in enumerate(range(0, count, self.rows)):
            first, second = (
                None if seed is None else (seed + index * _TILE_SEED) & 0x7FFFFFFFFFFFFFFF
                for seed in self.seeds
            )
            yield slice(start, min(start + self.rows, count)), (first, second)

    def _inner(self, h: Tensor, seed: int | None, wide: Decoded | None) -> list[Tensor]:
        if not self.singly:
            return project(h, self.gate_up, seed, wide)[0]
        return [project(h, (projection,), seed)[0][0] for projection in self.gate_up]

    def _groups(
        self, d_gate_up: tuple[Tensor, ...]
    ) -> list[tuple[tuple[Tensor, ...], tuple[Projection, ...]]]:
        if not self.singly:
            return [(d_gate_up, self.gate_up)]
        # The weight that was decoded last has been written over by down: the order is free.
        return [((d,), (p,)) for d, p in zip(d_gate_up, self.gate_up, strict=True)]
