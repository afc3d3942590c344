"""One pre-norm decoder block, forward and backward by hand.

    x1 = x  + o_proj(attention(rope(qk_norm(q, k)), v)),   q, k, v = qkv(norm1(x))
    y  = x1 + down(silu(g) * u),                           g, u    = gate_up(norm2(x1))

No autograd runs inside: the backward pass is written out, so that it can recompute exactly what
was not kept and nothing else. Which tensors are kept is the recompute level:

    level      kept beside x                          recomputed in backward
    none       q, k, v, o, lse, x1, g, u              norms, silu
    selective  o, lse, x1                             norms, silu, qkv, gate and up
    full       nothing                                all of the above, attention and o_proj

The outputs of down_proj are never recomputed: no gradient reads them. A weight that is decoded
from NF4 for recompute is used for the gradient in the same breath.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels.attention import (
    AttentionPlan,
    attention_backward,
    attention_forward,
    cached_attention,
)
from kernels.lora import Gradients, project, project_backward
from kernels.projection import Decoded, Projection, decode, output_columns
from kernels.rms_norm import rms_norm_backward, rms_norm_forward
from kernels.rope import rope_
from kernels.swiglu import swiglu_backward_, swiglu_forward
from models.config import ModelConfig
from models.kv_cache import KVCache
from models.linear import Linear, RMSNorm

LEVELS = ("none", "selective", "full")
_SITES = 4


@dataclass(frozen=True)
class Batch:
    """What every layer needs to know of a packed batch, computed once.

    cos, sin (N, head_dim / 2); `dropout_seed` None means evaluation. With a `cache` the tokens
    are the next ones of one cached sequence.
    """

    cos: Tensor
    sin: Tensor
    plan: AttentionPlan
    dropout_seed: int | None = None
    cache: KVCache | None = None

    def seed(self, layer: int, site: int) -> int | None:
        """Seed of one dropout site: a pure function of the batch's seed, layer and site."""
        if self.dropout_seed is None:
            return None
        return (self.dropout_seed * 1_000_003 + layer * _SITES + site) & 0x7FFFFFFFFFFFFFFF


@dataclass
class Kept:
    """Activations of one block that backward reads; None where they are recomputed."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    out: Tensor | None = None
    lse: list[Tensor] = field(default_factory=list)
    x1: Tensor | None = None
    gate: Tensor | None = None
    up: Tensor | None = None

    def trim(self, level: str) -> Kept:
        """Only what `level` keeps."""
        if level == "none":
            return self
        if level == "selective":
            return Kept(out=self.out, lse=self.lse, x1=self.x1)
        return Kept()


class Attention(nn.Module):
    """Holds q, k, v, o projections and, where the family has them, per-head norms of q and k."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(hidden, heads * dim, config.attention_bias)
        self.k_proj = Linear(hidden, kv_heads * dim, config.attention_bias)
        self.v_proj = Linear(hidden, kv_heads * dim, config.attention_bias)
        self.o_proj = Linear(heads * dim, hidden, config.attention_output_bias)
        self.q_norm = RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, config.rms_norm_eps) if config.qk_norm else None

    def qkv(self) -> tuple[Projection, ...]:
        return (self.q_proj.projection(), self.k_proj.projection(), self.v_proj.projection())


