"""The attention of a decoder block, with its backward pass.

    x1 = x + o_proj(attention(rope(qk_norm(q, k)), v) [* sigmoid(gate)]),  q, k, v = qkv(norm(x))

A family may norm every head's q and k, rotate a part of each head or none of it, and gate the
heads' outputs: q_proj then has rows [q | gate] for every head.

Where a rank has a slice of the tokens (`models.parallel`), q, k and v are exchanged as they leave
their projections, and from there to attention's output are those of all tokens and a share of the
heads; so are their gradients. The gate and o_proj have the rank's own tokens again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kernels.attention import (
    AttentionSettings,
    attention_backward,
    attention_forward,
    writes_gradients,
)
from kernels.elementwise.rope import rope_qk_
from kernels.few_rows.elementwise import rotate_rows, takes_width
from kernels.few_rows.product import takes_rows
from kernels.few_rows.project import project_rows
from kernels.linear.adapters import AdapterSaved, Gradients
from kernels.linear.columns import Columns, blocks_of, matrix_of, output_columns
from kernels.linear.decode import Decoded, decode
from kernels.linear.lora import project
from kernels.linear.lora_backward import project_backward
from kernels.linear.projection import Projection
from models.config.model_config import ModelConfig
from models.layers.context import LayerContext
from models.layers.linear import Linear, RMSNorm, RowGroups
from models.parallel.head_exchange import HeadExchange, copies_of, joined_like


@dataclass
class AttentionSaved:
    """What backward reads of attention; None where it is recomputed.

    `adapter_input` and `output_adapter_input` are what the adapters of q, k, v and of o left (the
    second value of `project`). `heads_out` is `out` before it was exchanged, if it was.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    gate: Tensor | None = None
    out: Tensor | None = None
    heads_out: Tensor | None = None
    lse: list[Tensor] = field(default_factory=list)
    adapter_input: AdapterSaved | None = None
    output_adapter_input: AdapterSaved | None = None

    def trim(self, policy: str) -> AttentionSaved:
        """Only what `policy` saves."""
        if policy == "none":
            return self
        low = self.output_adapter_input
        return AttentionSaved(out=self.out, lse=self.lse, output_adapter_input=low)

    def forget(self) -> None:
        """Free everything: the gradients of q, k and v are there."""
        self.q = self.k = self.v = self.gate = self.out = self.heads_out = None
        self.output_adapter_input = None
        self.lse = []


