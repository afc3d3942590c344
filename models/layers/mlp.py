"""The SwiGLU feed-forward part of a decoder block, forward and backward by hand.

y = x1 + down(silu(g) * u),   g, u = gate_up(norm(x1))
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kernels.elementwise.swiglu import swiglu_backward_, swiglu_forward
from kernels.linear.lora import Gradients, project, project_backward
from kernels.linear.projection import Projection, decode
from models.layers.linear import Linear, RMSNorm
from models.layers.packed_batch import Batch
from models.layers.tiled_mlp import TiledMLP


@dataclass
class MLPSaved:
    """What backward reads of the feed-forward part; None where it is computed again."""

    gate: Tensor | None = None
    up: Tensor | None = None

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

    def gate_up(self) -> tuple[Projection, ...]:
        return (self.gate_proj.projection(), self.up_proj.projection())

    def joined(self) -> tuple[tuple[Linear, ...], ...]:
        """The projections that read the same input and want their weights side by side."""
        return ((self.gate_proj, self.up_proj),)

    def _tiled(self, norm: RMSNorm, batch: Batch, tokens: int) -> TiledMLP | None:
        """This part over tiles of tokens, where the batch asks for that."""
        settings = batch.settings
        if settings.mlp_tile_tokens is None and not settings.low_memory_decode:
            return None
        return TiledMLP(
            norm,
            self.gate_up(),
            self.down_proj.projection(),
            (batch.seed(self.index, 2), batch.seed(self.index, 3)),
            settings.mlp_tile_tokens or tokens,
            settings.low_memory_decode,
        )

    def forward(self, x1: Tensor, norm: RMSNorm, batch: Batch) -> tuple[Tensor, MLPSaved]:
        """x1 (N, H) -> y (N, H) and every activation that backward could use."""
        tiled = self._tiled(norm, batch, x1.shape[0])
        if tiled is not None:
            return tiled.forward(x1), MLPSaved()
        h, _ = norm.forward_with_rstd(x1)
        (gate, up), _ = project(h, self.gate_up(), batch.seed(self.index, 2))
        inner = swiglu_forward(gate, up)
        down = (self.down_proj.projection(),)
        (y,), _ = project(inner, down, batch.seed(self.index, 3), slot="narrow")
        return y.add_(x1), MLPSaved(gate, up)

    def backward(
        self,
        dy: Tensor,
        x1: Tensor,
        norm: RMSNorm,
        batch: Batch,
        saved: MLPSaved,
        grads: Gradients,
    ) -> Tensor:
        """dy (N, H) -> dx1 (N, H); adds the gradient of every trainable parameter."""
        tiled = self._tiled(norm, batch, x1.shape[0])
        if tiled is not None:
            return tiled.backward(dy, x1, grads)
        gate_up, seed = self.gate_up(), batch.seed(self.index, 2)
        h, rstd = norm.forward_with_rstd(x1)
        decoded = decode(gate_up, x1.dtype)
        if saved.gate is None:
            (saved.gate, saved.up), _ = project(h, gate_up, seed, decoded)
        assert saved.up is not None
        inner = swiglu_forward(saved.gate, saved.up)
        down = (self.down_proj.projection(),)
        d_inner = project_backward(
            (dy,),
            inner,
            down,
            grads,
            seed=batch.seed(self.index, 3),
            decoded=decode(down, x1.dtype, "narrow"),
        )
        assert d_inner is not None
        d_gate_up = swiglu_backward_(d_inner, saved.gate, saved.up)
        del inner, d_inner
        dh = project_backward(d_gate_up, h, gate_up, grads, seed=seed, decoded=decoded)
        assert dh is not None
        return norm.backward(dh, x1, rstd, grads).add_(dy)
