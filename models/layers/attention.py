"""The attention of a decoder block, with its backward pass.

    x1 = x + o_proj(attention(rope(qk_norm(q, k)), v) [* sigmoid(gate)]),  q, k, v = qkv(norm(x))

A family may norm every head's q and k, rotate a part of each head or none of it, and gate the
heads' outputs: q_proj then has rows [q | gate] for every head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels.attention import (
    AttentionSettings,
    attention_backward,
    attention_forward,
    cached_attention,
)
from kernels.elementwise.rope import rope_
from kernels.linear.lora import Gradients, project, project_backward
from kernels.linear.projection import Decoded, Projection, decode, output_columns
from models.config.model_config import ModelConfig
from models.layers.context import LayerContext
from models.layers.linear import Linear, RMSNorm


@dataclass
class AttentionSaved:
    """What backward reads of attention; None where it is recomputed."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    gate: Tensor | None = None
    out: Tensor | None = None
    lse: list[Tensor] = field(default_factory=list)

    def trim(self, policy: str) -> AttentionSaved:
        """Only what `policy` saves."""
        return self if policy == "none" else AttentionSaved(out=self.out, lse=self.lse)

    def forget(self) -> None:
        """Free everything: the gradients of q, k and v are there."""
        self.q = self.k = self.v = self.gate = self.out = None
        self.lse = []