class Attention(nn.Module):
    """Holds q, k, v, o projections and, where the family has them, per-head norms of q and k."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.heads(index), config.kv_heads(index)
        self.index, self.head_dim = index, dim
        self.query_heads, self.kv_heads = heads, kv_heads
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

    def qkv(self, groups: RowGroups | None = None) -> tuple[Projection, ...]:
        return tuple(p.projection(groups) for p in (self.q_proj, self.k_proj, self.v_proj))

    def same_input(self) -> tuple[tuple[Linear, ...], ...]:
        """Groups of projections that read the same input."""
        return ((self.q_proj, self.k_proj, self.v_proj),)

    def heads(self, x: Tensor) -> Tensor:
        """(N, heads * D) -> (N, heads, D), a view."""
        split: Tensor = x.unflatten(1, (-1, self.head_dim))
        return split

    def output(self, groups: RowGroups | None = None) -> tuple[Projection]:
        """The projection that writes the mixer's output."""
        return (self.o_proj.projection(groups),)

    def _split(self, parts: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Outputs of the three projections as heads of q, k, v and gate, views."""
        q, k, v = (self.heads(part) for part in parts)
        if not self.gated:
            return q, k, v, None
        pairs = q.unflatten(1, (-1, 2))
        return pairs[:, :, 0], k, v, pairs[:, :, 1]

    def forward(
        self, x: Tensor, norm: RMSNorm, context: LayerContext
    ) -> tuple[Tensor, AttentionSaved]:
        """x (N, H) -> x1 - x (N, H) and every activation that backward could use."""
        saved = AttentionSaved()
        h, _ = norm.forward_for(x, self.qkv())
        self._qkv(h, context, saved, None)
        del h
        q, k, _ = self._rotated(saved, context)
        assert saved.v is not None
        if context.cache is not None:
            saved.out = context.cache.attend(self.index, q, k, saved.v, self.window, self.scale)
        else:
            saved.out, saved.lse = attention_forward(q, k, saved.v, self._settings(context))
            if context.exchange is not None:
                saved.heads_out = saved.out
                saved.out = context.exchange.of_tokens(saved.heads_out)
        seed, slot = context.seed(self.index, 1), context.settings.output_scratch
        output = self.output(context.groups)
        ys, low = project(self._gated(saved), output, seed, slot=slot, spare=False)
        saved.output_adapter_input = low
        return context.output_dropout(self.index, 0)(ys.matrix), saved

    def next_tokens(self, x: Tensor, norm: RMSNorm, context: LayerContext) -> Tensor:
        """x1 - x (N, H) of x (N, H), the next tokens of the sequences in the context's cache."""
        assert context.cache is not None
        groups = context.groups
        ys = project_rows(norm.next_tokens(x), self.qkv(groups))
        q_width, kv_width = self.q_proj.out_features, self.k_proj.out_features
        saved = AttentionSaved()
        parts = ys.split((q_width, kv_width, kv_width), 1)
        saved.q, saved.k, saved.v, saved.gate = self._split(parts)
        if self.q_norm is None:
            half, both = context.cos.shape[1], ys[:, : q_width + kv_width]
            whole = self.rotates and not self.gated and 2 * half == self.head_dim
            if whole and takes_rows(both) and takes_width(half):
                rotate_rows(self.heads(both), context.cos, context.sin)
            else:
                self._rotate(saved.q, saved.k, context)
        q, k, _ = self._rotated(saved, context)
        saved.out = context.cache.attend(self.index, q, k, saved.v, self.window, self.scale)
        return project_rows(self._gated(saved), self.output(groups))

    def _settings(self, context: LayerContext) -> AttentionSettings:
        p = context.settings.attention_dropout
        seed = context.attention_seed(self.index) if p > 0.0 else None
        settings = AttentionSettings(context.plan, self.window, self.scale, None, p, seed)
        if context.exchange is None or seed is None:
            return settings
        ranks = context.exchange.ranks
        first = ranks.rank * self.query_heads // ranks.size
        return replace(settings, first_head=first, all_heads=self.query_heads)

    def copies(self, ranks: int) -> tuple[int, int, int]:
        """How often heads of q, k and v are sent to `ranks` that share them.

        Raises `ValueError` where they cannot be shared equally.
        """
        keys = copies_of(self.query_heads, self.kv_heads, ranks)
        return 1, keys, keys

    def _qkv(
        self,
        h: Tensor | Columns,
        context: LayerContext,
        saved: AttentionSaved,
        decoded: Decoded | None,
    ) -> None:
        """q, k, v as heads; q and k rotated in place unless a norm needs their raw values."""
        qkv, seed = self.qkv(context.groups), context.seed(self.index, 0)
        ys, saved.adapter_input = project(h, qkv, seed, decoded)
        q, k, v, saved.gate = self._split(ys)
        if context.exchange is not None:
            copies = self.copies(context.exchange.ranks.size)
            q, k, v = context.exchange.to_heads((q, k, v), copies)
            if saved.gate is not None:  # else it holds the memory of q, k and v
                saved.gate = saved.gate.contiguous()
        saved.q, saved.k, saved.v = q, k, v
        if self.q_norm is None:
            self._rotate(saved.q, saved.k, context)

    def _rotate(self, q: Tensor, k: Tensor, context: LayerContext, inverse: bool = False) -> None:
        """Rotate the leading elements of every head in place, if this layer does."""
        if self.rotates:
            width = 2 * context.cos.shape[1]
            q, k = q[..., :width], k[..., :width]
            rope_qk_(q, k, context.cos, context.sin, inverse=inverse)

    def _rotated(
        self, saved: AttentionSaved, context: LayerContext
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """q and k as attention reads them, and 1 / rms of every head where these are normed."""
        assert saved.q is not None and saved.k is not None
        if self.q_norm is None or self.k_norm is None:
            return saved.q, saved.k, None
        q, q_rstd = self.q_norm.forward_with_rstd(saved.q)
        k, k_rstd = self.k_norm.forward_with_rstd(saved.k)
        self._rotate(q, k, context)
        return q, k, (q_rstd, k_rstd)

    def _gated(self, saved: AttentionSaved) -> Tensor:
        """What o_proj reads: the heads' outputs (N, heads * D), gated where there is a gate."""
        assert saved.out is not None
        if saved.gate is None:
            return saved.out.flatten(1)
        return (saved.out * torch.sigmoid(saved.gate)).flatten(1)

    def backward(
        self,
        dx1: Tensor | Columns,
        x: Tensor,
        norm: RMSNorm,
        context: LayerContext,
        saved: AttentionSaved,
        grads: Gradients,
        below: tuple[Projection, ...] | None,
    ) -> Tensor | Columns | None:
        """dx1 (N, H) -> dx (N, H), with spare columns for `below` where their adapters join.

        None without `below`. Adds the gradient of every trainable parameter.
        """
        qkv, seed = self.qkv(), context.seed(self.index, 0)
        frugal, recompute = context.settings.low_memory_decode, saved.q is None
        need_dh = below is not None or norm.weight.requires_grad
        decoded = decode(qkv, x.dtype) if not frugal and (need_dh or recompute) else None
        h: Tensor | Columns
        if recompute:
            h, rstd = norm.forward_for(x, qkv)
            self._qkv(h, context, saved, decoded)
            if frugal:
                del h  # cheap to recompute
        given = context.output_dropout(self.index, 0).gradient(dx1)
        d_qkv = self._heads_backward(given, context, saved, grads)
        del given
        low = saved.adapter_input
        saved.forget()
        if frugal or not recompute:
            h, rstd = norm.forward_with_rstd(x)
        dh = project_backward(
            d_qkv, h, qkv, grads, seed=seed, saved=low, decoded=decoded, need_dx=need_dh
        )
        del d_qkv, h
        if dh is None:
            return None
        return norm.backward_for(dh, x, rstd, grads, matrix_of(dx1), below or ())

    def _heads_backward(
        self,
        dx1: Tensor | Columns,
        context: LayerContext,
        saved: AttentionSaved,
        grads: Gradients,
    ) -> Columns:
        """Gradients of the outputs of q_proj, k_proj and v_proj."""
        output, slot = self.output(), context.settings.output_scratch
        d_out = project_backward(
            blocks_of(dx1),
            self._gated(saved),
            output,
            grads,
            seed=context.seed(self.index, 1),
            saved=saved.output_adapter_input,
            decoded=decode(output, matrix_of(dx1).dtype, slot),
        )
        assert d_out is not None
        return self._scores_backward(self.heads(d_out), context, saved, grads)

    def _scores_backward(
        self, d_out: Tensor, context: LayerContext, saved: AttentionSaved, grads: Gradients
    ) -> Columns:
        """Gradients of the three projections' outputs."""
        q, k, rstd = self._rotated(saved, context)
        v, out = saved.v, saved.out
        assert v is not None and out is not None
        columns = output_columns(d_out.shape[0], self.qkv(), d_out)
        *own, d_gate = self._split(columns)
        if d_gate is not None and saved.gate is not None:
            open_ = torch.sigmoid(saved.gate)
            torch.mul(d_out * out, open_ * (1 - open_), out=d_gate)
            d_out = d_out * open_
        exchange, joined = context.exchange, None
        if exchange is None:
            dq, dk, dv = own
        else:
            d_out, out = _exchanged(exchange, d_out, saved)
            joined, (dq, dk, dv) = joined_like((q, k, v))
        settings, targets = self._settings(context), (dq, dk, dv)
        given = targets if writes_gradients(q, k, settings) else None
        made = attention_backward(d_out, q, k, v, out, saved.lse, settings, given)
        if given is None:
            dv.copy_(made[2])
        self._input_gradients((made[0], made[1]), (dq, dk), saved, context, rstd, grads)
        if exchange is not None and joined is not None:
            exchange.to_tokens(joined, own, self.copies(exchange.ranks.size))
        return columns

    def _input_gradients(
        self,
        made: tuple[Tensor, Tensor],
        targets: tuple[Tensor, Tensor],
        saved: AttentionSaved,
        context: LayerContext,
        rstd: tuple[Tensor, Tensor] | None,
        grads: Gradients,
    ) -> None:
        """Gradients of q and k before rotation and norm, out of `made` into `targets`."""
        whole = self.rotates and 2 * context.cos.shape[1] == self.head_dim
        if rstd is None and whole and made[0] is not targets[0]:
            rope_qk_(*made, context.cos, context.sin, inverse=True, out=targets)
            return
        self._rotate(*made, context, inverse=True)
        norms, raw = (self.q_norm, self.k_norm), (saved.q, saved.k)
        for index, (grad, target) in enumerate(zip(made, targets, strict=True)):
            norm, values = norms[index], raw[index]
            if norm is not None and rstd is not None and values is not None:
                norm.backward(grad, values, rstd[index], grads, out=target)
            elif grad is not target:
                target.copy_(grad)


def _exchanged(
    exchange: HeadExchange, d_out: Tensor, saved: AttentionSaved
) -> tuple[Tensor, Tensor]:
    """The gradient of attention's output, and the output, of this rank's heads."""
    assert saved.out is not None
    if saved.heads_out is not None:
        return exchange.to_heads((d_out,), (1,))[0], saved.heads_out
    d_out, out = exchange.to_heads((d_out, saved.out), (1, 1))
    return d_out, out