class MLP(nn.Module):
    """Holds gate, up and down projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias)
        self.up_proj = Linear(hidden, inner, bias)
        self.down_proj = Linear(inner, hidden, bias)

    def gate_up(self) -> tuple[Projection, ...]:
        return (self.gate_proj.projection(), self.up_proj.projection())


class DecoderLayer(nn.Module):
    """One block. `run` is the forward pass, `differentiate` the backward pass."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.window = config.window(index)
        self.scale = config.head_dim**-0.5
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def trainable(self) -> list[Tensor]:
        """Parameters that want a gradient, in a fixed order."""
        return [p for p in self.parameters() if p.requires_grad]

    def join_weights(self) -> None:
        """Lay dense weights that read the same input one below the other in memory.

        They stay separate parameters and become one product in either direction.
        """
        attention, mlp = self.self_attn, self.mlp
        for group in (
            (attention.q_proj, attention.k_proj, attention.v_proj),
            (mlp.gate_proj, mlp.up_proj),
        ):
            weights = [linear.weight for linear in group]
            dense = [weight for weight in weights if isinstance(weight, Tensor)]
            if len(dense) < len(group):
                continue
            joined = torch.cat([weight.detach() for weight in dense])
            for weight, part in zip(dense, joined.split([len(w) for w in dense]), strict=True):
                weight.data = part

    def heads(self, x: Tensor) -> Tensor:
        """(N, heads * D) -> (N, heads, D), a view."""
        split: Tensor = x.unflatten(1, (-1, self.head_dim))
        return split

    def run(self, x: Tensor, batch: Batch) -> tuple[Tensor, Kept]:
        """x (N, H) -> y (N, H) and every activation that backward could use."""
        kept = Kept()
        self._attend(x, batch, kept)
        x1 = kept.x1
        assert x1 is not None
        h, _ = rms_norm_forward(x1, self.post_attention_layernorm.weight, self._eps)
        (kept.gate, kept.up), _ = project(h, self.mlp.gate_up(), batch.seed(self.index, 2))
        inner = swiglu_forward(kept.gate, kept.up)
        down = (self.mlp.down_proj.projection(),)
        (y,), _ = project(inner, down, batch.seed(self.index, 3), slot="narrow")
        return y.add_(x1), kept

    @property
    def _eps(self) -> float:
        return self.input_layernorm.eps

    def _attend(self, x: Tensor, batch: Batch, kept: Kept) -> None:
        h, _ = rms_norm_forward(x, self.input_layernorm.weight, self._eps)
        self._qkv(h, batch, kept, None)
        q, k = self.rotated(kept, batch)
        assert kept.v is not None
        if batch.cache is not None:
            keys, values = batch.cache.append(self.index, k, kept.v)
            kept.out = cached_attention(q, keys, values, self.window, self.scale)
        else:
            kept.out, kept.lse = attention_forward(
                q, k, kept.v, batch.plan, self.window, self.scale
            )
        kept.x1 = self.attention_output(kept.out, batch).add_(x)

    def _qkv(self, h: Tensor, batch: Batch, kept: Kept, decoded: Decoded | None) -> None:
        """q, k, v as heads; q and k rotated in place unless a norm needs their raw values."""
        ys, _ = project(h, self.self_attn.qkv(), batch.seed(self.index, 0), decoded)
        kept.q, kept.k, kept.v = (self.heads(y) for y in ys)
        if self.self_attn.q_norm is None:
            rope_(kept.q, batch.cos, batch.sin)
            rope_(kept.k, batch.cos, batch.sin)

    def rotated(self, kept: Kept, batch: Batch) -> tuple[Tensor, Tensor]:
        """q and k as attention reads them."""
        assert kept.q is not None and kept.k is not None
        q_norm, k_norm = self.self_attn.q_norm, self.self_attn.k_norm
        if q_norm is None or k_norm is None:
            return kept.q, kept.k
        q, _ = rms_norm_forward(kept.q, q_norm.weight, q_norm.eps)
        k, _ = rms_norm_forward(kept.k, k_norm.weight, k_norm.eps)
        return rope_(q, batch.cos, batch.sin), rope_(k, batch.cos, batch.sin)

    def attention_output(self, out: Tensor, batch: Batch) -> Tensor:
        """o_proj of the heads' outputs (N, heads, D) -> (N, H)."""
        o_proj = (self.self_attn.o_proj.projection(),)
        seed = batch.seed(self.index, 1)
        return project(out.flatten(1), o_proj, seed, slot="narrow")[0][0]

    def differentiate(
        self, dy: Tensor, x: Tensor, batch: Batch, kept: Kept, need_dx: bool
    ) -> tuple[Tensor | None, Gradients]:
        """dy (N, H) -> dx (N, H) or None, and the gradient of every trainable parameter."""
        grads: Gradients = {}
        if kept.x1 is None:
            self._attend(x, batch, kept)
        dx1 = self._mlp_backward(dy, batch, kept, grads)
        kept.gate = kept.up = kept.x1 = None
        return self._attention_backward(dx1, x, batch, kept, grads, need_dx), grads

    def _mlp_backward(self, dy: Tensor, batch: Batch, kept: Kept, grads: Gradients) -> Tensor:
        x1, norm = kept.x1, self.post_attention_layernorm
        assert x1 is not None
        gate_up, seed = self.mlp.gate_up(), batch.seed(self.index, 2)
        h, rstd = rms_norm_forward(x1, norm.weight, norm.eps)
        decoded = decode(gate_up, x1.dtype)
        if kept.gate is None:
            (kept.gate, kept.up), _ = project(h, gate_up, seed, decoded)
        assert kept.up is not None
        inner = swiglu_forward(kept.gate, kept.up)
        down = (self.mlp.down_proj.projection(),)
        d_inner = project_backward(
            (dy,),
            inner,
            down,
            grads,
            seed=batch.seed(self.index, 3),
            decoded=decode(down, x1.dtype, "narrow"),
        )
        assert d_inner is not None
        d_gate_up = swiglu_backward_(d_inner, kept.gate, kept.up)
        del inner, d_inner
        dh = project_backward(d_gate_up, h, gate_up, grads, seed=seed, decoded=decoded)
        assert dh is not None
        return _norm_backward(dh, x1, norm, rstd, grads).add_(dy)

    def _attention_backward(
        self, dx1: Tensor, x: Tensor, batch: Batch, kept: Kept, grads: Gradients, need_dx: bool
    ) -> Tensor | None:
        norm, qkv, seed = self.input_layernorm, self.self_attn.qkv(), batch.seed(self.index, 0)
        h, rstd = rms_norm_forward(x, norm.weight, norm.eps)
        need_dh = need_dx or norm.weight.requires_grad
        decoded = decode(qkv, x.dtype) if need_dh or kept.q is None else None
        if kept.q is None:
            self._qkv(h, batch, kept, decoded)
        o_proj = (self.self_attn.o_proj.projection(),)
        assert kept.out is not None and kept.v is not None
        d_out = project_backward(
            (dx1,),
            kept.out.flatten(1),
            o_proj,
            grads,
            seed=batch.seed(self.index, 1),
            decoded=decode(o_proj, x.dtype, "narrow"),
        )
        assert d_out is not None
        d_qkv = self._scores_backward(self.heads(d_out), batch, kept, grads)
        dh = project_backward(d_qkv, h, qkv, grads, seed=seed, decoded=decoded, need_dx=need_dh)
        if dh is None:
            return None
        return _norm_backward(dh, x, norm, rstd, grads).add_(dx1)

    def _scores_backward(
        self, d_out: Tensor, batch: Batch, kept: Kept, grads: Gradients
    ) -> tuple[Tensor, ...]:
        """Gradients of the three projections' outputs, column blocks of one matrix."""
        q, k = self.rotated(kept, batch)
        raw_q, raw_k, v, out = kept.q, kept.k, kept.v, kept.out
        assert raw_q is not None and raw_k is not None and v is not None and out is not None
        parts = output_columns(d_out.shape[0], self.self_attn.qkv(), d_out)
        dq, dk, dv = (self.heads(part) for part in parts)
        attention_backward(
            d_out, q, k, v, out, kept.lse, batch.plan, self.window, self.scale, (dq, dk, dv)
        )
        rope_(dq, batch.cos, batch.sin, inverse=True)
        rope_(dk, batch.cos, batch.sin, inverse=True)
        q_norm, k_norm = self.self_attn.q_norm, self.self_attn.k_norm
        if q_norm is not None and k_norm is not None:
            for grad, raw, norm in ((dq, raw_q, q_norm), (dk, raw_k, k_norm)):
                _, rstd = rms_norm_forward(raw, norm.weight, norm.eps)
                grad.copy_(_norm_backward(grad, raw, norm, rstd, grads))
        return parts


def _norm_backward(dy: Tensor, x: Tensor, norm: RMSNorm, rstd: Tensor, grads: Gradients) -> Tensor:
    dx, dweight = rms_norm_backward(
        dy, x, norm.weight, rstd, need_dweight=norm.weight.requires_grad
    )
    if dweight is not None:
        grads[id(norm.weight)] = dweight
    return dx
