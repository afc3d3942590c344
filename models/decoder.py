"""The decoder: every family is settings of this one graph, whose blocks `layers.block` chooses.

Inside, every batch is packed: rows of a (B, T) input become documents laid one after another, and
attention, positions and the loss know their boundaries. Parameters have Hugging Face's names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.attention import AttentionPlan
from kernels.linear.int8 import Int8Weight
from kernels.loss.linear_cross_entropy import Head, head_logits, linear_cross_entropy
from kernels.loss.linear_distillation import linear_distillation
from kernels.moe.router import load_balancing_loss
from kernels.runtime.host_memory import SideCopies
from models.config.model_config import ModelConfig
from models.layers.block import DecoderLayer
from models.layers.context import LayerContext, StepSettings, dropout_seeds, layer_policies
from models.layers.experts import ExpertAdapter
from models.layers.kv_cache import KVCache
from models.layers.linear import Embedding, Linear, RMSNorm
from models.layers.rotary import Rotary
from models.memory.checkpointing import ForwardPass, Routed, run_layer
from models.memory.cuda_graphs import LayerGraphs, recordable
from models.memory.offload import OffloadedInputs, WeightStream
from models.memory.recorder import CudaRecorder, Recorder

DISTILLATION_TOKENS = 256
"""Rows of both models' logits that exist at once while one learns from the other."""


