"""One pre-norm decoder block, with its backward pass.

    x1 = x  + mixer(norm1(x)),     the mixer attention or Gated DeltaNet
    y  = x1 + mlp(norm2(x1)),      the feed-forward part dense or a mixture of experts

No autograd runs inside: the backward pass is written out, so that it recomputes exactly what was
not saved. The checkpointing policy says what is saved besides x:

    policy     saved                                  recomputed in backward
    none       q, k, v, o, lse, x1, gate, up          norms, silu
    selective  o, lse, x1                             norms, silu, q, k, v, gate, up
    full       nothing                                all of the above, attention and o_proj

for attention and a dense feed-forward part, and of every adapter whose input is not recomputed the
product x A^T; Gated DeltaNet and mixtures say what they save in their
own files. The outputs of down_proj are never recomputed: no gradient reads them. A weight decoded
for recomputation is reused for the gradient right away.

A new mixer or feed-forward part is one file with a module that follows `Mixer` or `FeedForward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kernels.linear.adapters import Gradients
from kernels.linear.columns import Columns
from kernels.linear.projection import Projection
from models.config.model_config import ModelConfig
from models.layers.attention import Attention, AttentionSaved
from models.layers.context import LayerContext
from models.layers.delta_net import DeltaNet, DeltaNetSaved
from models.layers.linear import Linear, RMSNorm
from models.layers.mlp import MLP, MLPSaved
from models.layers.moe import MoE, MoESaved
from models.layers.observer import layer_observer


class Part(Protocol):
    """A mixer or feed-forward part, which adds itself to its input after a norm of it."""

    def same_input(self) -> tuple[tuple[Linear, ...], ...]:
        """Groups of projections that read the same input: their weights are stored adjacently."""


class Mixer(Part, Protocol):
    """Mixes tokens: attention or Gated DeltaNet."""

    def copies(self, ranks: int) -> tuple[int, ...]:
        """How often its heads are sent to `ranks` that share them.

        Raises `ValueError` where they cannot be shared equally.
        """

    def forward(self, x: Tensor, norm: RMSNorm, context: LayerContext, /) -> tuple[Tensor, Any]:
        """x (N, H) -> what is to be added to x (N, H), and all that backward could use."""

    def output(self) -> tuple[Projection]:
        """The projection that writes the mixer's output."""

    def backward(
        self,
        dx1: Tensor | Columns,
        x: Tensor,
        norm: RMSNorm,
        context: LayerContext,
        saved: Any,
        grads: Gradients,
        below: tuple[Projection, ...] | None,
        /,
    ) -> Tensor | Columns | None:
        """dx1 (N, H) -> dx (N, H), with spare columns for `below`; None without it."""


class FeedForward(Part, Protocol):
    """Works on each token alone: a dense SwiGLU or a mixture of experts."""

    def forward(
        self, x: Tensor, addend: Tensor, norm: RMSNorm, context: LayerContext, /
    ) -> tuple[Tensor, Any]:
        """x and the mixer's output (N, H), which becomes x1 -> y (N, H), and what backward uses.

        The sum is formed here, so that the norm that reads it can form it on the way.
        """

    def output(self) -> tuple[Projection, ...]:
        """The projection that writes the part's output, if it is one."""

    def backward(
        self,
        dy: Tensor | Columns,
        x1: Tensor,
        norm: RMSNorm,
        context: LayerContext,
        saved: Any,
        grads: Gradients,
        mixer: tuple[Projection],
        /,
    ) -> Tensor | Columns:
        """dy (N, H) -> dx1 (N, H), with spare columns for the mixer's output projection."""


@dataclass
class BlockSaved:
    """Activations of one block that backward reads; None where they are recomputed."""

    mixer: AttentionSaved | DeltaNetSaved | None = None
    x1: Tensor | None = None
    mlp: MLPSaved | MoESaved | None = None

    def trim(self, policy: str) -> BlockSaved:
        """Only what `policy` saves."""
        if policy == "none":
            return self
        mlp = None if self.mlp is None else self.mlp.trim(policy)
        if policy == "full" or self.mixer is None:
            return BlockSaved(mlp=mlp)
        return BlockSaved(self.mixer.trim(policy), self.x1, mlp)


