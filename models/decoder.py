"""`Decoder`: the one graph that every model family configures.

Inside, every batch is packed (`models.layers.packed_batch`): the rows of a (B, T) input become
documents laid end to end, and attention, positions and the loss know their boundaries. Parameters
have Hugging Face's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kernels.attention import AttentionPlan
from kernels.linear.int8 import Int8Weight
from kernels.loss.linear_cross_entropy import Head
from kernels.loss.linear_distillation import linear_distillation
from kernels.runtime.host_memory import SideCopies
from kernels.runtime.ranks import ONE_RANK, Ranks
from kernels.vocabulary.shard import VocabularyShard
from models.cache.many_sequences import BatchPass
from models.cache.one_sequence import KVCache, LayerCache
from models.config.model_config import ModelConfig
from models.layers.block import DecoderLayer
from models.layers.context import (
    DEFAULT_SETTINGS,
    LayerContext,
    StepSettings,
    layer_policies,
)
from models.layers.experts import ExpertAdapter
from models.layers.linear import Embedding, Linear, RMSNorm, RowGroups
from models.layers.moe import Routed, balance_of
from models.layers.noise import with_noise
from models.layers.packed_batch import PackedBatch, batch_positions
from models.layers.rotary import Rotary
from models.memory.checkpointing import ForwardPass, run_layer
from models.memory.cuda_graphs import LayerGraphs, recordable
from models.memory.offload import LayerWeights, OffloadedInputs, WeightStream
from models.memory.recorder import CudaRecorder, Recorder
from models.memory.sharded_weights import ShardedWeights
from models.output_head import OutputHead
from models.parallel.head_exchange import HeadExchange

DISTILLATION_TOKENS = 256
"""Tokens whose logits, of both models, exist at a time in distillation."""

_OFFLOADED_LAYERS = "layers whose weights or inputs lie on the host cannot be recorded"


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

    What belongs to one step comes with the call, as `StepSettings`; what belongs to the model is
    set by `stream_weights`, `shard_weights` and `record_layers`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self.rotary = Rotary(config)
        self.weight_stream: LayerWeights | None = None
        self.vocabulary: Ranks | None = None
        """The ranks among whom the rows of embedding and head are divided."""
        self.graphs: LayerGraphs | None = None
        self.context_ranks: Ranks = ONE_RANK
        self._copies: SideCopies | None = None

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

    @property
    def router_loss(self) -> float:
        """The factor of the router's load balancing loss that the configuration asks for."""
        config = self.config
        return config.router_aux_loss_coef if config.output_router_logits else 0.0

    @property
    def head(self) -> OutputHead:
        """The output head: the embedding where they are tied."""
        weight = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight
        assert isinstance(weight, Tensor | Int8Weight)
        if self.vocabulary is None:
            return OutputHead(weight)
        return OutputHead(weight, VocabularyShard(weight, self.config.vocab_size, self.vocabulary))

    def head_weight(self) -> Head:
        """The output head (V, H). Raises `ValueError` where each rank has rows of its own."""
        return self.head.whole

    def own_slice(self, batch: PackedBatch) -> PackedBatch:
        """What this rank computes of a batch: all of it, but where the context is split."""
        rank, size = self.context_ranks.rank, self.context_ranks.size
        return batch if size == 1 or batch.slices is not None else batch.sliced(rank, size)

    def stream_weights(self) -> None:
        """Stream the quantised weights, which lie in the host's memory, as layers need them."""
        self.weight_stream = WeightStream(self.layers, self.device)

    def shard_weights(self, ranks: Ranks, *, on_host: bool = False) -> ShardedWeights:
        """Keep this rank's share of the layers' frozen weights alone (`models.memory`)."""
        self.weight_stream = sharded = ShardedWeights(ranks, self.device, on_host=on_host)
        for layer in self.layers:
            sharded.take(layer)
        return sharded

    def record_layers(self, recorder: Recorder | None = None) -> None:
        """Run the layers of a training step from recorded launches (`models.memory.cuda_graphs`).

        Without a `recorder` they are CUDA graphs. Adapters must be in place. Raises `ValueError`
        where weights are offloaded to the host, because they then have no fixed address, and where
        no layer has sizes that follow from the batch's.
        """
        if self.weight_stream is not None:
            raise ValueError(_OFFLOADED_LAYERS)
        if not any(recordable(layer) for layer in self.layers):
            raise ValueError(
                "no layer of this model can be recorded: the sizes within mixtures of experts, and "
                "the documents of Gated DeltaNet, change with every batch"
            )
        self.set_graphs(LayerGraphs(self.layers, recorder or CudaRecorder(self.device)))

    def set_graphs(self, graphs: LayerGraphs | None) -> None:
        """Run the layers of a training step through `graphs`, or one by one again."""
        self.graphs = graphs

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of input_ids (B, T).

        Without `cu_seqlens` every row is a document. With it (D + 1,), the rows of `input_ids`
        laid end to end are split there. Raises `ValueError` on ids outside the vocabulary
        and on boundaries that do not fit.
        """
        self._check_ids(input_ids)
        batch = PackedBatch.of(input_ids, cu_seqlens=cu_seqlens)
        x = self.hidden_states(batch.to(self.device, self.ids_device))
        return self.logits(x).view(*input_ids.shape, -1)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        num_items: float | None = None,
        teacher: Decoder | None = None,
        settings: StepSettings = DEFAULT_SETTINGS,
    ) -> Tensor:
        """The loss of `batch_loss` for ids and labels of one shape.

        `labels` are unshifted, -100 where not trained; the first token of a document is never a
        target. On a GPU the host waits once to find the trained tokens, and once for `cu_seqlens`:
        a loader that builds the `PackedBatch` itself spares both.
        """
        self._check_ids(input_ids)
        batch = PackedBatch.of(input_ids, labels, cu_seqlens)
        return self.batch_loss(batch, settings, num_items=num_items, teacher=teacher)

    def batch_loss(
        self,
        batch: PackedBatch,
        settings: StepSettings = DEFAULT_SETTINGS,
        *,
        num_items: float | None = None,
        loss_scale: float = 1.0,
        teacher: Decoder | None = None,
    ) -> Tensor:
        """Cross-entropy of the next token, summed over trained tokens, divided by `num_items`.

        A batch in host memory is sent to the device; the host does not wait. `num_items` is by
        default the trained tokens of this batch; give that of the whole accumulated batch when
        this is one of several micro-batches. Tokens may have weights (`PackedBatch.items` is then
        their sum). `loss_scale` multiplies the result, inside the head's
        products, where float16 gradients could vanish otherwise. With a router loss its balancing
        loss is added. With a `teacher` of the same vocabulary its distribution is learnt in place
        of the tokens (`kernels.loss.linear_distillation`); the trained tokens then say where.
        Where the context is split, the loss is that of this rank's slice: their sum is the batch's.
        """
        batch = self.own_slice(batch)
        given, batch = batch, batch.to(self.device, self.ids_device)
        items = (batch.items or 1) if num_items is None else num_items
        divisor = items / loss_scale
        factor = self.router_factor(settings)
        routed: Routed | None = [] if factor else None
        x = self.hidden_states(batch, settings, routed)
        trained = self.model.norm(x.index_select(0, batch.trained))
        chunk = settings.loss_chunk_tokens
        if teacher is not None:
            wanted = (teacher.device, teacher.ids_device)
            # Else from where the batch was: what a teacher reads on the host never comes back.
            there = batch if wanted == (self.device, self.ids_device) else given.to(*wanted)
            loss = self._distillation(trained, teacher, there, divisor, chunk)
        else:
            loss = self.head.loss(
                trained, batch.targets, divisor, chunk, batch.weights, settings.loss_terms
            )
        if not routed:
            return loss
        # Of the accumulated batch each micro-batch counts by its trained tokens, here as above.
        share = loss_scale if num_items is None else batch.items / divisor
        balance = balance_of(routed, batch, self.context_ranks)
        return loss + factor * share * balance.to(loss.dtype)

    def router_factor(self, settings: StepSettings) -> float:
        """How much the router's balancing loss counts: as settings say, else as the model does."""
        return self.router_loss if settings.router_loss is None else settings.router_loss

    def hidden_states(
        self,
        batch: PackedBatch,
        settings: StepSettings = DEFAULT_SETTINGS,
        routed: Routed | None = None,
    ) -> Tensor:
        """The last layer's output (N, H), before the final norm, of a batch on the device.

        Each mixture adds to the list `routed`, if there is one.
        """
        run = self._pass(batch, settings, routed)
        x: Tensor = self.model.embed_tokens(batch.input_ids)
        seed, alpha = settings.dropout_seed, settings.neftune_alpha
        if alpha and self.training and seed is not None:
            x = with_noise(x, batch.cu_seqlens, alpha, seed + settings.first_row, batch.slices)
        x = run.context.embedded(x)
        if self.graphs is not None and torch.is_grad_enabled():
            if run.context.exchange is not None:
                raise ValueError("layers that exchange tokens with other ranks cannot be recorded")
            if run.inputs is not None:
                raise ValueError(_OFFLOADED_LAYERS)
            return self.graphs.forward(x, run)
        for layer in self.layers:
            x = run_layer(x, layer, run)
        return x

    def context(self, batch: PackedBatch) -> LayerContext:
        """What the layers read of a batch on the device beside x, outside of training."""
        return self._pass(batch, DEFAULT_SETTINGS, None).context

    @torch.no_grad()
    def continued(self, x: Tensor, batch: PackedBatch, layers: Iterable[int]) -> Tensor:
        """What these layers, one after the other, make of x (N, H)."""
        run = self._pass(batch, DEFAULT_SETTINGS, None)
        for index in layers:
            x = run_layer(x, self.layers[index], run)
        return x

    @torch.no_grad()
    def decode(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (V,) after the last of input_ids (T,), the next tokens of the cached sequence."""
        tokens, start = input_ids.shape[0], cache.length
        positions = torch.arange(start, start + tokens, device=input_ids.device)
        x = self._next_states(input_ids, positions, cache)
        cache.advance(tokens)
        return self._head(x[-1:]).squeeze(0)

    @torch.no_grad()
    def decode_batch(
        self,
        input_ids: Tensor,
        cache: BatchPass,
        rows: Sequence[int],
        groups: RowGroups | None = None,
    ) -> Tensor:
        """Logits (R, V) after the tokens `rows` of input_ids (N,), the next ones of sequences.

        `cache` says which tokens are whose, `groups` which are computed with a named adapter.
        """
        positions = torch.tensor(cache.positions(), device=input_ids.device)
        x = self._next_states(input_ids, positions, cache, groups)
        cache.advance()
        every = len(rows) == x.shape[0]
        return self._head(x if every else x[torch.tensor(rows, device=x.device)])

    def _next_states(
        self,
        input_ids: Tensor,
        positions: Tensor,
        cache: LayerCache,
        groups: RowGroups | None = None,
    ) -> Tensor:
        """The last layer's output (N, H) of the next tokens of cached sequences."""
        self._check_ids(input_ids)
        tokens = input_ids.shape[0]
        cos, sin = self.rotary(positions, self.dtype)
        plan = AttentionPlan(torch.tensor([0, tokens], dtype=torch.int32), (0, tokens))
        policies = layer_policies("full", len(self.layers))
        context = LayerContext(cos, sin, plan, cache=cache, groups=groups)
        run = ForwardPass(context, policies, weights=self.weight_stream)
        x: Tensor = self.model.embed_tokens(input_ids)
        for layer in self.layers:
            with run.with_weights(layer, 1):
                x = layer.next_tokens(x, context)
        return x

    def _head(self, x: Tensor) -> Tensor:
        """Logits (N, V) of the last layer's output (N, H), without gradients."""
        return self.head.next_logits(self.model.norm.next_tokens(x))

    def logits(self, states: Tensor) -> Tensor:
        """Logits (N, V) of rows (N, H) of `hidden_states`, through the final norm.

        They have gradients where the head is dense and whole.
        """
        return self.head.logits(self.model.norm(states))

    def _pass(
        self, batch: PackedBatch, settings: StepSettings, routed: Routed | None
    ) -> ForwardPass:
        """What the layers read of a batch that lies on the model's device."""
        key = None
        seed = settings.dropout_seed if self.training else None
        if seed is not None and (settings.drops or self._drops()):
            key = torch.full((), seed, dtype=torch.int64, device=self.device)
        slices = batch.slices
        exchange = None if slices is None else HeadExchange(self.context_ranks, slices)
        inputs = None
        if settings.offload_inputs and torch.is_grad_enabled():
            self._copies = self._copies or SideCopies(self.device)
            inputs = OffloadedInputs(self.device, self._copies)
        policies = layer_policies(settings.checkpointing, len(self.layers))
        cos, sin = self.rotary(batch_positions(batch), self.dtype)
        plan = AttentionPlan(
            batch.cu_seqlens, batch.bounds, settings.low_memory_decode, shared=batch.shared
        )
        context = LayerContext(cos, sin, plan, key, settings=settings, exchange=exchange)
        return ForwardPass(context, policies, inputs, self.weight_stream, routed)

    def _drops(self) -> bool:
        """Whether any adapter has dropout."""
        holders = (m for m in self.model.layers.modules() if isinstance(m, Linear | ExpertAdapter))
        return any(holder.dropout > 0.0 for holder in holders)

    def _check_ids(self, input_ids: Tensor) -> None:
        """Raises `ValueError` on ids outside the vocabulary, where the host can see them."""
        if input_ids.is_cuda or not input_ids.numel():
            return
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self.config.vocab_size}"
            )

    def _distillation(
        self,
        trained: Tensor,
        teacher: Decoder,
        batch: PackedBatch,
        num_items: float,
        chunk: int | None,
    ) -> Tensor:
        """`batch` is where the teacher reads it."""
        with torch.no_grad():
            states = teacher.hidden_states(batch).index_select(0, batch.trained)
            known = teacher.model.norm(states)
        weights = None if batch.weights is None else batch.weights.to(trained.device)
        return linear_distillation(
            trained,
            self.head_weight(),
            known,
            teacher.head_weight(),
            num_items,
            chunk or DISTILLATION_TOKENS,
            weights,
        )
