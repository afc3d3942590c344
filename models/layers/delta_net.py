"""The Gated DeltaNet mixer of a decoder block, with its backward pass.

    m, z = in_proj(h),  b, a = in_proj(h),  h = norm(x)
    q, k, v = split(silu(conv(m))),   g, beta = gates(a, b)
    x1 = x + out_proj(w rms(delta(q, k, v, g, beta)) * silu(z))

Qwen3.5 has separate projections, of [q | k | v], z, b and a. Qwen3-Next has two, whose rows are
grouped by key head: [q | k | v | z] and [b | a] with the r value heads of that key head together.
The arithmetic is in `kernels.delta_net`. Where a rank has a slice of the tokens, m, b, a and the
rule's output are exchanged, and from the convolution to that output are those of all tokens and a
share of the heads (`models.parallel`). Policy "none" saves the projections' outputs, the rule's
output and its states; "selective" the output and T.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.delta_net import (
    GatedDeltaInputs,
    GatedDeltaSaved,
    gated_delta_backward,
    gated_delta_forward,
    gated_delta_step,
    gates_backward,
    gates_forward,
)
from kernels.delta_net.causal_conv1d import (
    causal_conv1d_backward,
    causal_conv1d_forward,
    causal_conv1d_step,
    final_conv_state,
)
from kernels.delta_net.gated_rms_norm import gated_rms_norm_backward, gated_rms_norm_forward
from kernels.linear.adapters import AdapterSaved, Gradients
from kernels.linear.columns import Columns, blocks_of, matrix_of, output_columns
from kernels.linear.decode import Decoded, decode
from kernels.linear.lora import project
from kernels.linear.lora_backward import project_backward
from kernels.linear.projection import Projection
from models.cache.one_sequence import DeltaState, LayerCache
from models.config.model_config import ModelConfig
from models.layers.context import LayerContext
from models.layers.linear import Linear, RMSNorm, RowGroups
from models.parallel.delta_heads import DeltaShare
from models.parallel.head_exchange import HeadExchange


@dataclass
class DeltaNetSaved:
    """What backward reads; None where it is recomputed.

    mixed (N, C) and z (N, Hv, V), b, a (N, Hv) are the projections' outputs, `out` (N, Hv, V) the
    rule's. `adapter_input` and `output_adapter_input` are what the adapters of the wide projections
    and of out_proj left (the second value of `project`).
    """

    mixed: Tensor | None = None
    z: Tensor | None = None
    b: Tensor | None = None
    a: Tensor | None = None
    out: Tensor | None = None
    rule: GatedDeltaSaved | None = None
    adapter_input: AdapterSaved | None = None
    output_adapter_input: AdapterSaved | None = None

    def trim(self, policy: str) -> DeltaNetSaved:
        """Only what `policy` saves."""
        if policy == "none" or self.rule is None:
            return self
        low = self.output_adapter_input
        return DeltaNetSaved(out=self.out, rule=self.rule.trim(), output_adapter_input=low)


class Conv1d(nn.Module):
    """Holds the taps (C, 1, J) of a depthwise convolution."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))