class DecoderLayer(nn.Module):
    """One block of the decoder."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        centred = config.zero_centered_norm
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, centred)
        linear = config.layer_types[index] == "linear_attention"
        self.self_attn = None if linear else Attention(config, index)
        self.linear_attn = DeltaNet(config, index) if linear else None
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, centred)
        self.mlp: FeedForward = (
            MoE(config, index)
            if config.sparse_layers[index]
            else MLP(config.hidden_size, config.intermediate_size, index, config.mlp_bias)
        )

    @property
    def mixer(self) -> Mixer:
        """What mixes tokens: attention or Gated DeltaNet."""
        mixer = self.linear_attn if self.self_attn is None else self.self_attn
        assert mixer is not None
        return mixer

    def trainable(self) -> list[Tensor]:
        """Parameters that want a gradient, in a fixed order."""
        owned = (p for module in self.modules() for p in module._parameters.values())
        return [p for p in owned if p is not None and p.requires_grad]

    def make_weights_adjacent(self) -> None:
        """Lay dense weights that read the same input one after another in memory.

        They stay separate parameters, and one matrix product serves them all.
        """
        for group in (*self.mixer.same_input(), *self.mlp.same_input()):
            weights = [linear.weight for linear in group]
            dense = [weight for weight in weights if isinstance(weight, Tensor)]
            if len(dense) < len(group):
                continue
            joined = torch.cat([weight.detach() for weight in dense])
            for weight, part in zip(dense, joined.split([len(w) for w in dense]), strict=True):
                weight.data = part

    def forward(
        self, x: Tensor, context: LayerContext, policy: str = "none"
    ) -> tuple[Tensor, BlockSaved]:
        """x (N, H) -> y (N, H) and the activations that `policy` saves."""
        observer = layer_observer()
        observer.forward_begins(self.index)
        y, saved = self._forward(x, context, policy)
        observer.forward_ends(self.index)
        return y, saved

    def next_tokens(self, x: Tensor, context: LayerContext) -> Tensor:
        """y (N, H) of x (N, H), the next tokens of the sequences in the context's cache.

        As `forward` without gradients, but that few rows on a CPU are computed by loops that read
        weights as they are stored.
        """
        norm1, norm2 = self.input_layernorm, self.post_attention_layernorm
        if self.self_attn is not None:
            addend = self.self_attn.next_tokens(x, norm1, context)
        else:
            addend, _ = self.mixer.forward(x, norm1, context)
        if isinstance(self.mlp, MLP):
            return self.mlp.next_tokens(x, addend, norm2, context)
        y, _ = self.mlp.forward(x, addend, norm2, context)
        return y

    def _forward(self, x: Tensor, context: LayerContext, policy: str) -> tuple[Tensor, BlockSaved]:
        addend, done = self.mixer.forward(x, self.input_layernorm, context)
        layer_observer().mixer_ran(self.index, done)
        # What is not saved is freed before the feed-forward part runs.
        mixer = None if policy == "full" else done.trim(policy)
        del done
        y, mlp = self.mlp.forward(x, addend, self.post_attention_layernorm, context)
        layer_observer().mlp_ran(self.index, mlp)
        x1 = addend
        return y, BlockSaved(mixer, x1, mlp).trim(policy)

    def backward(
        self,
        dy: Tensor | Columns,
        x: Tensor,
        context: LayerContext,
        saved: BlockSaved,
        need_dx: bool,
    ) -> tuple[Tensor | Columns | None, Gradients]:
        """dy (N, H) -> dx (N, H) or None, and the gradient of every trainable parameter.

        Where adapters join products, dx has spare columns for the layer below, which is taken to
        have an adapter as this one has.
        """
        observer = layer_observer()
        observer.backward_begins(self.index)
        dx, grads = self._backward(dy, x, context, saved, need_dx)
        observer.backward_ends(self.index, grads.values())
        return dx, grads

    def _backward(
        self,
        dy: Tensor | Columns,
        x: Tensor,
        context: LayerContext,
        saved: BlockSaved,
        need_dx: bool,
    ) -> tuple[Tensor | Columns | None, Gradients]:
        grads: Gradients = {}
        norm1, norm2 = self.input_layernorm, self.post_attention_layernorm
        if saved.x1 is None:
            addend, saved.mixer = self.mixer.forward(x, norm1, context)
            saved.x1 = addend.add_(x)
        assert saved.mixer is not None and saved.mlp is not None
        output = self.mixer.output()
        dx1 = self.mlp.backward(dy, saved.x1, norm2, context, saved.mlp, grads, output)
        saved.x1 = saved.mlp = None
        below = self.mlp.output() if need_dx else None
        dx = self.mixer.backward(dx1, x, norm1, context, saved.mixer, grads, below)
        return dx, grads