class Attention(nn.Module):
    """Holds q, k, v, o projections and, where the family has them, per-head norms of q and k."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.heads(index), config.kv_heads(index)
        self.index, self.head_dim = index, dim
        self.window, self.scale = config.window(index), dim**-0.5
        self.rotates, self.gated = config.rope_layers[index], config.attention_gate
        q_width = heads * dim * (2 if self.gated else 1)
        self.q_proj = Linear(hidden, q_width, config.attention_bias)
        self.k_proj = Linear(hidden, kv_heads * dim, config.attention_bias)
        self.v_proj = Linear(hidden, kv_heads * dim, config.attention_bias)
        self.o_proj = Linear(heads * dim, hidden, config.attention_output_bias)
        centred = config.zero_centered_norm
        normed = config.qk_norm
        self.q_norm = RMSNorm(dim, config.rms_norm_eps, centred) if normed else None
        self.k_norm = RMSNorm(dim, config.rms_norm_eps, centred) if normed else None

    def qkv(self) -> tuple[Projection, ...]:
        return (self.q_proj.projection(), self.k_proj.projection(), self.v_proj.projection())

    def same_input(self) -> tuple[tuple[Linear, ...], ...]:
        """Groups of projections that read the same input."""
        return ((self.q_proj, self.k_proj, self.v_proj),)

    def heads(self, x: Tensor) -> Tensor:
        """(N, heads * D) -> (N, heads, D), a view."""
        split: Tensor = x.unflatten(1, (-1, self.head_dim))
        return split

    def _split(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Outputs of the three projections as heads of q, k, v and gate, views."""
        q, k, v = (self.heads(part) for part in parts)
        if not self.gated:
            return q, k, v, None
        pairs = q.unflatten(1, (-1, 2))
        return pairs[:, :, 0], k, v, pairs[:, :, 1]

    def forward(
        self, x: Tensor, norm: RMSNorm, context: LayerContext
    ) -> tuple[Tensor, AttentionSaved]:
        """x (N, H) -> x1 (N, H) and every activation that backward could use."""
        saved = AttentionSaved()
        h, _ = norm.forward_with_rstd(x)
        self._qkv(h, context, saved, None)
        q, k = self._rotated(saved, context)
        assert saved.v is not None
        if context.cache is not None:
            keys, values = context.cache.append(self.index, k, saved.v)
            saved.out = cached_attention(q.contiguous(), keys, values, self.window, self.scale)
        else:
            saved.out, saved.lse = attention_forward(q, k, saved.v, self._settings(context))
        o_proj, seed = (self.o_proj.projection(),), context.seed(self.index, 1)
        del h
        y = project(self._gated(saved), o_proj, seed, slot=context.settings.output_scratch)[0][0]
        return y.add_(x), saved

    def _settings(self, context: LayerContext) -> AttentionSettings:
        return AttentionSettings(context.plan, self.window, self.scale)

    def _qkv(
        self, h: Tensor, context: LayerContext, saved: AttentionSaved, decoded: Decoded | None
    ) -> None:
        """q, k, v as heads; q and k rotated in place unless a norm needs their raw values."""
        ys, _ = project(h, self.qkv(), context.seed(self.index, 0), decoded)
        saved.q, saved.k, saved.v, saved.gate = self._split(tuple(ys))
        if self.q_norm is None:
            self._rotate(saved.q, context)
            self._rotate(saved.k, context)

    def _rotate(self, x: Tensor, context: LayerContext, inverse: bool = False) -> Tensor:
        """Rotate the leading elements of every head in place, if this layer does."""
        if self.rotates:
            rope_(x[..., : 2 * context.cos.shape[1]], context.cos, context.sin, inverse=inverse)
        return x

    def _rotated(self, saved: AttentionSaved, context: LayerContext) -> tuple[Tensor, Tensor]:
        """q and k as attention reads them."""
        assert saved.q is not None and saved.k is not None
        if self.q_norm is None or self.k_norm is None:
            return saved.q, saved.k
        q, k = self.q_norm.forward_with_rstd(saved.q)[0], self.k_norm.forward_with_rstd(saved.k)[0]
        return self._rotate(q, context), self._rotate(k, context)

    def _gated(self, saved: AttentionSaved) -> Tensor:
        """What o_proj reads: the heads' outputs (N, heads * D), gated where there is a gate."""
        assert saved.out is not None
        if saved.gate is None:
            return saved.out.flatten(1)
        return (saved.out * torch.sigmoid(saved.gate)).flatten(1)

    def backward(
        self,
        dx1: Tensor,
        x: Tensor,
        norm: RMSNorm,
        context: LayerContext,
        saved: AttentionSaved,
        grads: Gradients,
        need_dx: bool,
    ) -> Tensor | None:
        """dx1 (N, H) -> dx (N, H) or None; adds the gradient of every trainable parameter."""
        qkv, seed = self.qkv(), context.seed(self.index, 0)
        h, rstd = norm.forward_with_rstd(x)
        need_dh = need_dx or norm.weight.requires_grad
        decoded = None
        if not context.settings.low_memory_decode and (need_dh or saved.q is None):
            decoded = decode(qkv, x.dtype)
        if saved.q is None:
            self._qkv(h, context, saved, decoded)
        o_proj = (self.o_proj.projection(),)
        d_out = project_backward(
            (dx1,),
            self._gated(saved),
            o_proj,
            grads,
            seed=context.seed(self.index, 1),
            decoded=decode(o_proj, x.dtype, context.settings.output_scratch),
        )
        assert d_out is not None
        if context.settings.low_memory_decode:
            del h  # cheap to recompute
        d_qkv = self._scores_backward(self.heads(d_out), context, saved, grads)
        del d_out
        saved.forget()
        if context.settings.low_memory_decode:
            h, _ = norm.forward_with_rstd(x)
        dh = project_backward(d_qkv, h, qkv, grads, seed=seed, decoded=decoded, need_dx=need_dh)
        del d_qkv, h
        if dh is None:
            return None
        return norm.backward(dh, x, rstd, grads).add_(dx1)

    def _scores_backward(
        self, d_out: Tensor, context: LayerContext, saved: AttentionSaved, grads: Gradients
    ) -> tuple[Tensor, ...]:
        """Gradients of the three projections' outputs, column blocks of one matrix."""
        q, k = self._rotated(saved, context)
        raw_q, raw_k, v, out = saved.q, saved.k, saved.v, saved.out
        assert raw_q is not None and raw_k is not None and v is not None and out is not None
        parts = output_columns(d_out.shape[0], self.qkv(), d_out)
        dq, dk, dv, d_gate = self._split(parts)
        if d_gate is not None and saved.gate is not None:
            open_ = torch.sigmoid(saved.gate)
            torch.mul(d_out * out, open_ * (1 - open_), out=d_gate)
            d_out = d_out * open_
        settings = self._settings(context)
        attention_backward(d_out, q, k, v, out, saved.lse, settings, (dq, dk, dv))
        self._rotate(dq, context, inverse=True)
        self._rotate(dk, context, inverse=True)
        if self.q_norm is not None and self.k_norm is not None:
            for grad, raw, norm in ((dq, raw_q, self.q_norm), (dk, raw_k, self.k_norm)):
                _, rstd = norm.forward_with_rstd(raw)
                grad.copy_(norm.backward(grad, raw, rstd, grads))
        return parts
