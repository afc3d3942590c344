"""The dense decoder: llama, mistral, qwen2 and qwen3 are settings of this one graph.

Inside, every batch is packed: rows of a (B, T) input become documents laid one after another, and
attention, positions and the loss know their boundaries. Parameters have Hugging Face's names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.attention import AttentionPlan
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import rms_norm_forward
from models.block import LEVELS, Batch, DecoderLayer
from models.config import ModelConfig
from models.gradient_checkpointing import run_layer
from models.kv_cache import KVCache
from models.linear import Embedding, Linear, RMSNorm
from models.rotary import Rotary


class Trunk(nn.Module):
    """Embedding, layers and final norm: Hugging Face's `model.` prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model.

    `recompute` is one of "none", "selective", "full" (see `models.block`). `dropout_seed` turns
    LoRA dropout on in training mode; the trainer sets it anew for every micro-batch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        self.rotary = Rotary(config)
        self.recompute = "selective"
        self.dropout_seed: int | None = None
        self.loss_chunk_rows: int | None = None

    @property
    def layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.model.layers if isinstance(layer, DecoderLayer)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: that of the embedding."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def set_recompute(self, level: str) -> None:
        """Choose what backward recomputes. Raises `ValueError` on an unknown level."""
        if level not in LEVELS:
            raise ValueError(f"recompute level {level!r}; expected one of {', '.join(LEVELS)}")
        self.recompute = level

    def head_weight(self) -> Tensor:
        """The output head (V, H): the embedding where they are tied."""
        weight = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight
        assert isinstance(weight, Tensor)
        return weight

    def _batch(self, tokens: int, cu_seqlens: Tensor) -> Batch:
        plan = AttentionPlan.from_cu_seqlens(cu_seqlens, tokens)
        starts = torch.repeat_interleave(
            plan.cu_seqlens[:-1].long(), plan.cu_seqlens.diff().long(), output_size=tokens
        )
        positions = torch.arange(tokens, device=cu_seqlens.device) - starts
        cos, sin = self.rotary(positions, self.dtype)
        return Batch(cos, sin, plan, self.dropout_seed if self.training else None)

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

    def hidden_states(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """input_ids (N,) packed -> the last layer's output (N, H), before the final norm."""
        batch = self._batch(input_ids.shape[0], cu_seqlens)
        x = self._embed(input_ids)
        for layer in self.layers:
            x = run_layer(x, layer, batch, self.recompute)
        return x

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of input_ids (B, T).

        Without `cu_seqlens` every row is a document. With it (D + 1,), the rows of `input_ids`
        laid one after another are split there. Raises `ValueError` on ids outside the vocabulary
        and on boundaries that do not fit.
        """
        flat, bounds = _packed(input_ids, cu_seqlens)
        x = self.model.norm(self.hidden_states(flat, bounds))
        logits: Tensor = x @ self.head_weight().T
        return logits.view(*input_ids.shape, -1)

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        num_items: float | None = None,
    ) -> Tensor:
        """Cross-entropy of the next token, summed over trained tokens, divided by `num_items`.

        `labels` have the shape of `input_ids`, unshifted, -100 where not trained; the first token
        of a document is never a target. `num_items` defaults to the trained tokens of this call;
        give that of the whole accumulated batch when this is one of several micro-batches.
        """
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"labels {tuple(labels.shape)} must have the shape of input_ids "
                f"{tuple(input_ids.shape)}"
            )
        flat, bounds = _packed(input_ids, cu_seqlens)
        targets = shift_labels(labels.reshape(-1), bounds)
        x = self.hidden_states(flat, bounds)
        trained = torch.nonzero(targets >= 0).squeeze(1)
        chosen = self.model.norm(x.index_select(0, trained))
        return linear_cross_entropy(
            chosen,
            self.head_weight(),
            targets.index_select(0, trained),
            num_items,
            self.loss_chunk_rows,
        )

    @torch.no_grad()
    def decode(self, input_ids: Tensor, cache: KVCache) -> Tensor:
        """Logits (V,) after the last of input_ids (T,), the next tokens of the cached sequence."""
        tokens, start = input_ids.shape[0], cache.length
        positions = torch.arange(start, start + tokens, device=input_ids.device)
        cos, sin = self.rotary(positions, self.dtype)
        whole = torch.tensor([0, tokens], dtype=torch.int32)
        batch = Batch(cos, sin, AttentionPlan.from_cu_seqlens(whole, tokens), cache=cache)
        x = self._embed(input_ids)
        for layer in self.layers:
            x, _ = layer.run(x, batch)
        cache.advance(tokens)
        norm = self.model.norm
        last, _ = rms_norm_forward(x[-1:], norm.weight, norm.eps)
        return (last @ self.head_weight().T).squeeze(0)


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