class Trunk(nn.Module):
    """Embedding, layers and final norm: Hugging Face's `model.` prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.zero_centered_norm)


class Decoder(nn.Module):
    """A causal language model.

    `checkpointing` is one of "none", "selective", "full" (see `models.layers.block`).
    `dropout_seed` turns LoRA dropout on in training mode; the trainer sets it anew for every
    micro-batch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self.rotary = Rotary(config)
        self.set_checkpointing("selective")
        self.settings = StepSettings()
        self.checkpoints_on_host = False
        self.weight_stream: WeightStream | None = None
        self.graphs: LayerGraphs | None = None
        self._copies: SideCopies | None = None
        self.dropout_seed: int | None = None
        self.loss_chunk_tokens: int | None = None
        self.router_loss = config.router_aux_loss_coef if config.output_router_logits else 0.0

    @property
    def layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.model.layers if isinstance(layer, DecoderLayer)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def ids_device(self) -> torch.device:
        """Where token ids are wanted: where the embedding lies."""
        return self.model.embed_tokens.weight.device

    def set_checkpointing(self, policy: str) -> None:
        """Choose what backward recomputes, in all layers or in each.

        Raises `ValueError` as `models.layers.context.layer_policies` does.
        """
        self.policies = layer_policies(policy, len(self.layers))
        self.checkpointing = policy

    def head_weight(self) -> Head:
        """The output head (V, H): the embedding where they are tied."""
        weight = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight
        assert isinstance(weight, Tensor | Int8Weight)
        return weight

    def _logits(self, x: Tensor) -> Tensor:
        """x (N, H) after the final norm -> (N, V), with gradients where the head is dense."""
        head = self.head_weight()
        return x @ head.T if isinstance(head, Tensor) else head_logits(x, head)

    def _pass(self, tokens: int, cu_seqlens: Tensor, routed: Routed | None) -> ForwardPass:
        cu_seqlens = cu_seqlens.to(self.device)
        plan = AttentionPlan.from_cu_seqlens(
            cu_seqlens, tokens, frugal=self.settings.low_memory_decode
        )
        starts = torch.repeat_interleave(
            plan.cu_seqlens[:-1].long(), plan.cu_seqlens.diff().long(), output_size=tokens
        )
        positions = torch.arange(tokens, device=cu_seqlens.device) - starts
        cos, sin = self.rotary(positions, self.dtype)
        seeds = None
        if self.training and self.dropout_seed is not None and self._drops():
            seeds = dropout_seeds(self.dropout_seed, len(self.layers), self.device)
        store = None
        if self.checkpoints_on_host and torch.is_grad_enabled():
            self._copies = self._copies or SideCopies(self.device)
            store = OffloadedInputs(self.device, self._copies)
        context = LayerContext(cos, sin, plan, seeds, settings=self.settings)
        return ForwardPass(context, self.policies, store, self.weight_stream, routed)

    def _drops(self) -> bool:
        """Whether any adapter has dropout."""
        holders = (m for m in self.model.layers.modules() if isinstance(m, Linear | ExpertAdapter))
        return any(holder.dropout > 0.0 for holder in holders)

    def record_layers(self, recorder: Recorder | None = None) -> None:
        """Run the layers of a training step from recorded launches (`models.memory.cuda_graphs`).

        Without a `recorder` they are CUDA graphs. Adapters must be in place. Raises `ValueError`
        where layers or their inputs are offloaded to the host, because they then have no fixed
        address, and where no layer has sizes that follow from the batch's.
        """
        if self.weight_stream is not None or self.checkpoints_on_host:
            raise ValueError("layers whose weights or inputs lie on the host cannot be recorded")
        if not any(recordable(layer) for layer in self.layers):
            raise ValueError(
                "no layer of this model can be recorded: the sizes within mixtures of experts, and "
                "the documents of Gated DeltaNet, change with every batch"
            )
        self.graphs = LayerGraphs(self.layers, recorder or CudaRecorder(self.device))

    def stream_weights(self) -> None:
        """Stream the quantised weights, which lie in the host's memory, as layers need them."""
        self.weight_stream = WeightStream(self.layers, self.device)

    def _embed(self, input_ids: Tensor) -> Tensor:
        if not input_ids.is_cuda and input_ids.numel():
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of "
                    f"{self.config.vocab_size}"
                )
        embedded: Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def hidden_states(
        self, input_ids: Tensor, cu_seqlens: Tensor, routed: Routed | None = None
    ) -> Tensor:
        """input_ids (N,) packed -> the last layer's output (N, H), before the final norm.

        Each mixture adds to the list `routed`, if there is one.
        """
        run = self._pass(input_ids.shape[0], cu_seqlens, routed)
        x = self._embed(input_ids)
        if self.graphs is not None and torch.is_grad_enabled():
            return self.graphs.forward(x, run)
        for layer in self.layers:
            x = run_layer(x, layer, run)
        return x

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of input_ids (B, T).

        Without `cu_seqlens` every row is a document. With it (D + 1,), the rows of `input_ids`
        laid one after another are split there. Raises `ValueError` on ids outside the vocabulary
        and on boundaries that do not fit.
        """
        flat, bounds = _packed(input_ids, cu_seqlens)
        x = self.model.norm(self.hidden_states(flat, bounds))
        return self._logits(x).view(*input_ids.shape, -1)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        num_items: float | None = None,
        teacher: Decoder | None = None,
    ) -> Tensor:
        """Cross-entropy of the next token, summed over trained tokens, divided by `num_items`.

        `labels` have the shape of `input_ids`, unshifted, -100 where not trained; the first token
        of a document is never a target. `num_items` defaults to the trained tokens of this call;
        give that of the whole accumulated batch when this is one of several micro-batches. Where
        `router_loss` is not 0, that many times the router's load balancing loss is added. With a
        `teacher` of the same vocabulary its distribution is learnt in place of the tokens
        (`kernels.loss.linear_distillation`); labels then say where.
        """
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels {tuple(labels.shape)} must have the shape of input_ids "
                f"{tuple(input_ids.shape)}"
            )
        flat, bounds = _packed(input_ids, cu_seqlens)
        targets = shift_labels(labels.reshape(-1), bounds)
        routed: Routed | None = [] if self.router_loss else None
        x = self.hidden_states(flat, bounds, routed)
        trained = torch.nonzero(targets >= 0).squeeze(1)
        chosen = self.model.norm(x.index_select(0, trained))
        if teacher is not None:
            loss = self._distillation(chosen, teacher, flat, bounds, trained, num_items)
        else:
            loss = linear_cross_entropy(
                chosen,
                self.head_weight(),
                targets.index_select(0, trained),
                num_items,
                self.loss_chunk_tokens,
            )
        if not routed:
            return loss
        # Of the accumulated batch each micro-batch counts by its trained tokens, here as above.
        share = 1.0 if num_items is None else trained.numel() / num_items
        counts, prob_sums = zip(*routed, strict=True)
        balance = load_balancing_loss(counts, prob_sums, flat.shape[0])
        return loss + self.router_loss * share * balance.to(loss.dtype)

    def _distillation(
        self,
        chosen: Tensor,
        teacher: Decoder,
        flat: Tensor,
        bounds: Tensor,
        trained: Tensor,
        num_items: float | None,
    ) -> Tensor:
        with torch.no_grad():
            states = teacher.hidden_states(flat, bounds).index_select(0, trained)
            known = teacher.model.norm(states)
        return linear_distillation(
            chosen,
            self.head_weight(),
            known,
            teacher.head_weight(),
            num_items,
            self.loss_chunk_tokens or DISTILLATION_TOKENS,
        )

    @torch.no_grad()
    def decode(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (V,) after the last of input_ids (T,), the next tokens of the cached sequence."""
        tokens, start = input_ids.shape[0], cache.length
        positions = torch.arange(start, start + tokens, device=input_ids.device)
        cos, sin = self.rotary(positions, self.dtype)
        whole = torch.tensor([0, tokens], dtype=torch.int32)
        plan = AttentionPlan.from_cu_seqlens(whole, tokens)
        context = LayerContext(cos, sin, plan, cache=cache)
        run = ForwardPass(context, self.policies, weights=self.weight_stream)
        x = self._embed(input_ids)
        for layer in self.layers:
            x = run_layer(x, layer, run)
        cache.advance(tokens)
        norm = self.model.norm
        last, _ = norm.forward_with_rstd(x[-1:])
        return self._logits(last).squeeze(0)


def _packed(input_ids: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    flat = input_ids.reshape(-1)
    if cu_seqlens is None:
        length = input_ids.shape[-1]
        cu_seqlens = torch.arange(
            0, flat.shape[0] + 1, length, dtype=torch.int32, device=flat.device
        )
    return flat, cu_seqlens


def shift_labels(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Targets (N,): the label of the next token of the same document, -100 at its end."""
    targets = torch.full_like(labels, -100)
    targets[:-1] = labels[1:]
    targets[cu_seqlens[1:].long() - 1] = -100
    return targets