class DeltaNet(nn.Module):
    """Holds the projections, convolution, gates and norm of one Gated DeltaNet mixer."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        hidden, joint = config.hidden_size, config.linear_joint_projections
        self.index, self.joint = index, joint
        self.key_heads, self.value_heads = (
            config.linear_num_key_heads,
            config.linear_num_value_heads,
        )
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.widths = (keys, keys, values)
        self.heads = DeltaShare(self.key_heads, self.value_heads, self.key_dim, self.value_dim)
        if joint:
            self.in_proj_qkvz = Linear(hidden, 2 * keys + 2 * values)
            self.in_proj_ba = Linear(hidden, 2 * self.value_heads)
        else:
            self.in_proj_qkv = Linear(hidden, 2 * keys + values)
            self.in_proj_z = Linear(hidden, values)
            self.in_proj_b = Linear(hidden, self.value_heads)
            self.in_proj_a = Linear(hidden, self.value_heads)
        self.conv1d = Conv1d(2 * keys + values, config.linear_conv_kernel_dim)
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.norm = RMSNorm(self.value_dim, config.rms_norm_eps)
        self.out_proj = Linear(values, hidden)

    def same_input(self) -> tuple[tuple[Linear, ...], ...]:
        """Groups of projections that read the same input."""
        if self.joint:
            return ()
        return ((self.in_proj_qkv, self.in_proj_z), (self.in_proj_b, self.in_proj_a))

    def _wide(self, groups: RowGroups | None = None) -> tuple[Projection, ...]:
        """The projections of m and z."""
        wide = (self.in_proj_qkvz,) if self.joint else (self.in_proj_qkv, self.in_proj_z)
        return tuple(linear.projection(groups) for linear in wide)

    def _narrow(self, groups: RowGroups | None = None) -> tuple[Projection, ...]:
        """The projections of b and a."""
        narrow = (self.in_proj_ba,) if self.joint else (self.in_proj_b, self.in_proj_a)
        return tuple(linear.projection(groups) for linear in narrow)

    def output(self, groups: RowGroups | None = None) -> tuple[Projection]:
        """The projection that writes the mixer's output."""
        return (self.out_proj.projection(groups),)

    def _by_key_head(self) -> tuple[int, int, int, int]:
        """Columns of q, k, v and z of one key head in the joint projection."""
        values = self.value_dim * (self.value_heads // self.key_heads)
        return self.key_dim, self.key_dim, values, values

    def forward(
        self, x: Tensor, norm: RMSNorm, context: LayerContext
    ) -> tuple[Tensor, DeltaNetSaved]:
        """x (N, H) -> x1 - x (N, H) and every activation that backward could use."""
        saved = DeltaNetSaved()
        h, _ = norm.forward_for(x, self._wide())
        self._project(h, context, saved, None)
        assert saved.mixed is not None and saved.a is not None and saved.b is not None
        g, beta = self._gates(saved.a, saved.b, context)
        if context.cache is None:
            q, k, v = self._convolved(saved.mixed, context)
            saved.out, _, saved.rule = gated_delta_forward(
                GatedDeltaInputs(q, k, v, g, beta, context.plan.bounds)
            )
            if context.exchange is not None:
                saved.out = context.exchange.of_tokens(saved.out)
        else:
            saved.out = self._cached(saved.mixed, g, beta, context.cache)
        normed, seed = self._normed(saved)[0].flatten(1), context.seed(self.index, 1)
        ys, low = project(normed, self.output(context.groups), seed, slot="narrow", spare=False)
        saved.output_adapter_input = low
        return context.output_dropout(self.index, 0)(ys.matrix), saved

    def _project(
        self,
        h: Tensor | Columns,
        context: LayerContext,
        saved: DeltaNetSaved,
        decoded: Decoded | None,
    ) -> None:
        self._project_tokens(h, context, saved, decoded)
        if context.exchange is None:
            return
        assert saved.mixed is not None and saved.b is not None and saved.a is not None
        parts = (*self.heads.split(saved.mixed), saved.b.unsqueeze(2), saved.a.unsqueeze(2))
        copies = self.copies(context.exchange.ranks.size)
        q, _, _, b, a = context.exchange.to_heads(parts, copies)
        # q, k and v lie side by side.
        width = self._own_heads(context).width
        saved.mixed = q.as_strided((q.shape[0], width), (q.stride(0), 1))
        saved.b, saved.a = b.flatten(1), a.flatten(1)
        assert saved.z is not None
        saved.z = saved.z.contiguous()  # else it holds the memory of m

    def _project_tokens(
        self,
        h: Tensor | Columns,
        context: LayerContext,
        saved: DeltaNetSaved,
        decoded: Decoded | None,
    ) -> None:
        seed = context.seed(self.index, 0)
        wide, saved.adapter_input = project(h, self._wide(context.groups), seed, decoded)
        narrow, _ = project(matrix_of(h), self._narrow(context.groups))
        heads = (self.value_heads, self.value_dim)
        if not self.joint:
            (saved.mixed, z), (saved.b, saved.a) = wide, narrow
            saved.z = z.unflatten(1, heads)
            return
        q, k, v, z = wide[0].unflatten(1, (self.key_heads, -1)).split(self._by_key_head(), 2)
        saved.mixed = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), 1)
        saved.z = z.reshape(-1, *heads)
        b, a = narrow[0].unflatten(1, (self.key_heads, 2, -1)).unbind(2)
        saved.b, saved.a = b.flatten(1), a.flatten(1)

    def copies(self, ranks: int) -> tuple[int, ...]:
        """How often heads of q, k, v, b and a are sent to `ranks` that share them.

        Raises `ValueError` where they cannot be shared equally.
        """
        keys = replace(self.heads, ranks=ranks).copies
        return keys, keys, 1, 1, 1

    def _own_heads(self, context: LayerContext) -> DeltaShare:
        """The heads that this rank computes."""
        if context.exchange is None:
            return self.heads
        ranks = context.exchange.ranks
        return replace(self.heads, rank=ranks.rank, ranks=ranks.size)

    def _gates(self, a: Tensor, b: Tensor, context: LayerContext) -> tuple[Tensor, Tensor]:
        own = self._own_heads(context)
        return gates_forward(a, b, own.of_values(self.A_log), own.of_values(self.dt_bias))

    def _convolved(self, mixed: Tensor, context: LayerContext) -> tuple[Tensor, Tensor, Tensor]:
        own = self._own_heads(context)
        weight = own.of_channels(self.conv1d.weight)
        return own.split(causal_conv1d_forward(mixed, weight, context.plan.bounds))

    def _cached(self, mixed: Tensor, g: Tensor, beta: Tensor, cache: LayerCache) -> Tensor:
        """The rule's output for the next tokens of cached sequences; their states move on."""
        parts = [
            self._moved(mixed[tokens], g[tokens], beta[tokens], state)
            for tokens, state in cache.delta_states(self.index)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _moved(self, mixed: Tensor, g: Tensor, beta: Tensor, state: DeltaState) -> Tensor:
        """The rule's output for a token of each of B sequences, or several of one."""
        weight, bounds = self.conv1d.weight, (0, mixed.shape[0])
        if mixed.shape[0] == state.inputs.shape[0]:
            q, k, v = self.heads.split(causal_conv1d_step(mixed, weight, state.inputs))
            return gated_delta_step(q, k, v, g, beta, state.memory)
        y = causal_conv1d_forward(mixed, weight, bounds, state.inputs)
        inputs = GatedDeltaInputs(*self.heads.split(y), g, beta, bounds, state.memory)
        out, memory, _ = gated_delta_forward(inputs)
        state.inputs.copy_(final_conv_state(mixed, weight.shape[-1], bounds, state.inputs))
        state.memory.copy_(memory)
        return out

    def _normed(self, saved: DeltaNetSaved) -> tuple[Tensor, Tensor]:
        """The gated norm (N, Hv, V) of the rule's output, and its rstd."""
        assert saved.out is not None and saved.z is not None
        return gated_rms_norm_forward(saved.out, saved.z, self.norm.weight, self.norm.eps)

    def backward(
        self,
        dx1: Tensor | Columns,
        x: Tensor,
        norm: RMSNorm,
        context: LayerContext,
        saved: DeltaNetSaved,
        grads: Gradients,
        below: tuple[Projection, ...] | None,
    ) -> Tensor | Columns | None:
        """dx1 (N, H) -> dx (N, H), with spare columns for `below` where their adapters join.

        None without `below`. Adds the gradient of every trainable parameter.
        """
        wide, seed = self._wide(), context.seed(self.index, 0)
        h, rstd = norm.forward_for(x, wide)
        need_dh = below is not None or norm.weight.requires_grad
        decoded = decode(wide, x.dtype) if need_dh or saved.mixed is None else None
        if saved.mixed is None:
            self._project(h, context, saved, decoded)
        given = context.output_dropout(self.index, 0).gradient(dx1)
        do, dz = self._output_backward(given, context, saved, grads)
        del given
        d_mixed, db, da = self._rule_backward(do, context, saved, grads)
        dys = self._joined_gradients(d_mixed, dz, x)
        low = saved.adapter_input
        dh = project_backward(
            dys, h, wide, grads, seed=seed, saved=low, decoded=decoded, need_dx=need_dh
        )
        narrow = self._narrow()
        d_narrow: tuple[Tensor, ...] = (db, da)
        if self.joint:
            pair = (part.unflatten(1, (self.key_heads, -1)) for part in (db, da))
            d_narrow = (torch.cat(tuple(pair), 2).flatten(1),)
        d_gates = project_backward(d_narrow, matrix_of(h), narrow, grads, need_dx=need_dh)
        if dh is None or d_gates is None:
            return None
        dh += d_gates
        return norm.backward_for(dh, x, rstd, grads, matrix_of(dx1), below or ())

    def _output_backward(
        self, dx1: Tensor | Columns, context: LayerContext, saved: DeltaNetSaved, grads: Gradients
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the rule's output and of z, both (N, Hv, V)."""
        normed, rstd = self._normed(saved)
        output = self.output()
        d_normed = project_backward(
            blocks_of(dx1),
            normed.flatten(1),
            output,
            grads,
            seed=context.seed(self.index, 1),
            saved=saved.output_adapter_input,
            decoded=decode(output, normed.dtype, "narrow"),
        )
        assert d_normed is not None and saved.out is not None and saved.z is not None
        weight = self.norm.weight
        do, dz, d_weight = gated_rms_norm_backward(
            d_normed.view_as(saved.out),
            saved.out,
            saved.z,
            weight,
            rstd,
            need_dweight=weight.requires_grad,
        )
        if d_weight is not None:
            grads[id(weight)] = d_weight
        return do, dz

    def _rule_backward(
        self, do: Tensor, context: LayerContext, saved: DeltaNetSaved, grads: Gradients
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of m (N, C), b and a (N, Hv)."""
        mixed, a, b, rule = saved.mixed, saved.a, saved.b, saved.rule
        assert mixed is not None and a is not None and b is not None and rule is not None
        own, exchange = self._own_heads(context), context.exchange
        if exchange is not None:
            (do,) = exchange.to_heads((do,), (1,))
        g, beta = self._gates(a, b, context)
        heads = self._convolved(mixed, context)
        inputs = GatedDeltaInputs(*heads, g, beta, context.plan.bounds)
        d_rule = gated_delta_backward(do, inputs, rule)
        a_log, dt_bias = own.of_values(self.A_log), own.of_values(self.dt_bias)
        da, db, da_log, d_dt_bias = gates_backward(d_rule.dg, d_rule.dbeta, a, b, a_log, dt_bias)
        own.add_values(grads, self.A_log, da_log)
        own.add_values(grads, self.dt_bias, d_dt_bias)
        d_heads = (d_rule.dq, d_rule.dk, d_rule.dv)
        d_convolved = torch.cat([part.flatten(1) for part in d_heads], 1)
        weight = self.conv1d.weight
        d_mixed, d_weight = causal_conv1d_backward(
            d_convolved,
            mixed,
            own.of_channels(weight),
            context.plan.bounds,
            need_dweight=weight.requires_grad,
        )
        own.add_channels(grads, weight, d_weight)
        if exchange is None:
            return d_mixed, db, da
        return self._tokens_gradients(exchange, d_mixed, db, da)

    def _tokens_gradients(
        self, exchange: HeadExchange, d_mixed: Tensor, db: Tensor, da: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of m (n, C), b and a (n, Hv) of this rank's tokens."""
        own = exchange.slices.counts[exchange.ranks.rank]
        mixed = d_mixed.new_empty(own, sum(self.widths))
        b, a = (x.new_empty(own, self.value_heads) for x in (db, da))
        targets = (*self.heads.split(mixed), b.unsqueeze(2), a.unsqueeze(2))
        whole = torch.cat((d_mixed, db, da), 1)
        exchange.to_tokens(whole, targets, self.copies(exchange.ranks.size))
        return mixed, b, a

    def _joined_gradients(self, d_mixed: Tensor, dz: Tensor, like: Tensor) -> Columns:
        """Gradients of the wide projections' outputs."""
        parts = output_columns(d_mixed.shape[0], self._wide(), like)
        if not self.joint:
            parts[0].copy_(d_mixed)
            parts[1].copy_(dz.flatten(1))
            return parts
        by_head = parts[0].unflatten(1, (self.key_heads, -1)).split(self._by_key_head(), 2)
        sources = (*d_mixed.split(self.widths, 1), dz.flatten(1))
        for target, source in zip(by_head, sources, strict=True):
            target.copy_(source.unflatten(1, (self.key_heads, -1)))
        return parts
